"""The files of a run folder: whose they are when a run begins, and its configuration once everything has been checked."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from skillsd.durable import write
from skillsd.errors import ConfigError

RUN_FILES = (
    "config.yaml",
    "metrics.csv",
    "trajectories.jsonl",
    "panel.json",
    "panel.json.tmp",
    "bank.sqlite",
    "bank.sqlite-wal",
    "bank.sqlite-shm",
    "bank.sqlite.new",
)
RUN_FOLDERS = ("checkpoints", "adapter", "tensorboard")


def guard_run_folder(folder: Path, ckpt_path: str | None, overwrite: bool) -> None:
    """Refuse to fit into an earlier run's folder unless it is continued or discarded.

    With `--ckpt_path last` and no checkpoint yet, what a killed run left before its first one is discarded: it starts fresh.

    Raises:
        ConfigError: the folder holds a run.
    """
    # Checkpoints go first: one without its bank could not be continued.
    found = [folder / n for n in (*RUN_FOLDERS, *RUN_FILES) if (folder / n).exists()]
    fresh = ckpt_path == "last" and not any((folder / "checkpoints").glob("*.ckpt"))
    if not found or (ckpt_path is not None and not fresh and not overwrite):
        return
    if not overwrite and not fresh:
        raise ConfigError(
            f"trainer.default_root_dir: {folder} holds an earlier run: continue it with --ckpt_path last, "
            "discard it with --overwrite=true, or name another folder."
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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
        if getattr(self, "started", False):
            return
        for folder, found in self.logs.items():
            for path in sorted({folder, *folder.rglob("*")} - found, reverse=True):
                with suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
        with suppress(OSError):
            Path(trainer.default_root_dir).rmdir()  # if it is empty

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.started = True
        write(folder / "config.yaml", self.parser.dump(self.config, skip_unset=False).encode())
