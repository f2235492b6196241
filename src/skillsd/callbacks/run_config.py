"""The run folder's configuration, written once everything has been checked."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from skillsd import parallel
from skillsd.files.durable import write
from skillsd.files.run_folder import COMMAND_KEYS, CONFIG_FILE


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved configuration to the run folder once everything has been checked."""

    def remember(self, trainer: L.Trainer) -> None:
        """Note what the run folder's loggers find there, before Lightning opens them."""
        folders = [Path(x.log_dir) for x in trainer.loggers if x.save_dir == str(trainer.default_root_dir) and x.log_dir]  # type: ignore[attr-defined]
        self.logs = {folder: {folder, *folder.rglob("*")} if folder.is_dir() else set() for folder in folders}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: bad input must leave nothing behind."""
        self.started = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Lightning opens its loggers before anything is checked: remove what they made."""
        if getattr(self, "started", False) or not parallel.is_rank_zero():
            return
        for logger in trainer.loggers:
            with suppress(Exception):  # TensorBoard writes later, and would miss its file
                logger.finalize("failed")
        for folder, found in self.logs.items():
            for path in sorted({folder, *folder.rglob("*")} - found, reverse=True):
                with suppress(OSError):
                    if path.is_dir():
                        path.rmdir()
                    elif path.name.startswith("events.out.tfevents.") or path.name == "hparams.yaml":
                        path.unlink()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not parallel.is_rank_zero():
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.started = True
        config = self.config.clone()  # given again, it must not discard this run, or take it from another process
        for key in COMMAND_KEYS:
            config.pop(key, None)
        write(folder / CONFIG_FILE, self.parser.dump(config, skip_unset=False))
