"""Adapters as they were once, in folders that others read."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from skillsd.engines.engine import Version
from skillsd.files.durable import new_folder
from skillsd.policy import Policy


class Versions:
    """Writes an adapter when it has changed.

    Args:
        policy: Whose.
        folder: Where; None is a temporary folder.
        run: Which run's. Another run on the same folder and servers has another, and removes its own versions only.
        staleness: Updates that a rollout may lag behind. So many versions of an adapter stay, though nobody here holds them: ranks meet
            once an iteration, so when one has a new version, the slowest may still play with the one of `staleness` updates before.
    """

    def __init__(self, policy: Policy, folder: str | None, run: str = "", staleness: int = 0) -> None:
        self.policy, self.run = policy, run
        self._temporary = tempfile.TemporaryDirectory(prefix="skillsd-adapters-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary is not None else str(folder)).expanduser().absolute()
        self._states: dict[str, Any] = {}
        self._recent: defaultdict[str, deque[Version]] = defaultdict(lambda: deque(maxlen=staleness + 1))
        self._written: dict[str, Path] = {}
        self._used: WeakSet[Version] = WeakSet()

    def now(self, adapter: str) -> tuple[Version, list[str]]:
        """An adapter as it is now; and if that is new, the names of those that no rank plays with any more. Raises OSError."""
        # Some optimizers do not count what they do to a tensor, and some hands do not call `student_changed`.
        now = self.policy.updates[adapter], tuple((p.data_ptr(), p._version) for p in self.policy.adapter(adapter).values())
        recent = self._recent[adapter]
        if recent and self._states[adapter] == now:
            return recent[-1], []
        version = self._write(adapter)
        self._states[adapter] = now
        if not recent or recent[-1] is not version:
            recent.append(version)
        used = {v.name for v in self._used}
        return version, [name for name in self._written if name not in used]

    def _write(self, adapter: str) -> Version:
        digest = blake2b(f"{self.run}\n{self.policy.base_name}".encode(), digest_size=10)
        for k, p in sorted(self.policy.adapter(adapter).items()):
            digest.update(k.encode())
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        name = f"skillsd-{digest.hexdigest()}"
        folder = self.folder / name
        if not folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with new_folder(folder) as work:
                    self.policy.save_adapter(work, adapter)
            except OSError:
                if not folder.is_dir():  # or another rank was faster
                    raise
        self._written[name] = folder
        version = next((v for v in self._used if v.name == name), None) or Version(name, folder / adapter)
        self._used.add(version)
        return version

    def remove(self, names: Iterable[str]) -> None:
        """From the disk."""
        for name in names:
            shutil.rmtree(self._written.pop(name), ignore_errors=True)

    def close(self) -> list[str]:
        """It is not used again: the names of what is there, to be removed."""
        self._recent.clear()
        return list(self._written)

    def cleanup(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
