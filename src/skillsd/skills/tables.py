"""The tables of the bank's file, and rows that are checked whenever they are read.

    setting  the booking
    event    what happened: the truth, appended to and cut, nothing else
    skill    texts and source of every skill ever inserted
    state    how each skill stands now; the live ones of a task lie side by side
    task     for each task with live skills, how many there are and what the checks of their `state` rows add up to
    tally    one row: the length of the log, counts over all of it, and what the checks of the `task` rows add up to

Each row ends with a CRC-32 of its values, so that a changed row is seen; a lost or a doubled one is seen by the counts and sums.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import nan
from typing import Any, Literal, NamedTuple

from skillsd.skills.skill import FIELDS

Booking = Literal["source", "next_visit", "gap"]
Drop = Literal["worst", "oldest"]
Kind = Literal["insert", "merge", "use", "drop"]

BEFORE = -1
"""The iteration of what a bank holds before its run begins: skills that were imported."""

SCHEMA = (
    "CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE skill (
    skill_id INTEGER PRIMARY KEY, task_id TEXT NOT NULL,
    success_analysis TEXT NOT NULL, mistake_analysis TEXT NOT NULL, golden_workflow TEXT NOT NULL,
    source_iteration INTEGER NOT NULL, source_member INTEGER NOT NULL, source_reward REAL NOT NULL, source_completion REAL NOT NULL,
    crc INTEGER NOT NULL)""",
    """CREATE TABLE event (
    seq INTEGER PRIMARY KEY, iteration INTEGER NOT NULL, kind TEXT NOT NULL, skill_id INTEGER NOT NULL, reward REAL, gap REAL,
    total_before REAL, crc INTEGER NOT NULL)""",
    """CREATE TABLE state (
    task_id TEXT NOT NULL, dropped INTEGER NOT NULL, digest INTEGER NOT NULL, skill_id INTEGER NOT NULL,
    source_iteration INTEGER NOT NULL, source_reward REAL NOT NULL,
    uses INTEGER NOT NULL, total REAL NOT NULL, mean_reward REAL NOT NULL, sources INTEGER NOT NULL, crc INTEGER NOT NULL,
    PRIMARY KEY (task_id, dropped, digest, skill_id)) WITHOUT ROWID""",
    """CREATE TABLE task (
    task_id TEXT PRIMARY KEY, live INTEGER NOT NULL, crc_sum INTEGER NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE tally (
    one INTEGER PRIMARY KEY CHECK (one = 1), seq INTEGER NOT NULL, iteration INTEGER NOT NULL, skills INTEGER NOT NULL,
    live INTEGER NOT NULL, uses INTEGER NOT NULL, tasks INTEGER NOT NULL, merged INTEGER NOT NULL, dropped INTEGER NOT NULL,
    crc_sum INTEGER NOT NULL, crc INTEGER NOT NULL)""",
)


_OTHER_TYPE = (struct.error, TypeError, OverflowError)


class Damaged(ValueError):
    """The rows are not those that were written."""


class Event(NamedTuple):
    """One line of the log.

    Args:
        kind: `insert` a new skill, `merge` a duplicate into one, `use` it, `drop` it.
        seq: Position in the log, from 1 without holes.
        iteration: Iteration during which it happened, or `BEFORE`; never decreases along the log.
        skill_id: The skill.
        reward: Of a use: mean reward of the group, if given.
        gap: Of a use: outcome-aligned gap, if given.
        total_before: Of a use: what the skill's booked values added up to before it.
    """

    kind: Kind
    seq: int
    iteration: int
    skill_id: int
    reward: float | None = None
    gap: float | None = None
    total_before: float | None = None


class State(NamedTuple):
    """How a skill stands; `digest` is of its texts, `total` the sum of what was booked for its uses."""

    task_id: str
    dropped: int
    digest: int
    skill_id: int
    source_iteration: int
    source_reward: float
    uses: int
    total: float
    mean_reward: float
    sources: int


@dataclass
class Tally:
    """Counts after the last event: `skills` and `merged`, `dropped` ever, `live` skills, their `uses` and `tasks` now."""

    seq: int
    iteration: int
    skills: int
    live: int
    uses: int
    tasks: int
    merged: int
    dropped: int
    crc_sum: int

    @property
    def earliest(self) -> int:
        """The earliest iteration that the next event may be of."""
        return self.iteration if self.seq else BEFORE


class Table:
    """Rows of texts, then numbers, then their CRC-32. `kinds`: of each number, in the letters of `struct`."""

    def __init__(self, name: str, texts: Sequence[str], numbers: Sequence[str], kinds: str, key: str) -> None:
        self.n_texts, self._pack = len(texts), struct.Struct("<" + kinds).pack
        columns = [*texts, *numbers, "crc"]
        self.select = f"SELECT {', '.join(columns)} FROM {name}"
        self.replace = f"REPLACE INTO {name} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
        self.insert = self.replace.replace("REPLACE", "INSERT", 1)
        self.delete = f"DELETE FROM {name} WHERE {key}"
        self.name = name

    def crc(self, row: Sequence[Any]) -> int:
        """Of the values of a row, without its own."""
        numbers = row[self.n_texts :]
        if None in numbers:
            numbers = [nan if value is None else value for value in numbers]
        return zlib.crc32(self._pack(*numbers), zlib.crc32("\0".join(row[: self.n_texts]).encode()))

    def checked(self, row: Any) -> Any:
        """The row without its CRC. Raises Damaged if it does not fit, or there is no row."""
        if row is None:
            raise Damaged(f"a row of its table {self.name!r} is missing")
        try:
            if self.crc(row[:-1]) == row[-1]:
                return row[:-1]
        except _OTHER_TYPE:
            pass
        raise Damaged(f"a row of its table {self.name!r} is not what was written")

    def all_checked(self, rows: Sequence[Any], text: str) -> list[Any]:
        """The same of many rows whose one text is `text`, in half the time."""
        pack, crc32, start = self._pack, zlib.crc32, zlib.crc32(text.encode())
        try:
            if all(crc32(pack(*row[1:-1]), start) == row[-1] for row in rows):
                return [row[:-1] for row in rows]
        except _OTHER_TYPE:
            pass
        raise Damaged(f"a row of its table {self.name!r} is not what was written")


SKILL = Table(
    "skill", ("task_id", *FIELDS), ("skill_id", "source_iteration", "source_member", "source_reward", "source_completion"), "qqqdd",
    key="skill_id = ?",
)  # fmt: skip
EVENT = Table("event", ("kind",), Event._fields[1:], "qqqddd", key="seq = ?")
STATE = Table("state", ("task_id",), State._fields[1:], "qqqqdqddq", key="task_id = ? AND dropped = ? AND digest = ? AND skill_id = ?")
TASK = Table("task", ("task_id",), ("live", "crc_sum"), "qq", key="task_id = ?")
TALLY = Table("tally", (), ("one", *(f.name for f in fields(Tally))), "q" * 10, key="one = 1")
