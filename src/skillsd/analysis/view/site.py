"""The runs that are shown: read again when their files have changed, one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

from skillsd.analysis.pictures import Pictures
from skillsd.analysis.run import Run
from skillsd.errors import ConfigError, causes
from skillsd.files.run_folder import CHECKPOINTS, FILES, VALIDATIONS_FILE

if TYPE_CHECKING:
    from skillsd.analysis.score import Scorer

T = TypeVar("T")

WATCHED = (*FILES, VALIDATIONS_FILE)
"""Files whose change is a change of the run."""


class OpenRun:
    """A run that is shown, with its environment, which draws observations, and its model, which scores tokens.

    Attributes:
        name: The run's name in addresses.
        lock: Held while its frames are read.
        stamp: Changes when a file of the run has changed.
    """

    def __init__(self, name: str, folder: Path, device: str, lock: AbstractContextManager[Any]) -> None:
        self.name, self.run, self.device = name, Run(folder), device
        self.lock, self._scoring = lock, RLock()
        self.stamp, self._made = "", dict[Any, Any]()
        self._scorer: Scorer | None = None
        self._checkpoint: Any = None  # what it was loaded from
        self._scores: dict[Any, Any] = {}
        self.pictures = Pictures(self.run)

    def update(self) -> str:
        """Forget what was read of files that have changed, and return the new stamp. Raises ConfigError if no file is left."""
        stamps = []
        for name in WATCHED:
            if name.endswith("-shm"):  # readers write into it
                continue
            try:
                s = (self.run.folder / name).stat()
                stamps.append(f"{s.st_mtime_ns:x}.{s.st_size:x}")
            except OSError:
                stamps.append("")
        if not any(stamps):
            raise ConfigError(f"{self.run.folder} is gone, or holds no run any more.")
        with self.lock:
            if (stamp := "-".join(stamps)) != self.stamp:
                self.run.refresh()
                self.stamp = stamp
            return stamp

    def written(self) -> str:
        """When a file was written last, in local time."""
        times = [path.stat().st_mtime for name in WATCHED if not name.endswith("-shm") and (path := self.run.folder / name).exists()]
        return f"{datetime.fromtimestamp(max(times)):%Y-%m-%d %H:%M:%S}" if times else ""

    def once(self, key: Any, make: Callable[[], T], version: Any = None) -> T:
        """The result of `make`, kept until a file changes or another `version` is asked for."""
        version = self.stamp if version is None else version
        with self.lock:
            if key not in self._made or self._made[key][0] != version:
                self._made[key] = version, make()
            found: T = self._made[key][1]
            return found

    def scored(self, key: Any, ask: Callable[[Scorer], T]) -> T:
        """The result of `ask` for the run's newest checkpoint, kept by `key` until there is a newer one.

        Other pages do not wait for it: the model has a Run of its own.

        Raises:
            ConfigError: there is no checkpoint yet, or its model cannot be had here.
        """
        import torch  # late: pages that score no tokens need no model, and are there at once

        from skillsd.analysis.score import Scorer
        from skillsd.files.checkpoint import newest_good

        with self._scoring:
            path = newest_good(self.run.folder / CHECKPOINTS)
            checkpoint = path and (path, path.stat().st_mtime_ns)
            if self._scorer is None or checkpoint != self._checkpoint:
                self._scorer = None  # its memory is needed
                try:
                    self._scorer = Scorer(Run(self.run.folder), path, torch.device(self.device))
                except RuntimeError as e:  # of a device that is not there, or too small
                    raise ConfigError(f"the model cannot be loaded on --device {self.device}: {causes(e)}") from e
                self._checkpoint = checkpoint
                self._scores.clear()
            if key not in self._scores:
                self._scorer.run.refresh()
                self._scores[key] = ask(self._scorer)
            return self._scores[key]


class Site:
    """The runs, by name.

    Args:
        folders: Their folders; of those with one name the later ones get a number.
        device: Where tokens are scored.

    Raises:
        ConfigError: one is no run folder.
    """

    def __init__(self, folders: Sequence[str | Path], device: str = "cpu") -> None:
        self.runs: dict[str, OpenRun] = {}
        lock = RLock()  # one for all: a page may show two of them
        for folder in map(Path, folders):
            base = name = folder.resolve().name or "run"
            count = 1
            while name in self.runs:
                count += 1
                name = f"{base}-{count}"
            self.runs[name] = OpenRun(name, folder, device, lock)

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self.runs.values():
            opened.pictures.close()
