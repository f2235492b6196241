"""A run folder: the names of its files, whose they are when a run begins, and the panel's results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from skillsd.errors import ConfigError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
TRAJECTORIES_FILE = "trajectories.jsonl"
PANEL_FILE = "panel.json"
BANK_FILE = "bank.sqlite"
FILES = (
    CONFIG_FILE,
    METRICS_FILE,
    TRAJECTORIES_FILE,
    PANEL_FILE,
    f"{PANEL_FILE}.tmp",
    BANK_FILE,
    *(f"{BANK_FILE}{end}" for end in ("-wal", "-shm", ".new")),
)
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
FOLDERS = (CHECKPOINTS, ADAPTER, "tensorboard")


def guard_run_folder(folder: Path, ckpt_path: str | None, overwrite: bool) -> None:
    """Refuse to fit into an earlier run's folder unless it is continued or discarded.

    With `--ckpt_path last` and no checkpoint yet, what a killed run left before its first one is discarded: it starts fresh.

    Raises:
        ConfigError: the folder holds a run.
    """
    # Checkpoints go first: one without its bank could not be continued.
    found = [folder / n for n in (*FOLDERS, *FILES) if (folder / n).exists()]
    fresh = ckpt_path == "last" and not any((folder / CHECKPOINTS).glob("*.ckpt"))
    if not found or (ckpt_path is not None and not fresh and not overwrite):
        return
    if not overwrite and not fresh:
        raise ConfigError(
            f"trainer.default_root_dir: {folder} holds an earlier run: continue it with --ckpt_path last, "
            "discard it with --overwrite=true, or name another folder."
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_panel(folder: str | Path) -> dict[str, Any]:
    """panel.json of a run folder; empty if there is none.

    Raises:
        ConfigError: It is damaged.
    """
    path = Path(folder) / PANEL_FILE
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError) as e:
        raise ConfigError(f"trainer.default_root_dir: {path} is damaged ({e}): move it away, or name another folder.") from e
