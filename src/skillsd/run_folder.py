"""A run folder: the names of its files, and the panel's results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skillsd.errors import ConfigError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
TRAJECTORIES_FILE = "trajectories.jsonl"
PANEL_FILE = "panel.json"
VALIDATIONS_FILE = "validations.jsonl"
"""What `skillsd validate` has measured, a line each. It is not among FILES: a folder that holds nothing else holds no run."""
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


def read_validations(folder: str | Path) -> list[dict[str, Any]]:
    """The records of validations.jsonl, the oldest first; empty if there is none.

    Raises:
        ConfigError: It is damaged.
    """
    path = Path(folder) / VALIDATIONS_FILE
    try:
        return [dict(json.loads(line)) for line in path.read_bytes().splitlines()] if path.is_file() else []
    except (ValueError, TypeError, RecursionError) as e:
        raise ConfigError(f"trainer.default_root_dir: {path} is damaged ({e}): move it away, or name another folder.") from e


def read_results(folder: str | Path) -> dict[str, Any]:
    """What panel.json holds, and under `validations` the records of validations.jsonl if there are any.

    Raises:
        ConfigError: One of them is damaged.
    """
    validations = read_validations(folder)
    return read_panel(folder) | ({"validations": validations} if validations else {})
