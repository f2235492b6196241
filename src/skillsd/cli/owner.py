"""What fit and validate hold of their run folder while they run."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning as L

from skillsd.callbacks import RunCheckpoint
from skillsd.errors import ConfigError
from skillsd.files.run_folder import (
    RECORD_FILE,
    VALIDATIONS_FILE,
    RunRecord,
    check_format,
    checkpoint_folder,
    read_record,
    run_files,
    write_record,
)
from skillsd.files.run_lock import RunLock
from skillsd.files.run_start import Start, plan
from skillsd.skills import imported


class RunOwner:
    """Takes a run folder on rank 0, and gives it back at the block's end without a trace if no run has begun in it."""

    def __init__(self) -> None:
        self.locks: list[RunLock] = []
        self.folder = Path()
        self._made_record = False

    def __enter__(self) -> RunOwner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.locks:
            return
        with suppress(OSError):
            if self._made_record and not run_files(self.folder) and not (self.folder / VALIDATIONS_FILE).exists():
                (self.folder / RECORD_FILE).unlink()
        while self.locks:
            self.locks.pop().release()

    def take(self, trainer: L.Trainer, steal: bool) -> None:
        """Lock the folder and put it on record.

        Raises:
            ConfigError: It belongs to a process that runs, cannot be a run folder, or is of another format.
        """
        self.folder = folder = run_folder(trainer)
        self.locks.append(RunLock(folder, steal))
        check_format(folder)

    def record(self) -> None:
        """Make run.json before anything else is written: without it nothing in the folder is known to be a run's."""
        if read_record(self.folder) is None:
            write_record(self.folder, RunRecord())
            self._made_record = True

    def begin_fit(self, trainer: L.Trainer, ckpt_path: str | None, overwrite: bool, steal: bool, saver: RunCheckpoint | None) -> None:
        """The same for a fit; what is to be discarded goes when everything else has been checked.

        Args:
            trainer: Whose folder.
            ckpt_path, overwrite: See `plan`.
            steal: See `RunLock`.
            saver: What writes the run's checkpoints; None if nothing does.

        Raises:
            ConfigError: See `plan`.
        """
        self.take(trainer, steal)
        place = Path(saver.dirpath) if saver is not None and saver.dirpath else None
        start = plan(self.folder, ckpt_path, overwrite, imported, place)
        there = place or checkpoint_folder(self.folder, read_record(self.folder))
        if saver is not None and not there.resolve().is_relative_to(self.folder.resolve()):  # another run may write there, too
            self.locks.append(RunLock(there, steal, "checkpoint.dirpath"))
        start.saves = saver is not None and bool(saver.save_last)
        self.record()
        trainer.callbacks.insert(0, StartRun(start))  # type: ignore[attr-defined]


class StartRun(L.Callback):
    """Discards what is to be discarded: after the model is loaded, before the bank is opened."""

    def __init__(self, start: Start) -> None:
        self.start = start

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start.carry_out()


def run_folder(trainer: Any) -> Path:
    """Where the trainer writes.

    Raises:
        ConfigError: Lightning's loggers would write elsewhere, or among the run's own files.
    """
    given = str(trainer.default_root_dir)
    if os.path.expandvars(given) != given:
        raise ConfigError(f"trainer.default_root_dir: {given} names a variable, which is not put in place: write the path in full.")
    folder = Path(given)
    for logger in trainer.loggers:
        if logger.log_dir and os.path.realpath(logger.log_dir) == os.path.realpath(folder):
            raise ConfigError(f"trainer.logger: {type(logger).__name__} writes into the run folder itself: give it a name of its own.")
    return folder
