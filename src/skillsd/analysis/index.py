"""The lines of trajectories.jsonl: where each begins, and its numbers; tokens and texts stay on the disk."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from skillsd.errors import ConfigError
from skillsd.trajectory import Trajectory, outline

_TAIL = 64
"""So many of the last bytes that were read are kept, to see whether the file was cut back and written anew."""
MAX_LINE = 1 << 26
"""Longest line, in bytes; a trajectory of 100,000 tokens has a tenth of them."""


class Index:
    """The lines of a trajectories.jsonl, by number from 0.

    Args:
        path: The file; it may be missing, and grow.

    Attributes:
        rows: The `skillsd.trajectory.outline` of each line.
        starts: The first byte of each line, and at the end the first byte behind the last one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def __len__(self) -> int:
        return len(self.rows)

    def _forget(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.starts, self._tail = [0], b""

    def _opened(self) -> AbstractContextManager[BinaryIO | None]:
        """The open file; None if it is missing."""
        return self.path.open("rb") if self.path.is_file() else nullcontext()

    def _is_unchanged(self, f: BinaryIO | None) -> bool:
        """Return whether the file still begins with what was read of it."""
        if f is None:
            return not self.rows
        f.seek(self.starts[-1] - len(self._tail))
        return f.read(len(self._tail)) == self._tail

    def update(self) -> bool:
        """Read what was appended; all of it if a resumed run has cut the file back. A line without its end is still being written.

        Returns:
            True if anything has changed.

        Raises:
            ConfigError: a line is no trajectory.
        """
        n = len(self.rows)
        with self._opened() as f:
            cut = not self._is_unchanged(f)
            if cut:
                self._forget()
            if f is not None:
                f.seek(self.starts[-1])
                while line := f.readline(MAX_LINE + 1):
                    if not line.endswith(b"\n"):
                        if len(line) > MAX_LINE:
                            raise ConfigError(f"{self.path}:{len(self.rows) + 1}: the line has more than {MAX_LINE} bytes.")
                        break
                    try:
                        self.rows.append(outline(line))
                    except ValueError as e:
                        raise ConfigError(f"{self.path}:{len(self.rows) + 1}: {e}.") from e
                    self.starts.append(self.starts[-1] + len(line))
                    self._tail = (self._tail + line)[-_TAIL:]
        return cut or len(self.rows) != n

    def read(self, number: int) -> Trajectory:
        """One line, whole, checked against its CRC-32.

        Raises:
            IndexError: there is no such line.
            ConfigError: it is damaged, or the file was cut back since `update`.
        """
        if not 0 <= number < len(self.rows):
            raise IndexError(f"trajectory {number}: {self.path} has {len(self.rows)}")
        with self._opened() as f:
            if f is None or not self._is_unchanged(f):
                raise ConfigError(f"{self.path} was cut back since it was read, by a run that goes on: read it again (refresh).")
            f.seek(self.starts[number])
            line = f.read(self.starts[number + 1] - self.starts[number])
        try:
            return Trajectory.from_json(line.decode(errors="replace"))
        except ValueError as e:
            raise ConfigError(f"{self.path}:{number + 1}: {e}.") from e
