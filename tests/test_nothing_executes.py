"""Nothing executes what it loads: our sources, checkpoints, models, adapters, and what a configuration names."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pickle
import shutil
import sys
import typing
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from skillsd import cli
from skillsd.class_paths import KEYS, selected
from skillsd.cli.standard import STANDARD
from skillsd.errors import ConfigError
from skillsd.files.run_folder import write_record
from skillsd.methods import merge
from skillsd.policy import LoraSettings, Policy, PolicySettings
from skillsd.policy.load import load_base, load_tokenizer
from skillsd.skills.callback import SkillBankCallback
from skillsd.trainer import Trainer

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

# -- our own sources -------------------------------------------------------------------------------------------------------------

MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code"}
CALLS = {"eval", "exec", "compile", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "os.system", "os.popen"}
TRUE = {"trust_remote_code", "allow_pickle", "shell"}
ALLOWED = {
    # AppWorld's worker runs the agent's code: in a process of its own, inside the sandbox that tests/envs/test_appworld_hostile.py attacks.
    ("envs/skillsd_appworld/worker", "compile"), ("envs/skillsd_appworld/worker", "exec"),
}  # fmt: skip


def findings(source: str) -> list[str]:
    """What a source does that could execute what it loads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found += [f"from {node.module} import {', '.join(a.name for a in node.names)}"]
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in CALLS:
                found.append(name)
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            found += [f"{k}=True" for k in TRUE if given.get(k, "False") != "False"]
    return found


def test_the_sources_load_data_only():
    wrong = []
    for path in sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("envs/**/*.py")]):
        name = str(path.relative_to(ROOT))
        wrong += [(name, f) for f in findings(path.read_text()) if not any(name.startswith(n) and f == what for n, what in ALLOWED)]
    assert wrong == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import dill as d", "import joblib", "torch.load(p)", "torch.load(p, weights_only=0)",
        "yaml.load(t, Loader=L)", "yaml.unsafe_load(t)", "eval(t)", "exec(t)", "np.load(p, allow_pickle=True)", "os.system(t)",
        "A.from_pretrained(p, trust_remote_code=True)", "A.from_pretrained(p, trust_remote_code=flag)", "subprocess.run(t, shell=True)",
    ],
)  # fmt: skip
def test_calls_that_execute_code_are_found(source):
    assert findings(source)
    assert not findings("torch.load(p, weights_only=True); model.eval(); re.compile(p); np.load(p, allow_pickle=False); yaml.safe_load(t)")


# -- checkpoints, models, adapters -----------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


ENV = {
    "size": 5, "boxes": 1, "difficulties": {"short": {"lengths": [2, 4]}}, "splits": {"train": {"short": 2}, "test": {"short": 2}},
    "max_turns": 2, "action_format": "bare", "prompts": {"instruction": ""},
}  # fmt: skip


class Run:
    """A tiny `skillsd` in a folder of its own."""

    def __init__(self, base: Path, model: str, capsys: Any) -> None:
        self.base, self.folder, self.capsys = base, base / "run", capsys
        tiny = {
            "trainer": {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"},
            "model": {"policy": {"model": model, "lora": {"r": 2, "alpha": 4, "init": None}}},
            "data": {"env_kwargs": ENV, "batch_tasks": 2, "group_size": 2, "rollout": {"max_rows": 8}},
        }
        (base / "tiny.yaml").write_text(yaml.safe_dump(tiny))

    def refuses(self, *flags: str, command: str = "fit") -> str:
        """The one line."""
        configs = ["-c", "sokoban", "-c", "method/skillsd", "-c", str(self.base / "tiny.yaml")]
        code = cli.main([command, *configs, f"--trainer.default_root_dir={self.folder}", *flags])
        out, err = self.capsys.readouterr()
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out, (code, out, err)
        return str(err)


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[[str], str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SKILLSD_DEBUG", raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    made = Run(tmp_path, tiny_model("qwen3"), capsys)
    capsys.readouterr()
    return made


def test_a_malicious_checkpoint(run, tmp_path):
    mark = tmp_path / "executed"
    with (tmp_path / "plain.ckpt").open("wb") as f:
        pickle.dump(Bomb(mark), f)
    torch.save({"state_dict": {}, "global_step": 1, "pytorch-lightning_version": "2.6.6", "x": Bomb(mark)}, tmp_path / "zip.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "zip.ckpt", weights_only=True)
    torch.load(tmp_path / "zip.ckpt", weights_only=False)
    assert mark.exists()  # it would
    mark.unlink()
    last = run.folder / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    write_record(run.folder)
    shutil.copy(tmp_path / "zip.ckpt", last)
    plain, zipped = str(tmp_path / "plain.ckpt"), str(tmp_path / "zip.ckpt")
    for command, given in (("fit", plain), ("fit", zipped), ("fit", "last"), ("validate", "last"), ("export", zipped), ("play", "last")):
        more = ["--out=out"] if command == "export" else []
        line = run.refuses(f"--ckpt_path={given}", *more, command=command)
        assert "ckpt_path" in line and str(given) in line, (command, given, line)
    assert not mark.exists()


def test_weights_only_cannot_be_switched_off(run, tmp_path, monkeypatch):
    torch.save({"x": 1}, tmp_path / "x.ckpt")
    for command in ("fit", "validate"):
        assert "weights_only is false" in run.refuses("--weights_only=false", command=command)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(Trainer, "fit", lambda self, **given: seen.update(given) or (_ for _ in ()).throw(ConfigError("enough")))
    assert "enough" in run.refuses()
    assert seen["weights_only"] is True


def test_a_checkpoint_brings_no_class_and_no_setting(run, tmp_path, monkeypatch):
    """Lightning takes hyper-parameters, class path included, from a checkpoint's `hyper_parameters`."""
    (tmp_path / "evil_hparams.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save({"hyper_parameters": {"_class_path": "evil_hparams.Thing", "x": 1}, "state_dict": {}}, tmp_path / "h.ckpt")
    run.refuses(f"--ckpt_path={tmp_path / 'h.ckpt'}")
    assert not (tmp_path / "executed").exists() and "evil_hparams" not in sys.modules


def test_a_model_folder_with_a_pickle_or_code_of_its_own(tmp_path, tiny_model):
    mark, source = tmp_path / "executed", Path(tiny_model("qwen3"))
    pickled, code = tmp_path / "pickled", tmp_path / "code"
    for folder in (pickled, code):
        shutil.copytree(source, folder)
    (pickled / "model.safetensors").unlink()
    torch.save({"x": Bomb(mark)}, pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"policy\.model: .* pickle .* safetensors"):
        load_base(PolicySettings(model=str(pickled)), CPU)
    shutil.copy(source / "model.safetensors", pickled)  # beside it, the pickle is not looked at
    assert load_base(PolicySettings(model=str(pickled)), CPU) is not None
    config = json.loads((code / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    (code / "config.json").write_text(json.dumps(config))
    (code / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n")
    with pytest.raises(ConfigError, match=r"policy\.model: .* code of its own"):
        load_base(PolicySettings(model=str(code)), CPU)
    tokens = json.loads((code / "tokenizer_config.json").read_text())
    (code / "tokenizer_config.json").write_text(json.dumps({**tokens, "auto_map": config["auto_map"], "tokenizer_class": "Tokenizer"}))
    with pytest.raises(ConfigError, match=r"policy\.model"):
        load_tokenizer(PolicySettings(model=str(code)))
    assert not mark.exists()


def test_an_adapter_folder_with_a_pickle(tmp_path, tiny_model):
    mark, folder = tmp_path / "executed", tmp_path / "student"
    settings: Any = dict(model=tiny_model("qwen3"))
    Policy(PolicySettings(**settings, lora=LoraSettings(r=2, alpha=4)), "cpu").save_adapter(tmp_path)
    lora = LoraSettings(r=2, alpha=4, init=str(folder))
    Policy(PolicySettings(**settings, lora=lora), "cpu")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb(mark)}, folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"policy\.lora\.init: .* has no adapter_model\.safetensors"):
        Policy(PolicySettings(**settings, lora=lora), "cpu")
    assert not mark.exists()


# -- class paths ---------------------------------------------------------------------------------------------------------------------

EVIL = """
def f(*args, **kwargs):
    open("called", "w")
class Thing:
    def __init__(self, *args, **kwargs):
        open("called", "w")
"""
SIGNALS = [f"model.objective.{key}" for key in ("loss", "advantage", "multiplier", "gate")]
TAKES = ["model", "data", *SIGNALS, "skills.summariser", "skills.context", "trainer.logger", "trainer.strategy", "trainer.profiler"]
TAKES += ["trainer.plugins", "trainer.accelerator", "trainer.callbacks"]


@pytest.mark.slow  # 14 keys
@pytest.mark.parametrize(("key", "path"), [*zip(TAKES, cycle(["evil_paths.Thing", "subprocess.Popen", "evil_paths.f", "os.system"]))])
def test_a_class_that_is_no_subclass_is_refused_and_not_called(run, tmp_path, monkeypatch, key, path):
    (tmp_path / "evil_paths.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(tmp_path))
    nested: Any = {"class_path": path, "init_args": {"args": ["touch", "called"]} if path == "subprocess.Popen" else {}}
    if key == "trainer.callbacks":
        nested = [nested]
    for part in reversed(key.split(".")):
        nested = {part: nested}
    (tmp_path / "evil.yaml").write_text(yaml.safe_dump(nested))
    run.refuses("-c", "evil.yaml")
    assert not (tmp_path / "called").exists()


def test_a_denied_module_is_not_imported(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "pty", raising=False)
    run.refuses("--skills.summariser=pty.spawn")
    assert "pty" not in sys.modules


def test_a_class_path_in_an_argument_is_data(run, tmp_path, monkeypatch):
    (tmp_path / "evil_nested.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(tmp_path))
    run.refuses("--data.env_kwargs.x={class_path: evil_nested.Thing}")
    assert not (tmp_path / "called").exists()


def test_a_callback_that_calls_any_function(run, tmp_path, monkeypatch):
    (tmp_path / "evil_lambda.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(tmp_path))
    line = run.refuses(
        "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: {on_fit_start: evil_lambda.f}}"
    )
    assert "LambdaCallback" in line and not (tmp_path / "called").exists() and "evil_lambda" not in sys.modules


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [touch called]", "!!python/name:os.system", "!!python/object/new:os.system [x]"]
)
def test_yaml_tags_that_make_objects_are_refused(run, tmp_path, tag, capsys):
    (tmp_path / "tag.yaml").write_text(f"trainer: {tag}\n")
    assert "could not determine a constructor" in run.refuses("-c", "tag.yaml")
    assert cli.main(["config", "-c", "tag.yaml"]) == 2 and "could not determine a constructor" in capsys.readouterr().err
    assert cli.main(["study", "-c", "tag.yaml"]) == 2 and "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "called").exists()


# -- skillsd config --------------------------------------------------------------------------------------------------------------------


def resolve(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def test_bases_and_classes_of_the_table_exist_and_fit():
    """Bases and classes exist; what comes with skillsd is a subclass, or has the Protocol's methods; and all of it is listed."""
    for key in KEYS:
        bases = tuple(resolve(base) for base in key.bases)
        for path in key.shipped:
            kind = resolve(path)
            if getattr(bases[0], "_is_protocol", False):
                assert all(callable(getattr(kind, m)) for m in ("__call__", *vars(bases[0])) if inspect.isfunction(vars(bases[0]).get(m)))
            else:
                assert issubclass(kind, bases), path
    listed = {path for key in KEYS for path in key.shipped}
    standard = {f"skillsd.callbacks.{kind.__name__}" for kind in STANDARD.values()}
    built_in = standard | {"skillsd.callbacks.Diagnostics", "skillsd.callbacks.MemoryPlan"}
    built_in |= {"skillsd.skills.GroupContext", "skillsd.skills.SynchronousSummariser"}
    for package in ("skillsd.callbacks", "skillsd.objective", "skillsd.skills"):
        module: Any = importlib.import_module(package)
        bases = tuple(
            b for key in KEYS for base in key.bases if isinstance(b := resolve(base), type) and not getattr(b, "_is_protocol", False)
        )
        for name in module.__all__:
            kind = getattr(module, name)
            ours = inspect.isclass(kind) and (issubclass(kind, bases) or name.endswith(("Summariser", "Context"))) and kind not in bases
            if ours and not getattr(kind, "_is_protocol", False):
                assert f"{package}.{name}" in listed | built_in, name


def test_the_bases_are_those_of_the_parser():
    trainer = typing.get_type_hints(Trainer.__init__)
    for key in KEYS:
        owner, _, name = key.name.rpartition(".")
        hints = {
            "trainer": trainer,
            "skills": typing.get_type_hints(SkillBankCallback.__init__),
            "model.objective": typing.get_type_hints(resolve("skillsd.objective.Objective")),
        }.get(owner)
        if hints is not None:
            text = str(hints[name])
            assert all(resolve(base).__name__ in text for base in key.bases), (key.name, text)


def test_the_config_command_imports_no_class(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["config"]) == 0
    out = capsys.readouterr().out
    assert all(key.name in out and all(path in out for path in (*key.bases, *key.shipped)) for key in KEYS) and "--print_config" in out
    (tmp_path / "evil_shown.py").write_text("open('called', 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {
        "skills": {"context": "evil_shown.Context", "summariser": {"class_path": "skillsd.skills.BaseSummariser"}},
        "trainer": {"callbacks": [{"class_path": "evil_shown.Call", "init_args": {"inner": {"class_path": "evil_shown.Inner"}}}]},
        "data": {"env": "evil_shown:X-v0"},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["config", "-c", "sokoban", "-c", "own.yaml"]) == 0
    rows = capsys.readouterr().out.splitlines()
    for name, path in (("skills.context", "Context"), ("trainer.callbacks", "Call"), ("trainer.callbacks[0].init_args.inner", "Inner")):
        assert any(r.startswith(f"{name} ") and f"evil_shown.{path}  <- neither" in r for r in rows), name
    assert any("data.env " in r and "evil_shown:X-v0  <- neither" in r for r in rows)
    assert any(r.startswith("skills.summariser ") and r.endswith("skillsd.skills.BaseSummariser") for r in rows)
    assert not any("RulesSummariser" in r or "callbacks.Panel" in r for r in rows)  # overlaid
    assert not (tmp_path / "called").exists() and "evil_shown" not in sys.modules
    for flags, message in ((["-c", "nosuch.yaml"], "no such file"), (["--nosuch"], "nosuch"), (["-c", "list.yaml"], "mapping")):
        (tmp_path / "list.yaml").write_text("[1]")
        assert cli.main(["config", *flags]) == 2 and message in capsys.readouterr().err


def test_an_overlay_with_another_class_starts_anew():
    below: dict[str, Any] = {"model": {"objective": {"loss": "a.L"}}}
    merge(below, {"model": {"objective": {"loss": {"class_path": "b.L"}}, "class_path": "b.B"}})
    assert dict(selected(below)) == {"model": ["b.B"], "model.objective.loss": ["b.L"]}
    merge(below, {"model": {"objective": {"loss": {"class_path": "b.L", "init_args": {"a": 1}}}}})
    merge(below, {"model": {"objective": {"loss": {"class_path": "a.L"}}}})
    assert below["model"]["objective"]["loss"] == {"class_path": "a.L"}
