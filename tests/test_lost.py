"""Ways in which people lose a run, or go on with one that is not what they think: each is refused, or said, and nothing is touched."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from tests.test_cli import Run, finished, run

from skillsd import cli
from skillsd.analysis.metrics import read_metrics
from skillsd.callbacks import RunCheckpoint, RunLog
from skillsd.errors import ConfigError
from skillsd.files.checkpoint import newest_good, read_checkpoint
from skillsd.files.durable import DamagedError
from skillsd.files.run_folder import RunRecord, read_record, write_record
from skillsd.files.run_lock import RunLock
from skillsd.signals import guarded
from skillsd.skills import SkillBank

__all__ = ["finished", "run"]


class Saver(L.Callback):
    """Saves in its turn, before the iteration is recorded."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "extra.ckpt")


@pytest.fixture
def ended(run: Run, finished: Path) -> Run:
    shutil.copytree(finished, run.folder)
    return run


def test_contradictions_lose_nothing(ended: Run, tmp_path: Path) -> None:
    before = ended.files()
    more = "--trainer.max_epochs=2"
    for key, *flags in (
        ("ckpt_path", "--overwrite", "--ckpt_path=last"),
        ("ckpt_path", "--overwrite", f"--ckpt_path={ended.folder}/checkpoints/last.ckpt"),
        ("ckpt_path", "--ckpt_path="),
        ("ckpt_path", f"--ckpt_path={ended.folder}/checkpoints"),
        ("checkpoint.dirpath", "--ckpt_path=last", more, f"--checkpoint.dirpath={tmp_path}/disk"),
        ("checkpoint.save_weights_only", "--ckpt_path=last", more, "--checkpoint.save_weights_only=true"),
    ):
        assert key in ended.refuses(*flags), flags
    assert ended("--ckpt_path=last", more, "--log.enabled=false") == 2 and "error: log.enabled: " in ended.err
    assert ended.files() == before and not (tmp_path / "disk").exists()
    ended.folder = tmp_path / "typo"
    assert "ckpt_path" in ended.refuses("--ckpt_path=last", command="validate") and not ended.folder.exists()
    assert ended(f"--ckpt_path={tmp_path}/run/checkpoints/last.ckpt", more) == 2 and "error: skills: " in ended.err  # the bank is elsewhere
    assert not ended.folder.exists()


def test_checkpoints_on_another_disk_are_found(ended: Run, tmp_path: Path) -> None:
    """Also without the flag that has put them there."""
    disk = tmp_path / "disk"
    (ended.folder / "checkpoints").rename(disk)
    write_record(ended.folder, RunRecord(checkpoints=str(disk)))
    assert ended("--ckpt_path=last", command="validate") == 0 and f"{disk}/last.ckpt, iteration 1" in ended.out
    assert ended("--ckpt_path=last", "--trainer.max_epochs=2") == 0, ended.err
    assert not (ended.folder / "checkpoints").exists() and read_checkpoint(disk / "last.ckpt")["global_step"] == 2
    assert read_metrics(ended.folder / "metrics.csv")["iteration"].tolist() == [0, 1]
    ended.folder = tmp_path / "second"
    assert "checkpoint.dirpath" in ended.refuses(f"--checkpoint.dirpath={disk}") and not ended.folder.exists()
    other = RunLock(tmp_path / "empty")  # of a run that writes there, and has not written yet
    assert "checkpoint.dirpath" in ended.refuses(f"--checkpoint.dirpath={tmp_path}/empty") and not ended.folder.exists()
    other.release()


def test_a_run_that_saves_nothing_says_so_later(run: Run) -> None:
    assert run("--trainer.enable_checkpointing=false") == 0
    before = run.files()
    assert read_record(run.folder) == RunRecord(saves=False)
    assert "ckpt_path" in run.refuses("--ckpt_path=last") and run.files() == before


def test_a_checkpoint_in_the_middle_of_an_iteration_is_no_run_s(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = '[{"class_path": "tests.test_lost.Saver"}]'
    assert run(f"--trainer.callbacks={callbacks}") == 0, run.err
    place, before = run.folder / "checkpoints", run.files()
    assert read_checkpoint(place / "extra.ckpt")["global_step"] == read_checkpoint(place / "last.ckpt")["global_step"] == 1
    assert run(f"--ckpt_path={place}/extra.ckpt", "--trainer.max_epochs=2") == 2 and "error: ckpt_path: " in run.err
    assert run.files() == before
    (place / "last.ckpt").rename(place / "z.ckpt")  # of two of one iteration the first by name
    assert newest_good(place) == place / "z.ckpt" and "extra.ckpt" in capsys.readouterr().err
    (place / "z.ckpt").unlink()
    with pytest.raises(DamagedError, match=r"extra\.ckpt"):
        newest_good(place)


def test_one_kind_of_folder_is_not_replaced_by_another(ended: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """However whole both are; and where a run writes nothing else is put."""
    assert ended("--out=exported", command="export") == 0 and cli.main(["report", str(ended.folder), "-o", "report"]) == 0
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    inside = [f"{ended.folder}/{name}" for name in ("adapter/student", "adapter/extra", "checkpoints", "tensorboard/extra")]
    for out in ("report", *inside):
        assert "out: " in ended.refuses(f"--out={out}", command="export"), out
    for out in ("exported", *inside):
        assert cli.main(["report", str(ended.folder), "-o", out]) == 2 and "-o: " in capsys.readouterr().err, out
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before


def test_a_run_is_not_to_end_before_it_goes_on() -> None:
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn="fit"), callbacks=[RunLog()], datamodule=None, default_root_dir="x")
    for trainer.max_epochs in (2, 3, -1, None):
        RunCheckpoint().on_load_checkpoint(trainer, None, {"epoch": 2, "global_step": 6, "run_log": {}})  # type: ignore[arg-type]
    trainer.max_epochs = 1
    with pytest.raises(ConfigError, match=r"^trainer\.max_epochs: "):
        RunCheckpoint().on_load_checkpoint(trainer, None, {"epoch": 2, "global_step": 6, "run_log": {}})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["save_weights_only", "every_n_epochs", "train_time_interval"])
def test_checkpoints_of_another_kind_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^checkpoint\.{name}: "):
        RunCheckpoint(**{name: 1})


def test_a_log_is_not_continued_where_it_is_not_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, path = RunLog(), tmp_path / "metrics.csv"
    log.seen = {path.name: (0, 0)}
    log._append(path, "a\n")
    for change in (path.unlink, lambda: path.write_text("b\nb\n")):
        change()
        before = path.read_text() if path.exists() else None
        with pytest.raises(DamagedError, match=r"metrics\.csv"):
            log._append(path, "a\n")
        assert (path.read_text() if path.exists() else None) == before
    path.unlink()
    assert log._take_up(path, *log.seen[path.name]) == (0, 0) and str(path) in capsys.readouterr().out
    assert log._take_up(path, 0, 0) == (0, 0) and not capsys.readouterr().out


def test_a_record_that_begins_later_is_shown_and_no_study_s(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for iterations, shown in (([3, 4], True), ([3, 5], False), ([-1, 0], False), (["inf", "inf"], False), (["nan"], False)):
        path.write_text("".join(f"{i},0\n" for i in ("iteration", *iterations)).replace("iteration,0", "iteration,epoch"))
        with pytest.raises(ConfigError):
            read_metrics(path)
        if shown:
            assert read_metrics(path, whole=False)["iteration"].tolist() == iterations
        else:
            with pytest.raises(ConfigError):
                read_metrics(path, whole=False)


def test_a_bank_that_is_taken_away_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "bank.sqlite"
    with SkillBank(path) as bank:
        bank.sync()
        path.rename(tmp_path / "moved")
        with pytest.raises(OSError, match=r"bank\.sqlite"):
            bank.sync()
        shutil.copy(tmp_path / "moved", path)
        with pytest.raises(OSError, match=r"bank\.sqlite"):
            bank.sync()
        path.unlink()
        (tmp_path / "moved").rename(path)
        bank.sync()


def test_a_terminal_that_is_closed_ends_a_command_as_ctrl_c_does() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with guarded() as guard:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # one is enough
            os.kill(os.getpid(), signal.SIGTERM)
            assert guard.signal == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with guarded():
            os.kill(os.getpid(), signal.SIGHUP)  # nohup
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
