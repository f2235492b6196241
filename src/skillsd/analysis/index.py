"""Where each line of trajectories.jsonl begins, and what it says beside its tokens and texts, which are passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skillsd.errors import ConfigError
from skillsd.trajectory import Trajectory, check_line

_PARTS = (b',"prompt_ids":[', b'],"token_ids":[', b'],"action_mask":[', b'],"logprobs":[', b'],"turns":[')
"""As `Trajectory.to_json` writes them. In a text the quotes would stand behind a backslash."""
_LAST = b'],"reward":'
_TAIL = 64
"""Bytes; what ends a file that was read before, to see whether it was cut back and written anew."""
COLUMNS = (
    "iteration", "task_id", "member", "seed", "reward", "completion", "success", "finish_reason", "skill_id", "failure",
    "n_turns", "prompt_tokens", "tokens", "action_tokens",
)  # fmt: skip


class Index:
    """The lines of a trajectories.jsonl, by number from 0.

    Args:
        path: The file; it may be missing, and grow.

    Attributes:
        rows: Of each line what COLUMNS name.
        starts: Of each line its first byte, and at the end the first byte behind the last one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def __len__(self) -> int:
        return len(self.rows)

    def _forget(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.starts, self._tail = [0], b""

    def update(self) -> bool:
        """Read what was appended; all of it if a resumed run has cut the file back. A line without its end is still being written.

        Returns:
            Whether anything has changed.

        Raises:
            ConfigError: a line is no trajectory.
        """
        if not self.path.is_file():
            changed = bool(self.rows)
            self._forget()
            return changed
        n = len(self.rows)
        with self.path.open("rb") as f:
            f.seek(max(0, self.starts[-1] - _TAIL))
            cut = f.read(len(self._tail)) != self._tail
            if cut:
                self._forget()
            f.seek(self.starts[-1])
            for line in f:
                if not line.endswith(b"\n"):
                    break
                try:
                    self.rows.append(_row(line))
                except ValueError as e:
                    raise ConfigError(f"{self.path}:{len(self.rows) + 1}: {e}.") from e
                self.starts.append(self.starts[-1] + len(line))
                self._tail = (self._tail + line)[-_TAIL:]
        return cut or len(self.rows) != n

    def read(self, number: int) -> Trajectory:
        """One line, whole, checked against its CRC-32.

        Raises:
            IndexError: there is no such line.
            ConfigError: it is damaged.
        """
        if not 0 <= number < len(self.rows):
            raise IndexError(f"trajectory {number}: {self.path} has {len(self.rows)}")
        with self.path.open("rb") as f:
            f.seek(self.starts[number])
            line = f.read(self.starts[number + 1] - self.starts[number])
        try:
            return Trajectory.from_json(line.decode(errors="replace"))
        except ValueError as e:
            raise ConfigError(f"{self.path}:{number + 1}: {e}.") from e


def _row(line: bytes) -> tuple[Any, ...]:
    check_line(line)
    at = [line.find(part) for part in _PARTS]
    last = line.rfind(_LAST)
    if -1 in at or last < at[-1] or at != sorted(at):  # another program has written it
        return _of(Trajectory.from_json(line.decode(errors="replace")))
    try:
        known = json.loads(line[: at[0]] + b"}") | json.loads(b"{" + line[last + 2 :])
        prompt, tokens = (line.count(b",", a + len(p), b) + (a + len(p) < b) for a, p, b in zip(at, _PARTS, at[1:3], strict=False))
        sampled, turns = line.count(b"true", at[2], at[3]), line.count(b'{"observation":', at[4], last)
        return (*(known[name] for name in COLUMNS[:10]), turns, prompt, tokens, sampled)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"the line is no trajectory ({e})") from e


def _of(t: Trajectory) -> tuple[Any, ...]:
    return (*(getattr(t, name) for name in COLUMNS[:10]), len(t.turns), len(t.prompt_ids), len(t.token_ids), t.n_actions)
