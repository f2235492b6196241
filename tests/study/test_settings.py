"""Study settings: files, flags, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from skillsd import cli, conf_dir
from skillsd.errors import ConfigError
from skillsd.study.cells import make_cells
from skillsd.study.settings import StudySettings, read_settings

GOOD = {"configs": ["sokoban"], "methods": {"grpo": [], "skillsd": []}}


def test_the_packaged_study():
    study = read_settings(["-c", str(conf_dir() / "study/sokoban-nano.yaml"), "--seeds=[7]"])
    assert study.seeds == [7] and study.configs == ["sokoban.yaml"] and study.baseline in study.methods
    for overlays in study.methods.values():
        assert all(name.startswith("method/") for name in overlays)
    assert study.flags()["trainer.enable_progress_bar"] == "false"


def test_every_key_of_a_study_has_a_help_line(capsys):
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for name in StudySettings.__dataclass_fields__:
        assert f"--{name}" in out
    assert "Seconds after which running cells are interrupted" in out


def test_flags_are_text_for_the_command_line(tmp_path):
    file = tmp_path / "s.yaml"
    given = {"trainer.max_epochs": 1, "data.x": {"a": [1]}, "m.y": None, "m.z": "text", "m.t": True, "m.lr": 1e-4}
    given |= {"m.i": 0, "m.n": "3", "m.off": "off", "t.callbacks": [{"class_path": "skillsd.callbacks.Panel", "init_args": {"every": 3}}]}
    file.write_text(yaml.safe_dump({**GOOD, "set": given}))
    flags = ["--set.trainer.max_epochs=2", "--set.m.w", "0.5", '--set.m.v={"a": 1}']
    assert read_settings(["-c", str(file), *flags]).flags() == {
        "trainer.max_epochs": "2", "data.x": '{"a": [1]}', "m.y": "null", "m.z": "text", "m.t": "true", "m.lr": "0.0001", "m.w": "0.5",
        "m.v": '{"a": 1}', "m.i": "0", "m.n": "3", "m.off": "off",
        "t.callbacks": '[{"class_path": "skillsd.callbacks.Panel", "init_args": {"every": 3}}]',
    }  # fmt: skip


BAD = {
    "nothing": (dict(configs=[]), "configs, methods, seeds"),
    "a folder's name": (dict(methods={"a/b": [], "grpo": []}), "methods: 'a/b' names a folder"),
    "base": (dict(methods={"base": [], "grpo": []}), "methods: 'base'"),
    "twice": (dict(seeds=[1, 1]), "seeds: .* twice"),
    "no baseline": (dict(baseline="x"), "baseline: x is not among methods"),
    "no control": (dict(controls={"x": "grpo"}), "controls: x: grpo must be two of methods"),
    "its own control": (dict(controls={"grpo": "grpo"}), "controls: grpo: grpo"),
    "workers": (dict(workers=0), "workers is 0"),
    "threads": (dict(threads=0), "threads is 0"),
    "time": (dict(time_limit=0), "time_limit is 0"),
    "own flag": (dict(set={"seed_everything": 1}), "set: seed_everything is the study's own"),
    "own folder": (dict(set={"trainer.default_root_dir": "x"}), r"set: trainer\.default_root_dir is the study's own"),
    "a nest": (dict(set={"trainer": {"max_epochs": 1}}), "set: trainer is no dotted key"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named_with_their_key(case):
    changes, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        StudySettings(**{**GOOD, **changes})


def test_a_missing_file_is_named_with_its_key():
    study = StudySettings(**{**GOOD, "methods": {"grpo": ["method/nosuch.yaml"]}})
    with pytest.raises(ConfigError, match=r"methods\.grpo: there is no file method/nosuch\.yaml"):
        make_cells(study, lambda name: str(conf_dir() / ("sokoban.yaml" if name == "sokoban" else name)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nosuch=1"], "--nosuch"),
        (["--seeds=x"], "seeds"),
        (["--metric=reward"], "metric"),
        ([], "configs, methods, seeds"),
        (["--methods={grpo: []}", "--configs=[nosuch]"], "configs: there is no file nosuch"),
    ],
)
def test_the_command_s_errors_are_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SKILLSD_DEBUG", raising=False)
    assert cli.main(["study", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_the_command_finds_packaged_files(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    methods = "--methods={grpo: [method/grpo.yaml]}"
    assert cli.main(["study", "-c", "study/sokoban-nano", methods, "--controls={}", "--only_report"]) == 2
    assert f"no cell of {Path('runs/study/sokoban-nano')} is finished" in capsys.readouterr().err
