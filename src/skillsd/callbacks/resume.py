"""Checkpoints of a run: adapters, optimizer, loop position, bank cut-off, log lengths. One small file."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins.io import TorchCheckpointIO


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint in the run folder: checkpoints/last.ckpt after every `every_n_train_steps` iterations and the last one.

    `--ckpt_path last` continues from it, or starts fresh where there is none. Lightning calls it after all other callbacks.

    Args:
        every_n_train_steps: Iterations between two checkpoints.
        **kwargs: As for ModelCheckpoint.
    """

    def __init__(self, every_n_train_steps: int = 1, save_last: bool = True, save_top_k: int = 0, **kwargs: Any) -> None:
        super().__init__(
            every_n_train_steps=every_n_train_steps, save_last=save_last, save_top_k=save_top_k, enable_version_counter=False, **kwargs
        )

    def _place(self, trainer: L.Trainer) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        self._place(trainer)  # Lightning resolves `last` before it calls setup
        return super()._find_last_checkpoints(trainer)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._place(trainer)
        if stage == "fit":
            trainer.fit_loop.__class__ = _RunLoop
            trainer.strategy.checkpoint_io = _InPlace()
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Lightning's own hook would leave out the run's last iteration, and warns in manual optimisation.
        every = self._every_n_train_steps
        if trainer.global_step >= trainer.estimated_stepping_batches or (every and trainer.global_step % every == 0):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)  # where a callback stopped the run early

    def _save(self, trainer: L.Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):  # among others: this step is saved already
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._last_global_step_saved = checkpoint["global_step"]


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


class _InPlace(TorchCheckpointIO):
    """Writes beside the checkpoint, then renames. Lightning moves it from /tmp: if that is another disk, a kill cuts the copy short."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path, buffer = Path(path), BytesIO()
        torch.save(checkpoint, buffer)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
