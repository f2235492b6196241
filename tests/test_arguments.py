"""What a command line names, before it is parsed: files, packaged files, run folders, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from skillsd import conf_dir
from skillsd.cli.arguments import arguments, find, resolve
from skillsd.config_file import parse_config
from skillsd.errors import ConfigError
from skillsd.methods import merge


def configs(*args: str) -> list[dict[str, Any]]:
    """The configurations that the parser gets, in its order."""
    return [parse_config(a.removeprefix("--config="), a) for a in resolve(args).args if a.startswith("--config=")]


def test_flags_and_their_values() -> None:
    given = "-c a -cb --config=c --x=1 --y -1 --skill runs/a --overwrite false --print_config -h --z".split()
    pairs = [("-c", "a"), ("-c", "b"), ("--config", "c"), ("--x", "1"), ("--y", "-1"), ("--skill", "true"), ("", "runs/a")]
    assert arguments(given) == [*pairs, ("--overwrite", "false"), ("--print_config", None), ("-h", None), ("--z", None)]


def test_packaged_files_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sokoban").mkdir()  # a folder of that name is in nobody's way
    sokoban = yaml.safe_load((conf_dir() / "sokoban.yaml").read_text(encoding="utf-8"))
    for name in ("sokoban", "sokoban.yaml", "conf/sokoban.yaml"):
        assert find(name).config == sokoban
    (tmp_path / "sokoban.yaml").write_text("a: 1")  # a file is first
    assert find("sokoban.yaml").config == {"a": 1}
    with pytest.raises(ConfigError, match="method/grpo"):
        find("method/gpro")


def test_a_configuration_in_parts(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("optimizer: {lr: 1e-4}")
    (tmp_path / "own.yaml").write_text("model: model.yaml\ndata: {env: x:Y-v0}")
    assert find(str(tmp_path / "own.yaml")).config == {"model": {"optimizer": {"lr": 1e-4}}, "data": {"env": "x:Y-v0"}}
    assert find("{a: 1}").config == {"a": 1}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run that was made as runs/old and lies in runs/new now."""
    monkeypatch.chdir(tmp_path)
    config = {
        "trainer": {
            "default_root_dir": "runs/old",
            "logger": {"class_path": "x.L", "init_args": {"save_dir": "runs/old", "name": "runs/old"}},
            "callbacks": [{"class_path": "x.C", "init_args": {"dirpath": "runs/old/checkpoints", "save_dir": "runs/older"}}],
        },
        "model": {"policy": {"model": "m"}},
        "data": {"env": "x:D-v0"},
        "checkpoint": {"dirpath": "runs/old/checkpoints"},
        "ckpt_path": "last", "weights_only": None, "overwrite": True, "optimizer": None,
    }  # fmt: skip
    folder = tmp_path / "runs" / "new"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.csv").touch()
    return "runs/new"


@pytest.mark.parametrize("as_given", [["{}"], ["-c", "{}"], ["{}/config.yaml"], ["--config={}/config.yaml"], ["--level", "3", "{}"]])
def test_a_run_by_its_folder_and_by_its_file(run: str, as_given: list[str]) -> None:
    request = resolve(["play", *(a.format(run) for a in as_given)])
    assert request.run == Path(run)
    *_, config = configs("play", *(a.format(run) for a in as_given))
    # What a command was given is no part of the run: `overwrite` would discard it.
    assert set(config) == {"trainer", "model", "data", "checkpoint"}
    trainer, root = config["trainer"], "trainer.default_root_dir}"
    assert trainer["default_root_dir"] == run and config["checkpoint"] == {"dirpath": f"${{..{root}/checkpoints"}
    assert trainer["logger"]["init_args"] == {"save_dir": f"${{....{root}", "name": "runs/old"}
    assert trainer["callbacks"][0]["init_args"] == {"dirpath": f"${{.....{root}/checkpoints", "save_dir": "runs/older"}


def test_a_file_called_config_is_nobodys_run(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("trainer: {default_root_dir: a}\noverwrite: true")
    assert find(str(file)).run is None and find(str(file)).config["overwrite"] is True


def test_a_wrong_run_name_is_refused(run: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for args, said in ((["empty"], "empty is a folder"), (["nosuch"], "nosuch"), ([run, "-c", "runs/new/../new"], "two runs")):
        with pytest.raises(ConfigError, match=said):
            resolve(["play", *args])


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "experiment": "{trainer: {max_epochs: 4}, data: {env: x:D-v0}}",
        "overlay": "model: {lr: 1}",
        "trainer": "trainer: {max_epochs: 2, devices: 1}",
        "old": "{model: {class_path: x.M}, data: {env: x:D-v0}}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("-c overlay.yaml", r"data\.env is missing: -c overlay\.yaml .*-c sokoban -c overlay\.yaml"),
        ("-c trainer.yaml", r"data\.env is missing"),
        ("--trainer.max_epochs=1", r"^data\.env is missing: name an experiment"),
        ("-c old.yaml", r"old\.yaml: model\.class_path and model"),
        ("-c experiment.yaml --skills={a:\n1,a:\n2}", r"--skills: the key a"),
    ],
)
def test_an_overlay_alone_is_refused(files: None, args: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(["fit", *args.split(" ")])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("-c experiment.yaml -c trainer.yaml -c overlay.yaml --trainer.max_epochs=3", None),
        ("-c trainer.yaml -c experiment.yaml", "trainer.max_epochs"),
        ("--trainer.max_epochs 2 -c experiment.yaml", "trainer.max_epochs"),
        ("--trainer.devices 2 experiment.yaml -c trainer.yaml", "trainer.devices"),
        ("-c overlay.yaml -c experiment.yaml", None),
        ("-c overlay.yaml --help", None),
        ("--data.env=x:D-v0 -c overlay.yaml", None),
    ],
)
def test_what_a_later_file_sets_again_is_said(files: None, capsys: pytest.CaptureFixture[str], args: str, said: str | None) -> None:
    resolve(["fit", *args.split()])
    err = capsys.readouterr().err
    assert err.count("\n") == (said is not None) and (said or "") in err, err


def test_a_pre_training_and_an_experiment_have_a_command_each(files: None, tmp_path: Path) -> None:
    (tmp_path / "cloning.yaml").write_text("data: {env: x:D-v0, demonstrations: {split: a}}")
    (tmp_path / "method.yaml").write_text("{method: grpo, data: {env: x:D-v0}}")
    for command, name, cure in (("fit", "cloning.yaml", "skillsd pretrain -c"), ("pretrain", "method.yaml", "skillsd fit -c")):
        with pytest.raises(ConfigError, match=f"{name} describes .*{cure} {name}"):
            resolve([command, "-c", name])
    assert resolve(["pretrain", "-c", "cloning.yaml"]).command == "pretrain"


METHODS = {
    "one": "method: {teacher: {mode: ema}, skills: {context: x.C}, objective: {clip_low: 0.1, gate: x.G}}",
    "two": "{method: {objective: {clip_high: 0.5}}, model: {optimizer: {lr: 1}}}",
    "own": "{model: {objective: {clip_low: 0.3}}, skills: {capacity: 2, min_reward: 1.0}}",
}


def settings(*args: str) -> dict[str, Any]:
    """What the parser is given, put together: later files on earlier ones."""
    merged: dict[str, Any] = {}
    for arg in resolve(["fit", *args]).args:
        if arg.startswith("--config="):
            merge(merged, parse_config(arg.removeprefix("--config="), "x"))
    return merged


def test_a_method_is_replaced_whole(files: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in METHODS.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    one = settings("-c", "experiment.yaml", "-c", "one.yaml")
    assert one["teacher"] == {"mode": "ema"} and one["model"]["objective"] == {"clip_low": 0.1, "gate": "x.G"}
    two = settings("-c", "experiment.yaml", "-c", "one.yaml", "-c", "two.yaml")
    assert "teacher" not in two and "context" not in two.get("skills", {}) and two["model"]["objective"] == {"clip_high": 0.5}
    assert two["model"]["optimizer"] == {"lr": 1} and two["method"] == {"objective": {"clip_high": 0.5}}
    again = settings("-c", "one.yaml", "-c", "experiment.yaml", "-c", "two.yaml", "-c", "one.yaml")
    assert again["teacher"] == {"mode": "ema"} and again["model"]["objective"] == {"clip_low": 0.1, "gate": "x.G"}
    flag = settings("-c", "experiment.yaml", "-c", "one.yaml", "--method=two.yaml")
    assert "teacher" not in flag and flag["model"]["objective"] == {"clip_high": 0.5} and flag["method"] == "two.yaml"
    assert capsys.readouterr().err == ""


def test_settings_after_a_method_change_it_and_those_before_do_not_count(
    files: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in METHODS.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    after = settings("-c", "experiment.yaml", "-c", "one.yaml", "-c", "own.yaml")
    assert after["model"]["objective"] == {"clip_low": 0.3, "gate": "x.G"} and after["skills"]["min_reward"] == 1.0
    before = settings("-c", "experiment.yaml", "-c", "own.yaml", "-c", "one.yaml")
    assert before["model"]["objective"] == {"clip_low": 0.1, "gate": "x.G"} and before["skills"] == {"capacity": 2, "context": "x.C"}
    assert "replaces skills.min_reward, model.objective of -c own.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("{gate: x.G}", r"method\.gate: .*under `objective:`"),
        ("grpoo", "no method .*grpo"),
        ("{teacher: {}, loss: x}", r"method\.loss: a method has teacher"),
        ("trainer.yaml", "give a name, or a mapping"),
    ],
)
def test_a_wrong_method_is_refused(files: None, method: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(["fit", "-c", "experiment.yaml", f"--method={method}"])


def test_a_part_of_a_method_has_a_key_of_its_own(files: None) -> None:
    for flag, key in (("objective.clip_low", "model.objective.clip_low"), ("teacher.mode", "teacher.mode"), ("actor", "data.actor")):
        with pytest.raises(ConfigError, match=rf"method\.{flag}: .*--{key}\.$"):
            resolve(["fit", "-c", "experiment.yaml", f"--method.{flag}=1"])


@pytest.mark.parametrize(
    ("method", "flags", "said"), [("method: trace_gate\n", [], ""), ("", ["--method=trace_gate"], "sets model.objective.gate")]
)
def test_a_file_may_set_one_part_of_the_method_that_it_names(tmp_path, capsys, method, flags, said):
    file = tmp_path / "x.yaml"
    gate = "model: {objective: {gate: {class_path: skillsd.objective.SigmoidGate}}}\n"
    file.write_text(f"{method}{gate}data: {{env: skillsd_sokoban:skillsd/Sokoban-v0}}\n")
    resolve(["fit", *flags, "-c", str(file)])
    assert said in (err := capsys.readouterr().err) and bool(err) == bool(said)
