"""Checkpoint files: what may be in one, the newest that is whole, and what is in it, read as data."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skillsd.errors import ConfigError
from skillsd.files.durable import DamagedError, check_archive
from skillsd.files.run_folder import CHECKPOINTS

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
MIDWAY = "midway"
"""Key of a checkpoint that was saved in the middle of an iteration: after its update, before its record."""
_PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), torch.Tensor, torch.nn.Parameter})
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set})


def plain(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint that `read_checkpoint` will read: NumPy's scalars of Python's precision are made Python's own.

    Raises:
        ConfigError: It holds something else that is neither a tensor nor plain data: the line names the callback, and the key in its
            state.
    """
    return {key: _plain(value, (str(key),)) for key, value in checkpoint.items()}


def _plain(x: Any, path: tuple[str, ...]) -> Any:
    kind = type(x)
    if kind in _PLAIN:
        return x
    if isinstance(x, np.float64 | np.integer | np.bool_ | np.str_):
        return x.item()
    if len(path) > 100:
        raise ConfigError(f"{_owner(path[:6])} is nested more than 100 levels deep, or in itself: save plain data.")
    if kind in (dict, OrderedDict):
        new = [(_plain(k, (*path, f"key {k!r}")), _plain(v, (*path, str(k)))) for k, v in x.items()]
        same = all(a is k and b is v for (a, b), (k, v) in zip(new, x.items(), strict=True))
        return x if same else kind(new)  # the same object keeps what else hangs on it, as a module's state does
    if kind in _CONTAINERS:
        items = [_plain(v, (*path, str(i))) for i, v in enumerate(x)]
        return x if all(a is b for a, b in zip(items, x, strict=True)) else kind(items)
    buffer = BytesIO()
    try:
        torch.save(x, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as e:
        cure = "a tensor or a list" if isinstance(x, np.ndarray) else "numbers, texts, lists, dictionaries or tensors"
        raise ConfigError(
            f"{_owner(path)} is a {kind.__module__}.{kind.__qualname__}, which no checkpoint can be read back with (weights_only): "
            f"save {cure} instead."
        ) from e
    return x


def _owner(path: tuple[str, ...]) -> str:
    if path[0] == "callbacks" and len(path) > 1:
        return f"trainer.callbacks: in the state of {path[1]}, {'.'.join(path[2:]) or 'all of it'}"
    return f"checkpoint: in the state saved as {path[0]}, {'.'.join(path[1:]) or 'all of it'}"


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint that is whole.

    Raises:
        DamagedError: It is not what was written.
        ConfigError: It is, but holds more than tensors and plain data, or is no checkpoint.
    """
    data = path.read_bytes()
    try:
        check_archive(data, path)
    except DamagedError as e:
        raise DamagedError(f"ckpt_path: {e} Name another, or `last` for the newest of the run folder that is whole.") from e
    try:
        return _read(BytesIO(data), map_location=map_location)
    except Exception as e:  # whatever torch says about a file that is whole
        raise ConfigError(f"ckpt_path: {path} {_why(e)} Name another.") from e


def _read(source: Any, **kwargs: Any) -> dict[str, Any]:
    found = torch.load(source, weights_only=True, **kwargs)
    lacking = [k for k in ("state_dict", "global_step") if not isinstance(found, dict) or k not in found]
    if lacking:
        raise ValueError(f"it has no {lacking[0]}")
    return dict(found)


def _why(e: Exception) -> str:
    if "Unsupported global: GLOBAL" in str(e):
        name = str(e).partition("GLOBAL ")[2].split()[0]
        return f"is whole, but holds a {name}, and only tensors and plain data are read (a checkpoint could run code)."
    return f"is whole, but no checkpoint of a run ({' '.join(str(e).split())[:200]})."


def step_of(path: Path) -> int | None:
    """The iteration after which a checkpoint was written, without reading its tensors; None if it cannot be read."""
    return _glance(path)[0]


def _glance(path: Path) -> tuple[int | None, bool]:
    """The iteration of a checkpoint, and whether it was saved in the middle of one; (None, False) if it cannot be read."""
    try:
        found = _read(str(path), mmap=True, map_location="cpu")
        return int(found["global_step"]), bool(found.get(MIDWAY))
    except Exception:
        return None, False


def check_base(checkpoint: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Compare the weights, by their digest, and the adapters' rank and scale. The model's name is for people.

    Args:
        checkpoint: What was read.
        base: `Policy.identity` of who is to go on with it.

    Raises:
        ConfigError: It belongs to another base or other adapters, or does not say to which.
    """
    saved = checkpoint.get("skillsd", {}).get("base")
    if not isinstance(saved, Mapping):
        raise ConfigError(
            "ckpt_path: the checkpoint does not say which weights it belongs to: an older skillsd made it: start a new run folder."
        )
    if saved["digest"] != base["digest"]:
        raise ConfigError(
            f"ckpt_path: the checkpoint belongs to other weights ({saved['model']}, {saved['digest']}) than model.policy.model has "
            f"({base['model']}, {base['digest']}): set model.policy.model to that base, wherever it is now, or start a new run folder."
        )
    for key in ("r", "alpha"):
        if saved[key] != base[key]:
            raise ConfigError(
                f"ckpt_path: the checkpoint has model.policy.lora.{key} {saved[key]}, here it is {base[key]}: set it as it was."
            )


def newest_good(folder: Path) -> Path | None:
    """The checkpoint of a folder with the highest iteration among those that are whole; None if there is none at all.

    What the files hold decides, not their times. Says which ones cannot be read, or were saved in the middle of an iteration.

    Raises:
        DamagedError: There are some, and none can be taken.
    """
    found = {path: _glance(path) for path in folder.glob("*.ckpt")}
    steps = {path: step for path, (step, _) in found.items()}
    bad: list[str] = []
    for path in sorted(steps, key=lambda p: (steps[p] is not None, -(steps[p] or 0), p.name)):
        try:
            check_archive(path.read_bytes(), path)
            if steps[path] is None:
                read_checkpoint(path)
        except ConfigError as e:
            bad.append(str(e).removeprefix("ckpt_path: ").removesuffix(" Name another."))
            continue
        if found[path][1]:
            bad.append(f"{path} was saved in the middle of an iteration.")
            continue
        if bad:
            print(f"{' '.join(bad)} Going on from {path}.", file=sys.stderr, flush=True)
        return path
    if bad:
        raise DamagedError(
            f"ckpt_path: {' '.join(bad)} There is no other: restore one, or start anew with --overwrite=true in place of --ckpt_path."
        )
    return None


def how_to_resume(trainer: Any) -> str:
    """Where a run that stops can be taken up, in words."""
    saver = trainer.checkpoint_callback
    path = Path((saver and saver.dirpath) or Path(trainer.default_root_dir) / CHECKPOINTS) / LAST
    return f"The last good checkpoint is {path} (--ckpt_path last)" if path.is_file() else "There is no checkpoint yet"
