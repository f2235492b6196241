"""Checkpoints of a run: adapters, optimizer, loop position, bank cut-off, log lengths. One small file."""

from __future__ import annotations

import sys
import threading
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins.io import TorchCheckpointIO

from skillsd import parallel
from skillsd.callbacks.log import check_recorded
from skillsd.errors import ConfigError
from skillsd.files.checkpoint import LAST, MIDWAY, PREVIOUS, newest_good, plain, read_checkpoint, step_of
from skillsd.files.continuation import describe_changes, settings
from skillsd.files.durable import seal, write
from skillsd.files.run_folder import CHECKPOINTS, note_checkpoint

_ITERATIONS = "set checkpoint.every_n_train_steps, in iterations"
REFUSED = {
    "save_weights_only": "the run could not go on from such a checkpoint: `skillsd export` writes the student alone",
    "every_n_epochs": _ITERATIONS,
    "train_time_interval": _ITERATIONS,
}
"""Settings of ModelCheckpoint that a run does not take, and what there is in their place."""


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint in the run folder: checkpoints/last.ckpt after every `every_n_train_steps` iterations and the last one.

    The one before stays as previous.ckpt. `--ckpt_path last` continues from the newest that is not damaged, or starts fresh where there is
    none. After an error, Ctrl-C or SIGTERM the last finished iteration is written, whatever `every_n_train_steps` is: until then it is kept
    in memory. Lightning calls this callback after all others.

    Args:
        every_n_train_steps: Iterations between two checkpoints.
        **kwargs: As for ModelCheckpoint, without those in REFUSED.
    """

    def __init__(self, every_n_train_steps: int = 1, save_last: bool = True, save_top_k: int = 0, **kwargs: Any) -> None:
        for name, cure in REFUSED.items():
            if kwargs.get(name):
                raise ConfigError(f"checkpoint.{name}: not for skillsd: {cure}.")
        super().__init__(
            every_n_train_steps=every_n_train_steps, save_last=save_last, save_top_k=save_top_k, enable_version_counter=False, **kwargs
        )
        self._io = CheckpointFiles()
        self._recorded = 0  # the iteration up to which every callback has had its turn

    def _set_dirpath(self, trainer: L.Trainer) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / CHECKPOINTS)

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        self._set_dirpath(trainer)  # Lightning resolves `last` before it calls setup
        found = newest_good(Path(str(self.dirpath)))
        return {str(found)} if found else set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._set_dirpath(trainer)
        trainer.strategy.checkpoint_io = self._io
        self._io.run_folder, self._io.place = Path(trainer.default_root_dir), Path(str(self.dirpath))
        if stage == "fit":
            self._recorded = 0
            trainer.fit_loop.__class__ = _RunLoop
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Lightning's own hook would leave out the run's last iteration, and warns in manual optimisation.
        self._recorded = trainer.global_step
        every = self._every_n_train_steps
        if trainer.global_step >= trainer.estimated_stepping_batches or (every and trainer.global_step % every == 0):
            self._save(trainer)
        elif self.save_last and parallel.is_rank_zero():
            self._io.hold(trainer._checkpoint_connector.dump_checkpoint(False), Path(str(self.dirpath)) / LAST)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)  # where a callback stopped the run early

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the last finished iteration; after an interruption say how to go on."""
        self.rescue()
        if isinstance(exception, KeyboardInterrupt) and parallel.is_rank_zero():
            last = Path(str(self.dirpath)) / LAST
            there = f"{last} holds the last finished iteration: go on with the same command and --ckpt_path last"
            print(f"\nstopped; {there if last.is_file() else 'no iteration was finished'}.", file=sys.stderr, flush=True)

    def rescue(self) -> None:
        """Write the last finished iteration if it is in memory alone. From any thread: the main one may wait for a rank that is gone."""
        try:
            self._io.flush()
        except OSError as e:
            before = (Path(str(self.dirpath)) / LAST).is_file()
            print(f"the last iteration could not be saved ({e}){'; the checkpoint before it is in place' * before}.", file=sys.stderr)

    def _save(self, trainer: L.Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):  # among others: this step is saved already
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = self._settings(trainer)
        if trainer.global_step != self._recorded:
            checkpoint[MIDWAY] = True

    def _settings(self, trainer: L.Trainer) -> dict[str, str]:
        return settings(getattr(trainer, "skillsd_config", {}), str(trainer.default_root_dir))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say which settings are no longer the run's: its record is of both.

        Raises:
            ConfigError: Lightning knows a data module's state by its class, and the run had another class; `log.enabled` is not as it
                was; `trainer.max_epochs` is behind the checkpoint; or it was saved in the middle of an iteration.
        """
        if trainer.state.fn == "fit":
            if checkpoint.get(MIDWAY):
                raise ConfigError(
                    "ckpt_path: it was saved in the middle of an iteration, whose record would be missing (by trainer.save_checkpoint in a "
                    "callback, or a ModelCheckpoint with save_on_exception): name another, or `last`."
                )
            check_recorded(trainer, checkpoint)
            if 0 <= (-1 if trainer.max_epochs is None else trainer.max_epochs) < checkpoint["epoch"]:
                raise ConfigError(
                    f"trainer.max_epochs: it is {trainer.max_epochs}, and the run has gone through {checkpoint['epoch']}: set it to "
                    f"{checkpoint['epoch']} or more."
                )
            name = type(trainer.datamodule).__qualname__  # type: ignore[attr-defined]
            others = [k for k, state in checkpoint.items() if isinstance(state, dict) and "episodes" in state]
            if others and name not in others:
                raise ConfigError(
                    f"ckpt_path: the checkpoint's run had the data module {others[0]}, and here it is {name}: take it as it was."
                )
            if said := describe_changes(checkpoint.get("settings", {}), self._settings(trainer)):
                parallel.print_rank_zero(said)
        self._last_global_step_saved = self._recorded = checkpoint["global_step"]


class _RunLoop(_FitLoop):
    """Lightning's loop with two corrections for runs that go on from a checkpoint of on_train_batch_end."""

    @property
    def skip(self) -> bool:
        # Without on_train_end, a run killed in its last panel would never play it.
        return super().skip and not (self.is_resuming and self.max_batches and self.trainer.limit_train_batches)

    def reset(self) -> None:
        super().reset()
        epochs: Any = self.epoch_progress.current
        if self.restarted_mid_epoch and epochs.processed == epochs.started:
            self.reset_restart_stage()  # it was the epoch's last batch: the next epoch begins anew, and is counted


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints with a checksum, written beside the old one and renamed. Reading runs no code of theirs (`weights_only`)."""

    def __init__(self) -> None:
        super().__init__()
        self.unwritten: tuple[Path, memoryview] | None = None
        self.writing = threading.RLock()
        self.run_folder: Path | None = None  # whose record says that a checkpoint was written
        self.place: Path | None = None  # the run's own checkpoints: what other callbacks save elsewhere is not what `last` is to find
        self.good: set[Path] = set()  # written or read here: a damaged one does not replace the one before it
        self.begun_at: int | None = None  # the iteration of what was read, until something is written

    def hold(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Keep a checkpoint in memory, for `flush`. Raises ConfigError for one that could not be read back."""
        buffer = BytesIO()
        torch.save(plain(checkpoint), buffer)
        data = seal(buffer)
        with self.writing:
            self.unwritten = path, data

    def flush(self) -> None:
        """Write what is held, or was being written when an exception came."""
        with self.writing:
            if self.unwritten is not None:
                path, data = self.unwritten
                self._set_aside(path)
                keep = path.with_name(PREVIOUS) if path.name == LAST and path in self.good else None
                write(path, data, keep, commit=partial(self._note, path.parent))
                self.unwritten = None
                self.good.add(path)

    def _note(self, folder: Path) -> None:
        if self.run_folder is not None and folder == self.place:
            note_checkpoint(self.run_folder, folder)

    def _set_aside(self, path: Path) -> None:
        """A run that goes on from an older checkpoint by name leaves the newer ones behind: they are not what `last` is to find."""
        if self.begun_at is not None:
            for other in path.parent.glob("*.ckpt"):
                if other != path and (step_of(other) or 0) > self.begun_at:
                    aside = other.replace(other.with_name(f"{other.name}.abandoned"))
                    print(f"{other} is of iterations that are played anew: it is {aside.name} now.", file=sys.stderr, flush=True)
        self.begun_at = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.hold(checkpoint, Path(path))
        self.flush()

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        checkpoint = read_checkpoint(Path(path), map_location)
        self.good.add(Path(path))
        self.begun_at = int(checkpoint["global_step"])
        return checkpoint
