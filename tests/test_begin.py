"""Whose a run folder is when a run begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from skillsd.begin import guard_run_folder
from skillsd.errors import ConfigError
from skillsd.skills import Skill, SkillBank
from skillsd.skills.tables import BEFORE


def fill(folder: Path, *iterations: int, booking: str = "gap") -> None:
    with SkillBank(folder / "bank.sqlite", booking=booking) as bank:
        for i in iterations:
            bank.insert([Skill(f"{i}", "m", "g", "t")], i)


def left(folder: Path) -> list[str]:
    """The skills of its bank."""
    with SkillBank(folder / "bank.sqlite", read_only=True) as bank:
        return [skill.success_analysis for skill in bank.skills("t")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_imported_skills_alone_are_no_run(tmp_path):
    fill(tmp_path, BEFORE)
    for ckpt_path in (None, "last"):
        guard_run_folder(tmp_path, ckpt_path, False)
        assert names(tmp_path) == ["bank.sqlite"] and left(tmp_path) == ["-1"]
    guard_run_folder(tmp_path, None, True)
    assert names(tmp_path) == []


def test_a_run_is_refused_and_begun_anew_with_what_was_imported(tmp_path):
    fill(tmp_path, BEFORE, 0, 1)
    for file in (None, "config.yaml", "metrics.csv"):  # the bank alone may be all that is left
        if file is not None:
            (tmp_path / file).write_text("x")
        with pytest.raises(ConfigError, match="earlier run"):
            guard_run_folder(tmp_path, None, False)
        assert left(tmp_path) == ["-1", "0", "1"]
    guard_run_folder(tmp_path, "last", False)
    assert names(tmp_path) == ["bank.sqlite"] and left(tmp_path) == ["-1"]
    fill(tmp_path, 0)  # it goes on as a bank
    assert left(tmp_path) == ["-1", "0"]


def test_imported_skills_beside_a_run_are_refused_without_last(tmp_path):
    fill(tmp_path, BEFORE)
    (tmp_path / "config.yaml").write_text("x")
    with pytest.raises(ConfigError, match="earlier run"):
        guard_run_folder(tmp_path, None, False)
    guard_run_folder(tmp_path, "last", False)
    assert names(tmp_path) == ["bank.sqlite"] and left(tmp_path) == ["-1"]


def test_what_was_not_imported_goes(tmp_path):
    for iterations in ((0, 1), ()):
        fill(tmp_path, *iterations)
        (tmp_path / "metrics.csv").write_text("x")
        guard_run_folder(tmp_path, "last", False)
        assert names(tmp_path) == []
    fill(tmp_path)  # a run that was killed before its first line
    guard_run_folder(tmp_path, None, False)
    assert names(tmp_path) == []


def test_a_run_with_a_checkpoint_is_left_alone(tmp_path):
    fill(tmp_path, BEFORE, 0)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("x")
    for ckpt_path in ("last", "other.ckpt"):
        guard_run_folder(tmp_path, ckpt_path, False)
        assert names(tmp_path) == ["bank.sqlite", "checkpoints"] and left(tmp_path) == ["-1", "0"]
    guard_run_folder(tmp_path, "last", True)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["bank.sqlite", "bank.sqlite-wal"])
def test_what_cannot_be_read_is_not_deleted_unasked(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match="earlier run"):
        guard_run_folder(tmp_path, None, False)
    if name == "bank.sqlite":
        (tmp_path / "metrics.csv").write_text("x")
        with pytest.raises(ConfigError, match=r"skills: .*left as it is"):
            guard_run_folder(tmp_path, "last", False)
        assert names(tmp_path) == ["bank.sqlite", "metrics.csv"]
    assert (tmp_path / name).read_text() == "precious"


def test_validations_alone_are_no_run(tmp_path):
    """They are kept, unless everything is discarded."""
    (tmp_path / "validations.jsonl").write_text("{}\n")
    for ckpt_path in (None, "last"):
        guard_run_folder(tmp_path, ckpt_path, False)
        assert names(tmp_path) == ["validations.jsonl"]
    fill(tmp_path, 0)
    guard_run_folder(tmp_path, None, True)
    assert names(tmp_path) == []
