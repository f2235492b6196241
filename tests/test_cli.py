"""The command line in-process: bad input gets one line that names the key, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from skillsd import __version__, cli
from skillsd.callbacks.resume import CheckpointFiles
from skillsd.config_errors import parser_error
from skillsd.config_file import parse_config
from skillsd.errors import ConfigError
from skillsd.optimizer import OptimizerSettings
from skillsd.skills import SkillBank

ENV = {
    "size": 5, "boxes": 1, "difficulties": {"short": {"lengths": [2, 4]}}, "splits": {"train": {"short": 2}, "test": {"short": 2}},
    "max_turns": 2, "action_format": "bare", "prompts": {"instruction": ""},
}  # fmt: skip
REWRITING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% if loop.last %}{{ m['content'] }}{% endif %}<|end|>"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template that forgets earlier answers."""


class Run:
    """`skillsd fit -c sokoban` made tiny, in a folder of its own."""

    def __init__(self, base: Path, model: str, capsys: Any) -> None:
        self.folder, self.overlay, self.capsys, self.err = base / "run", base / "tiny.yaml", capsys, ""
        tiny = {
            "trainer": {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"},
            "model": {"policy": {"model": model, "lora": {"r": 2, "alpha": 4, "init": None}}},
            "data": {"env_kwargs": ENV, "batch_tasks": 2, "group_size": 2, "rollout": {"max_rows": 8}},
        }
        self.overlay.write_text(yaml.safe_dump(tiny))

    def __call__(self, *flags: str, command: str = "fit") -> int:
        configs = ["-c", "sokoban", "-c", "method/skillsd", "-c", str(self.overlay)]
        code = cli.main([command, *configs, f"--trainer.default_root_dir={self.folder}", *flags])
        if self.capsys is not None:
            self.out, self.err = self.capsys.readouterr()
        return code

    def refuses(self, *flags: str, command: str = "fit") -> str:
        """The one line that bad input is answered with."""
        assert self(*flags, command=command) == 2, self.out
        assert self.err.startswith("error: ") and self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        return self.err

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in sorted(self.folder.rglob("*")) if p.is_file()}


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[[str], str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SKILLSD_DEBUG", raising=False)
    made = Run(tmp_path, tiny_model("qwen3"), capsys)
    capsys.readouterr()  # what saving the model prints
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], str]) -> Path:
    """The folder of a finished run."""
    made = Run(tmp_path_factory.mktemp("finished"), tiny_model("qwen3"), None)
    assert made() == 0
    return made.folder


@pytest.fixture
def ended(run: Run, finished: Path) -> Run:
    """A finished run, to spoil."""
    shutil.copytree(finished, run.folder)
    return run


SPLITS = "--data.env_kwargs.splits="
BAD: dict[str, tuple[list[str], str]] = {
    "unknown key": (["--data.nosuch=1"], r"--data\.nosuch: there is no key data\.nosuch"),
    "unknown trainer key": (["--trainer.nosuch=1"], "--trainer.nosuch"),
    "a typo in a file": (["-c", "typo.yaml"], r"typo\.yaml: .*model\.optimizer\.lrr .*model\.optimizer\.lr\b"),
    "a typo in a class": (["--model.objective.gate=skillsd.objective.TraceGat"], r"model\.objective\.gate: .*TraceGate"),
    "a typo in a class of one's own": (["--model.objective.gate=own_gates.Confidant"], r"own_gates .*\(did you mean Confident\?\)"),
    "a number for a group": (["--model.policy.lora=3"], r"model\.policy\.lora: 3 is no mapping"),
    "unknown nested key": (["--model.policy.nosuch=1"], r"--model\.policy\.nosuch: there is no key model\.policy\.nosuch"),
    "unknown key of the environment": (["--data.env_kwargs.nosuch=1"], "'nosuch'"),
    "unknown class": (["--model.objective.gate=skillsd.objective.NoSuch"], r"model\.objective\.gate: .*NoSuch"),
    "unknown callback": (["--trainer.callbacks+=skillsd.callbacks.NoSuch"], "trainer.callbacks: .*NoSuch"),
    "unknown subcommand flag": (["--nosuch"], "--nosuch"),
    "G = 1": (["--data.group_size=1"], r"data\.group_size is 1: .*at least 2"),
    "negative lambda": (
        ["--model.objective.distillation_weight=-0.1"],
        r"model\.objective\.distillation_weight is -0\.1: give 0 or more",
    ),
    "negative learning rate": (["--model.optimizer.lr=-1"], r"model\.optimizer: lr"),
    "a learning rate beyond float32": (["--model.optimizer.lr=1e39"], r"model\.optimizer: lr .*at most 1e\+30"),
    "a learning rate that is no number": (["--model.optimizer.lr=.nan"], r"model\.optimizer: lr.*0 or more"),
    "two signals": (
        ["-c", "method/opid", "--model.objective.multiplier=skillsd.objective.GapMultiplier"],
        r"model\.objective: advantage and multiplier are both set\. One signal in two places counts the same evidence twice, "
        r"and no weight says which of them worked: set all but one to null",
    ),
    "two signals, by a flag": (
        ["-c", "method/sdar", "--model.objective.advantage=skillsd.objective.GapAdvantage"], "objective: loss and advantage are both set",
    ),
    "a signal in the wrong place": (
        ["--model.objective.loss=skillsd.objective.GapMultiplier"],
        r"model\.objective\.loss: GapMultiplier is no loss: give it as multiplier",
    ),
    "a distribution as an advantage": (
        ["--model.objective.loss=null", "--model.objective.advantage=skillsd.objective.TopKJSD"],
        r"model\.objective\.advantage is TopKJSD.* expected gradient is zero: give it as model\.objective\.loss",
    ),
    "unknown signal": (["--model.objective.loss=skillsd.objective.NoSuch"], r"model.*NoSuch"),
    "unknown filter": (["--model.objective.group_filter=x"], r"model\.objective\.group_filter: .*zero_variance"),
    "unknown actor": (["--data.actor=x"], r"data\.actor: .*half_with_skill"),
    "an actor whose skill comes too late": (
        ["-c", "method/hindsight", "--data.actor=teacher"],
        r"data\.actor is teacher, which needs a skill before the rollout: set skills\.context to skillsd\.skills\.BankContext",
    ),
    "unknown teacher": (["--teacher.mode=x"], r"teacher\.mode: .*'frozen'"),
    "unknown key of the teacher": (["--teacher.nosuch=1"], r"--teacher\.nosuch"),
    "a teacher that is never synced": (["--teacher.every=0"], r"\.every is 0: give at least 1 iteration"),
    "EMA rate": (["--teacher.mode=ema", "--teacher.rate=2"], r"\.rate is 2\.0: give a share"),
    "skill template": (["--skills.template={nosuch}"], r"skills\.template: use only success_analysis, mistake_analysis, golden_workflow"),
    "transcript template": (["--skills.transcript_template={plan}"], r"skills\.transcript_template: use only transcript, actions"),
    "unknown context": (["--skills.context=skillsd.skills.NoSuch"], r"skills\.context: .*NoSuch"),
    "a summariser's server that is not there": (
        ["--skills.summariser=skillsd.skills.OpenAISummariser", "--skills.summariser.model=m",
         "--skills.summariser.base_url=http://127.0.0.1:9/v1", "--trainer.max_steps=1"],
        r"skills\.summariser: .*http://127\.0\.0\.1:9/v1.*refused",
    ),
    "a summariser's address that is none": (
        ["--skills.summariser=skillsd.skills.OpenAISummariser", "--skills.summariser.model=m",
         "--skills.summariser.base_url=127.0.0.1:9/v1"],
        r"skills\.summariser.*: base_url is '127",
    ),
    "unknown key of the bank": (["--skills.nosuch=1"], r"--skills\.nosuch"),
    "unknown eviction": (["--skills.eviction=x"], r"skills\.eviction: .*'worst', 'oldest'"),
    "a bank without room": (["--skills.capacity=0"], r"skills: .*capacity"),
    "no budget": (
        ['--trainer.callbacks+={class_path: skillsd.callbacks.EnvStepBudget, init_args: {steps: 0}}'], r"EnvStepBudget\.steps is 0",
    ),
    "nothing to train": (
        ["--model.objective.policy_weight=0", "--model.objective.distillation_weight=0"], "policy_weight",
    ),
    "empty split": ([SPLITS + '{"train": {"short": 0}, "test": {"short": 2}}'], r"splits\['train'\]"),
    "unknown split": (["--data.train_split=nosuch"], r"data\.train_split: .*nosuch.*'test', 'train'"),
    "overlapping splits": (["--data.panel_split=train"], r"data: train_split and panel_split share 2 tasks"),
    "no tasks file": (["--data.tasks_file=nosuch.jsonl"], r"data\.tasks_file: no file nosuch\.jsonl"),
    "unknown environment": (["--data.env=nosuch:X-v0"], "data.env, env_kwargs: nosuch:X-v0"),
    "unknown model folder": (["--model.policy.model=/no/such/folder"], r"policy\.model: there is no folder /no/such/folder"),
    "folder without weights": (["--model.policy.model=empty"], r"policy\.model: the folder empty holds no model"),
    "unknown hub model": (["--model.policy.model=nobody/nothing"], r"policy\.model: nobody/nothing is no local folder"),
    "no adapter": (["--model.policy.lora.init=empty"], r"policy\.lora\.init: empty is not a PEFT"),
    "chat template that rewrites": (["--model.policy.chat_template=rewriting.jinja"], r"policy\.chat_template: .*not prefix"),
    "unknown chat template": (["--model.policy.chat_template=nosuch"], r"policy\.chat_template: nosuch is neither .*qwen3"),
    "no such file": (["-c", "nosuch.yaml"], r"nosuch\.yaml"),
    "no YAML": (["-c", "broken.yaml"], r"broken\.yaml, line 2"),
    "no number": (["--data.group_size=many"], r"data\.group_size: Expected: int"),
    "null for a number": (
        ["--model.optimizer.warmup_steps", "null"],
        r"model\.optimizer\.warmup_steps: it is null",
    ),
    "no arguments of a class": (["-c", "odd.yaml"], r"data\.env_kwargs\.size\.class_path\.init_args is no mapping"),
    "a list for arguments": (["-c", "list.yaml"], r"teacher is no mapping"),
    "null for a dataclass": (["--model.policy.lora=null"], r"model\.policy\.lora: null is no value"),
    "null for the optimizer": (["--model.optimizer=null"], r"model\.optimizer: null is no value"),
    "null for the optimizer in a file": (["-c", "optimizer.yaml"], r"optimizer\.yaml: model\.optimizer is null"),
    "null for the objective in a file": (["-c", "objective.yaml"], r"objective\.yaml: model\.objective is null"),
    "null for the rollout in a file": (["-c", "rollout.yaml"], r"rollout\.yaml: data\.rollout is null"),
    "unknown argument of a class": (
        ["--model.objective.gate=skillsd.objective.SigmoidGate", "--model.objective.gate.init_args.bete=3"],
        r"--model\.objective\.gate\.init_args\.bete: .*SigmoidGate.*did you mean beta\?.* beta",
    ),
    "unknown argument of a class in a file": (
        ["-c", "gate.yaml"], r"gate\.yaml: model\.objective\.gate\.init_args\.bete: .*did you mean beta\?",
    ),
    "unknown argument of a class in a list": (
        ["-c", "budget.yaml"], r"budget\.yaml: trainer\.callbacks\.init_args\.step: .*did you mean steps\?",
    ),
    "an abbreviated flag": (["--trainer.max_epoch=1"], r"--trainer\.max_epoch: .*did you mean trainer\.max_epochs\?"),
    "null for a choice": (["--model.optimizer.schedule=null"], r"model\.optimizer\.schedule: it is null"),
    "a class that cannot be built": (
        ["--trainer.callbacks+={class_path: skillsd.callbacks.RunCheckpoint, init_args: {every_n_train_steps: -2}}"],
        r"trainer\.callbacks: .*-2",
    ),
    "no text under a class": (["--skills.summariser.init_args.joiner=[]"], r"skills\.summariser\.init_args\.joiner: Expected: str"),
    "no class path": (["-c", "class.yaml"], r"model\.objective\.gate: its class_path is no text"),
    "null byte": (["-c", "null.yaml"], "trainer: its value cannot be read: embedded null byte"),
    "no devices": (["--trainer.devices=[]"], r"trainer: .*devices=\[\]"),
    "no number in a file": (["-c", "wrong.yaml"], r"data\.rollout\.max_rows: Expected: int"),
    "no such choice": (["--model.optimizer.schedule=linear"], r"model\.optimizer\.schedule: .*'cosine'"),
    "a text that YAML takes for false": (["-c", "no.yaml"], r"skills\.refresh: .*quotes"),
    "nothing under a key": (["-c", "bare.yaml"], r"trainer is null"),
    "a flag that names a key twice": (["--model.policy.lora={r: 2, r: 4}"], r"--model\.policy\.lora: the key r"),
    "an address as the run folder": (["--trainer.default_root_dir=s3://bucket/run"], r"trainer\.default_root_dir: s3://bucket/run "),
    "no such class": (["--model.objective.gate=NoGate"], r"model\.objective\.gate: .*NoGate.*TraceGate"),
    "no number of epochs": (["--trainer.max_epochs=many"], r"trainer\.max_epochs: .*int.*many"),
    "no share of batches": (["--trainer.limit_val_batches=many"], r"trainer\.limit_val_batches: .*int.*float.*many"),
    "no temperature": (["--data.rollout.temperature=0"], r"rollout\.temperature"),
    "no checkpoint": (["--ckpt_path=nosuch.ckpt"], r"ckpt_path: no checkpoint at nosuch\.ckpt"),
    "no accelerator": (["--trainer.accelerator=nosuch"], "accelerator='nosuch'"),
    "a second bank": (
        ["--trainer.callbacks+=skillsd.skills.callback.SkillBankCallback"], r"trainer\.callbacks: .*SkillBankCallback: .* under `skills:`",
    ),
    "a second teacher": (
        ["--trainer.callbacks+=skillsd.callbacks.TeacherSync"], r"trainer\.callbacks: .*TeacherSync: .* under `teacher:`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, name):
    flags, message = BAD[name]
    monkeypatch.setattr("sys.dont_write_bytecode", True)  # own_gates.py is imported
    (tmp_path / "empty").mkdir()
    (tmp_path / "rewriting.jinja").write_text(REWRITING)
    (tmp_path / "broken.yaml").write_text("data: [\n")
    (tmp_path / "odd.yaml").write_text("data: {env_kwargs: {size: {class_path: {class_path: x.Y, init_args: 3}}}}\n")
    (tmp_path / "typo.yaml").write_text("model: {optimizer: {lrr: 1}}\n")
    (tmp_path / "own_gates.py").write_text("from skillsd import Gate\nclass Confident(Gate): pass\n")
    (tmp_path / "list.yaml").write_text("teacher: [{class_path: x.Y, init_args: 3}]\n")
    (tmp_path / "optimizer.yaml").write_text("model: {optimizer: null}\n")
    (tmp_path / "objective.yaml").write_text("model: {objective: null}\n")
    (tmp_path / "rollout.yaml").write_text("data: {rollout: null}\n")
    (tmp_path / "gate.yaml").write_text("model: {objective: {gate: {class_path: skillsd.objective.SigmoidGate, init_args: {bete: 3}}}}\n")
    (tmp_path / "budget.yaml").write_text("trainer: {callbacks: [{class_path: skillsd.callbacks.EnvStepBudget, init_args: {step: 3}}]}\n")
    (tmp_path / "class.yaml").write_text("model: {objective: {gate: {class_path: {a: 1}}}}\n")
    (tmp_path / "null.yaml").write_text('trainer: "\\0"\n')
    (tmp_path / "no.yaml").write_text("skills: {refresh: no}\n")
    (tmp_path / "bare.yaml").write_text("trainer:\n")
    (tmp_path / "wrong.yaml").write_text("data: {rollout: {max_rows: x}}\n")
    before = sorted(tmp_path.rglob("*"))
    line = run.refuses(*flags)
    assert re.search(message, line), line
    assert sorted(tmp_path.rglob("*")) == before  # no run folder, nothing else


def test_bad_commands(capsys):
    for args, message in (
        (["nosuch"], "nosuch"), (["fit"], "data.env"), (["fit", "-c", "nosuch"], "nosuch"), (["--nosuch"], "--nosuch"),
        (["shwo", "runs/a"], "show"), (["-c", "sokoban", "fit"], "skillsd fit -c sokoban"),
        (["study", "-c", "sokoban"], "sokoban is no study"),
    ):  # fmt: skip
        assert cli.main(args) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and message in err and err.strip().count("\n") == 0 and out == ""


def test_alone_it_lists_its_commands(capsys):
    assert cli.main([]) == 0 and (out := capsys.readouterr().out)
    assert cli.main(["--help"]) == 0 and capsys.readouterr().out == out
    assert all(re.search(rf"^  {command} +\w", out, re.M) for command in cli.COMMANDS) and "skillsd fit -c sokoban" in out


# -- run folders ------------------------------------------------------------------------------------------------------------


def test_an_earlier_run_is_kept(ended):
    before = ended.files()
    line = ended.refuses()
    assert "trainer.default_root_dir" in line and "--ckpt_path last" in line and "--overwrite=true" in line
    assert ended.files() == before

    assert ended("--overwrite=true", "--seed_everything=5") == 0
    after = ended.files()
    assert after["metrics.csv"].count(b"\n") == 2 and after["trajectories.jsonl"] != before["trajectories.jsonl"]
    assert "seed_everything: 5" in after["config.yaml"].decode()


def test_a_folder_with_any_file_of_a_run_is_refused(run):
    for name in ("bank.sqlite", "metrics.csv"):
        run.folder.mkdir(exist_ok=True)
        (run.folder / name).write_text("precious")
        assert name in run.refuses()
        assert run.files() == {name: b"precious"}
        (run.folder / name).unlink()
    (run.folder / "notes.txt").write_text("kept")  # somebody's own file is no run, and stays
    assert run() == 0 and run.files()["notes.txt"] == b"kept"


def make_database(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE precious (x)")
    db.close()


@pytest.mark.parametrize("spoil", [lambda p: p.write_bytes(b"not a bank" * 500), make_database, lambda p: p.write_bytes(b"")])
def test_a_foreign_bank_is_never_overwritten(ended, spoil):
    path = ended.folder / "bank.sqlite"
    spoil(path)
    before = ended.files()
    line = ended.refuses("--ckpt_path", "last", "--trainer.max_epochs=2")
    assert line.startswith("error: skills: ") and "bank.sqlite" in line and "left as it is" in line
    assert ended.files() == before


def test_a_bank_of_another_run(ended, tmp_path):
    path = ended.folder / "bank.sqlite"
    path.unlink()
    assert str(path) in ended.refuses("--ckpt_path", "last", "--trainer.max_epochs=2") and not path.exists()
    SkillBank(path, value_estimate="source").close()
    line = ended.refuses("--ckpt_path", "last", "--trainer.max_epochs=2")
    assert "does not belong to this checkpoint" in line


def test_a_checkpoint_of_another_base(ended, tiny_model):
    before = ended.files()
    for command in ("fit", "validate", "export", "play"):
        flags = ["--ckpt_path", "last"] + (["--out", str(ended.folder.parent / "out")] if command == "export" else [])
        line = ended.refuses(*flags, f"--model.policy.model={tiny_model('llama')}", command=command)
        assert "ckpt_path" in line and "policy.model" in line and tiny_model("qwen3") in line, command
    assert "--ckpt_path=null" in ended.refuses(f"--model.policy.model={tiny_model('llama')}", command="play")
    assert ended.files() == before and not (ended.folder.parent / "out").exists()


def test_a_file_that_is_no_checkpoint(ended, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"nothing")
    torch.save({"state_dict": {}}, tmp_path / "y.ckpt")
    (tmp_path / "z.ckpt").write_bytes((ended.folder / "checkpoints" / "last.ckpt").read_bytes()[:9000])
    before = ended.files()
    for name in ("x.ckpt", "y.ckpt", "z.ckpt"):
        for command in ("fit", "validate"):
            assert "ckpt_path" in ended.refuses(f"--ckpt_path={tmp_path / name}", command=command)
    assert ended.files() == before


# -- a full disk --------------------------------------------------------------------------------------------------------------


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


@pytest.mark.parametrize("where", ["skillsd.callbacks.log.RunLog._append", "skillsd.files.durable.os.replace", "torch.save"])
def test_a_full_disk(run, monkeypatch, where):
    with monkeypatch.context() as m:
        m.setattr(where, full)
        line = run.refuses()
    assert "No space left on device" in line and "trainer.default_root_dir" in line
    assert run("--ckpt_path", "last") == 0  # with room again it goes on
    assert "no checkpoint yet" in run.out and "going on with other" not in run.out
    files = run.files()
    assert files["metrics.csv"].count(b"\n") == 2 and files["trajectories.jsonl"].count(b"\n") == 4
    assert "checkpoints/last.ckpt" in files and not any(".skillsd-tmp" in name for name in files)


def test_a_full_disk_keeps_the_checkpoint(ended, monkeypatch):
    before = ended.files()
    with monkeypatch.context() as m:
        m.setattr(CheckpointFiles, "save_checkpoint", full)
        assert "No space" in ended.refuses("--ckpt_path", "last", "--trainer.max_epochs=2")
    assert ended.files()["checkpoints/last.ckpt"] == before["checkpoints/last.ckpt"]
    assert ended("--ckpt_path", "last", "--trainer.max_epochs=2") == 0
    assert ended.files()["metrics.csv"].count(b"\n") == 3


def test_debugging_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("SKILLSD_DEBUG", "1")
    with pytest.raises(ConfigError, match="group_size"):
        run("--data.group_size=1")
    monkeypatch.delenv("SKILLSD_DEBUG")
    monkeypatch.setattr("skillsd.callbacks.log.RunLog._append", None)
    with pytest.raises(TypeError):  # nobody's bad input
        run()


def test_code_of_the_user_s_is_named_and_leaves_nothing(run, tmp_path, monkeypatch):
    (tmp_path / "my_code.py").write_text(
        "import lightning\nclass Mine(lightning.Callback):\n  def setup(self, *_, **__):\n    raise KeyError('odd')\n"
    )
    (tmp_path / "my_broken_code.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = sorted(tmp_path.rglob("*.*"))
    assert "Mine.setup" in (line := run.refuses("--trainer.callbacks+=my_code.Mine")) and "my_code.py:4" in line and "KeyError" in line
    line = run.refuses("--trainer.callbacks+=my_broken_code.Mine")
    assert "trainer.callbacks" in line and "my_broken_code.py:1" in line and "no_such_package_at_all" in line
    assert [p for p in sorted(tmp_path.rglob("*.*")) if "__pycache__" not in str(p)] == before


# -- names and versions -----------------------------------------------------------------------------------------------------------


def test_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"skillsd {__version__}\n"


def test_nested_parser_errors_become_one_line():
    nested = (
        "Parser key \"data\":\n  Does not validate against any of the Union subtypes\n  Errors:\n    - Problem with given class_path 'X':\n"
        "        Parser key \"rollout\":\n          Errors:\n            - Problem with given class_path 'Y':\n"
        "                Parser key \"max_rows\":\n                  Expected a <class 'int'>. Got value: x\n"
        "            - Expected a <class 'NoneType'>\n  Given value: 3"
    )
    assert parser_error(nested).startswith("data.rollout.max_rows: Expected: int. Got value: x")
    assert parser_error('Parser key "a.b": must be larger') == '"a.b": must be larger'
    assert parser_error("key: do this\n") == "key: do this"
    twice = 'Parser key "teacher":\n  Parser key "teacher":\n    Unable to load'
    assert parser_error(twice).startswith("teacher: Unable to load")
    group = "Parser key \"model\":\n  Errors:\n    - Group 'policy' does not accept option 'lora.x'"
    assert parser_error(group).startswith("model: no key policy.lora.x is known")


ENV_KEY = "data.env_kwargs"
VALUES = {
    "null in a mapping": ("--model.policy.lora={r: 4, init: null}", "model.policy.lora.init", None),
    "null": ("--model.policy.lora.init=null", "model.policy.lora.init", None),
    "null in the environment": (
        "--data.env_kwargs.prompts.instruction=null",
        f"{ENV_KEY}.prompts.instruction",
        None,
    ),
    "a line break": ('--data.env_kwargs.prompts={x: "a\\nb"}', f"{ENV_KEY}.prompts.x", "a\nb"),
    "a text like a number": ('--data.env_kwargs.prompts={x: "1e-4"}', f"{ENV_KEY}.prompts.x", "1e-4"),
    "a text like false": ('-c={data: {env_kwargs: {x: "no"}}}', f"{ENV_KEY}.x", "no"),
    "a text like a mapping": ('-c={data: {env_kwargs: {x: {y: "a: b"}}}}', f"{ENV_KEY}.x.y", "a: b"),
    "a number": ("--data.env_kwargs.size=7", f"{ENV_KEY}.size", 7),
    "what stands beside": ("--data.env_kwargs.splits.train={short: 1}", f"{ENV_KEY}.splits.test", {"short": 2}),
    "no dot": ("--model.optimizer.lr=1e-4", "model.optimizer.lr", 1e-4),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_arrive_as_they_were_given(run, name):
    flag, key, value = VALUES[name]
    with pytest.raises(SystemExit):
        run(flag, "--print_config")
    found = parse_config(run.capsys.readouterr().out, "printed")
    for part in key.split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


def test_an_experiment_of_ones_own_has_its_defaults_on_record(tmp_path, capsys):
    own = {"model": {"policy": {"model": "nano"}, "optimizer": {"warmup_steps": 3}}}
    own["data"] = {"env": "skillsd_sokoban:skillsd/Sokoban-v0"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(SystemExit):
        cli.main(["fit", "-c", str(tmp_path / "own.yaml"), "--print_config"])
    found = parse_config(capsys.readouterr().out, "printed")
    model, data = found["model"], found["data"]
    assert model["optimizer"] == asdict(OptimizerSettings(warmup_steps=3)) and model["objective"]["distillation_weight"] == 0.001
    assert data["rollout"]["temperature"] == 1.0
