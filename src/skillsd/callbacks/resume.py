"""Checkpoints of a run: adapters, optimizer, loop position, bank cut-off, log lengths. One small file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint in the run folder: checkpoints/last.ckpt after every `every_n_train_steps` iterations.

    `--ckpt_path last` continues from it, or starts fresh where there is none.

    Args:
        every_n_train_steps: Iterations between two checkpoints.
        **kwargs: As for ModelCheckpoint.
    """

    def __init__(self, every_n_train_steps: int = 1, save_last: bool = True, save_top_k: int = 0, **kwargs: Any) -> None:
        super().__init__(
            every_n_train_steps=every_n_train_steps, save_last=save_last, save_top_k=save_top_k, enable_version_counter=False, **kwargs
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
