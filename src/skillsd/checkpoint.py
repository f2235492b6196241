"""Checkpoint files: the newest that is whole, and what is in it, read as data."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from skillsd.durable import DamagedError, check_archive
from skillsd.errors import ConfigError

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint that is whole.

    Raises:
        DamagedError: It is not what was written.
        UnpicklingError: It holds more than tensors and plain data.
    """
    data = path.read_bytes()
    try:
        check_archive(data, path)
    except DamagedError as e:
        raise DamagedError(f"ckpt_path: {e} Name another, or `last` for the newest of the run folder that is whole.") from e
    return dict(torch.load(BytesIO(data), map_location, weights_only=True))


def check_base(checkpoint: Mapping[str, Any], base: str) -> None:
    """Raises ConfigError for a checkpoint of another base model than `base`."""
    saved = checkpoint.get("skillsd", {}).get("base")
    if saved != base:
        raise ConfigError(
            f"ckpt_path: the checkpoint belongs to the base model [{saved}], this run has [{base}]: "
            "set model.init_args.policy to match, or start a new run folder."
        )


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is whole; None if there is none at all. Says which newer ones are not.

    Raises:
        DamagedError: There are some, and all are damaged.
    """
    damaged = []
    for path in sorted(folder.glob("*.ckpt"), key=lambda p: (-p.stat().st_mtime_ns, p.name)):
        try:
            check_archive(path.read_bytes(), path)
        except DamagedError as e:
            damaged.append(str(e))
            continue
        if damaged:
            print(f"{' '.join(damaged)} Going on from {path}.", file=sys.stderr, flush=True)
        return path
    if damaged:
        raise DamagedError(f"ckpt_path: {' '.join(damaged)} There is no other: restore one, or start anew with --overwrite=true.")
    return None
