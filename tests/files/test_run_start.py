"""How a fit begins in its run folder: what it continues, what it discards, what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from skillsd.errors import ConfigError
from skillsd.files.durable import seal_folder, temporary, write
from skillsd.files.run_folder import FORMAT, RunRecord, check_format, note_checkpoint, read_record, write_record
from skillsd.files.run_start import plan, starts_anew
from skillsd.skills import Skill, SkillBank, imported
from skillsd.skills.tables import BEFORE


def fill(folder: Path, *iterations: int, value_estimate: str = "gap") -> None:
    with SkillBank(folder / "bank.sqlite", value_estimate=value_estimate) as bank:
        for i in iterations:
            bank.insert([Skill(f"{i}", "m", "g", "t")], i)


def left(folder: Path) -> list[str]:
    """The skills of its bank."""
    with SkillBank(folder / "bank.sqlite", read_only=True) as bank:
        return [skill.success_analysis for skill in bank.skills("t")]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != "run.json")


def begin(folder: Path, ckpt_path: str | None = None, overwrite: bool = False) -> None:
    plan(folder, ckpt_path, overwrite, imported).carry_out()


def refused(folder: Path, ckpt_path: str | None = None, overwrite: bool = False) -> str:
    """The refusal, which changes nothing."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        plan(folder, ckpt_path, overwrite, imported)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    return str(caught.value)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was killed before its first checkpoint."""
    write_record(tmp_path, RunRecord())
    (tmp_path / "config.yaml").write_text("x")
    (tmp_path / "metrics.csv").write_text("x")
    return tmp_path


def checkpoint(folder: Path, name: str = "last.ckpt") -> Path:
    path = folder / "checkpoints" / name
    write(path, b"x", commit=lambda: note_checkpoint(folder, path.parent))
    return path


def test_imported_skills_alone_are_no_run(tmp_path):
    fill(tmp_path, BEFORE)
    for ckpt_path in (None, "last"):
        begin(tmp_path, ckpt_path)
        assert names(tmp_path) == ["bank.sqlite"] and left(tmp_path) == ["-1"]
    begin(tmp_path, None, True)
    assert names(tmp_path) == []


def test_a_run_is_refused_and_begun_anew_with_what_was_imported(run):
    fill(run, BEFORE, 0, 1)
    assert "earlier run" in refused(run)
    begin(run, "last")
    assert names(run) == ["bank.sqlite"] and left(run) == ["-1"]
    fill(run, 0)  # it goes on as a bank
    assert left(run) == ["-1", "0"]


def test_skills_that_were_not_imported_go(run):
    for iterations in ((0, 1), ()):
        fill(run, *iterations)
        (run / "metrics.csv").write_text("x")
        begin(run, "last")
        assert names(run) == []
    fill(run)  # a run that was killed before its first line
    begin(run)
    assert names(run) == []


@pytest.mark.parametrize("place", ["checkpoints", "elsewhere"])
def test_a_run_with_a_checkpoint_is_continued_or_discarded(run, place):
    fill(run, BEFORE, 0)
    write(run / place / "last.ckpt", b"x", commit=lambda: note_checkpoint(run, run / place))
    for ckpt_path in ("last", "other.ckpt"):
        assert not starts_anew(run, ckpt_path, False)
        begin(run, ckpt_path)
        assert names(run) == sorted(["bank.sqlite", f"{place}/last.ckpt", "config.yaml", "metrics.csv"]) and left(run) == ["-1", "0"]
    assert "earlier run" in refused(run)
    for ckpt_path in ("last", "other.ckpt", str(run / place / "last.ckpt")):  # it is one or the other
        assert "ckpt_path" in refused(run, ckpt_path, True)
    begin(run, None, True)
    assert names(run) == [] and read_record(run) == RunRecord()


def test_another_folder_for_checkpoints_is_refused_to_a_run_that_goes_on(run, tmp_path_factory):
    """A run that goes on has its checkpoints where they are; a folder that holds others' takes no run's."""
    disk = tmp_path_factory.mktemp("disk")
    assert plan(run, "last", False, imported, disk).fresh  # there is none yet
    checkpoint(run)
    with pytest.raises(ConfigError, match=r"checkpoint\.dirpath"):
        plan(run, "last", False, imported, disk)
    assert not plan(run, "last", False, imported, run / "adapter" / ".." / "checkpoints").fresh
    assert not plan(run, "other.ckpt", False, imported, disk).fresh and plan(run, None, True, imported, disk).fresh
    (disk / "last.ckpt").write_text("another run's")
    for ckpt_path, overwrite in (("last", False), ("other.ckpt", False), (None, True)):
        with pytest.raises(ConfigError, match=r"checkpoint\.dirpath"):
            plan(run, ckpt_path, overwrite, imported, disk)
    note_checkpoint(run, disk)
    assert not plan(run, "last", False, imported).fresh and not plan(run, "last", False, imported, disk).fresh
    begin(run, None, True)  # the new run has its own where runs have them
    assert (disk / "last.ckpt").read_text() == "another run's"


def test_a_run_without_checkpoints_is_not_begun_anew_unasked(run):
    write_record(run, RunRecord(saves=False))
    assert "ckpt_path" in refused(run, "last") and "--ckpt_path" not in refused(run)
    start = plan(run, None, True, imported)
    start.saves = False
    start.carry_out()
    assert names(run) == [] and read_record(run) == RunRecord(saves=False)
    begin(run, "last")  # nothing is lost
    assert read_record(run) == RunRecord()
    (run / "run.json").write_text('{"format": 2, "checkpoints": null, "discarding": false}')
    assert read_record(run) == RunRecord()


def test_a_checkpoint_that_is_gone_is_missed(run):
    path = checkpoint(run)
    path.rename(run / "moved.ckpt")
    assert str(path.parent) in refused(run, "last")
    path.parent.rmdir()
    assert "--overwrite" in refused(run, "last")
    path.parent.symlink_to("not-mounted")
    assert "checkpoints" in refused(run, "last") and "checkpoints" in refused(run, None, True)
    path.parent.unlink()
    begin(run, None, True)
    assert names(run) == ["moved.ckpt"]
    begin(run, "last")  # of the new run there was none


def test_a_first_checkpoint_that_was_never_finished_is_not_missed(run):
    """Killed at any moment of its writing: on record or not, it has no name of its own yet."""
    for on_record in (False, True):
        (run / "checkpoints").mkdir(exist_ok=True)
        temporary(run / "checkpoints" / "last.ckpt").write_bytes(b"x")
        if on_record:
            note_checkpoint(run, run / "checkpoints")
        assert starts_anew(run, "last", False)
        begin(run, "last")
        assert names(run) == [] and read_record(run) == RunRecord()
        (run / "metrics.csv").write_text("x")


@pytest.mark.parametrize("ckpt_path", ["last", None])
def test_a_run_killed_while_its_record_was_first_written_had_not_begun(tmp_path, ckpt_path):
    temporary(tmp_path / "run.json").write_text("{")
    begin(tmp_path, ckpt_path)
    assert names(tmp_path) == [] and read_record(tmp_path) == RunRecord()


def test_half_a_discarded_run_is_no_run(run, monkeypatch):
    """Killed in the middle of --overwrite, `last` does the rest, imported skills included."""
    fill(run, BEFORE, 0)
    checkpoint(run, "previous.ckpt")
    checkpoint(run)
    removed: list[Path] = []

    def remove(path: Path) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        path.unlink()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("skillsd.files.run_start._remove", remove)
        begin(run, None, True)
    assert removed == [run / "checkpoints" / "last.ckpt"] and len(names(run)) == 4
    assert starts_anew(run, "last", False)
    begin(run, "last")
    assert names(run) == []


def test_what_others_have_put_into_a_run_folder_stays(run):
    checkpoint(run)
    (run / "adapter" / "student").mkdir(parents=True)
    (run / "adapter" / "student" / "adapter_config.json").write_text("{}")
    seal_folder(run / "adapter" / "student")
    (run / "tensorboard").mkdir()
    for name in ("checkpoints/notes.txt", "adapter/mine.txt", "tensorboard/mine.txt", "chapter1.txt", "metrics.csv.tmp", "panel.json.tmp"):
        (run / name).write_text("precious")
    (run / "tensorboard" / "events.out.tfevents.1.host.2.0").write_text("x")
    begin(run, None, True)
    assert names(run) == sorted(
        ["adapter/mine.txt", "chapter1.txt", "checkpoints/notes.txt", "metrics.csv.tmp", "panel.json.tmp", "tensorboard/mine.txt"]
    )


def test_what_could_be_taken_for_the_run_s_is_refused(run):
    for name in ("checkpoints/golden.ckpt", "adapter/student/notes.txt", "model/notes.txt", "bank.sqlite/notes.txt"):
        path = run / name
        path.parent.mkdir(parents=True)
        path.write_text("precious")
        assert path.name in (said := refused(run, None, True)) or path.parent.name in said
        path.unlink()
        path.parent.rmdir()


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.csv", "checkpoints/last.ckpt", "panel.json", "bank.sqlite-wal", "trajectories.jsonl"]
)
def test_without_a_record_nothing_is_a_run_s(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    for ckpt_path, overwrite in ((None, False), ("last", False), (None, True)):
        assert name in refused(tmp_path, ckpt_path, overwrite)


def test_a_bank_that_cannot_be_read_is_not_deleted_unasked(run):
    (run / "bank.sqlite").write_text("precious")
    assert "earlier run" in refused(run)
    assert "left as it is" in refused(run, "last")


def test_validations_alone_are_no_run(tmp_path):
    """They are kept, unless everything is discarded."""
    write_record(tmp_path)
    (tmp_path / "validations.jsonl").write_text("{}\n")
    for ckpt_path in (None, "last"):
        begin(tmp_path, ckpt_path)
        assert names(tmp_path) == ["validations.jsonl"]
    fill(tmp_path, 0)
    begin(tmp_path, None, True)
    assert names(tmp_path) == []


def test_another_format_is_refused(tmp_path):
    check_format(tmp_path)
    (tmp_path / "metrics.csv").write_text("x")
    for record in (None, '{"format": 999}', "{", "[]", '{"format": 2}'):
        if record is not None:
            (tmp_path / "run.json").write_text(record)
        with pytest.raises(ConfigError, match=r"run\.json|format 999"):
            check_format(tmp_path)
    write_record(tmp_path, RunRecord())
    check_format(tmp_path)
    assert read_record(tmp_path) == RunRecord(FORMAT, None, False)
