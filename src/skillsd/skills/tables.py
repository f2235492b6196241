"""The tables of a bank's file.

    head    one row: what a mean reward means in this bank, and how many events it has
    event   the log: what happened, and how many skills, tasks and uses there were after it
    skill   the texts and the source of every skill that was ever inserted
    state   how the skills stand now, as JSON: one row for all live skills of a task, and one for each evicted skill

Every row ends with a checksum of its values. All live skills of a task share one row, so none of them can be missing from a row whose
checksum is right.
"""

from __future__ import annotations

import zlib
from typing import Any, Literal, NamedTuple

ValueEstimate = Literal["source", "next_visit", "gap"]
Eviction = Literal["worst", "oldest"]
Kind = Literal["insert", "merge", "use", "evict"]

BEFORE = -1
"""The iteration of what a bank holds before its run begins: skills that were imported."""

SCHEMA = (
    """CREATE TABLE head (
    one INTEGER PRIMARY KEY CHECK (one = 1), value_estimate TEXT NOT NULL, events INTEGER NOT NULL, checksum INTEGER NOT NULL)""",
    """CREATE TABLE event (
    seq INTEGER PRIMARY KEY, iteration INTEGER NOT NULL, kind TEXT NOT NULL, skill_id INTEGER NOT NULL, reward REAL, gap REAL,
    total_before REAL, skills INTEGER NOT NULL, live INTEGER NOT NULL, tasks INTEGER NOT NULL, uses INTEGER NOT NULL,
    merged INTEGER NOT NULL, checksum INTEGER NOT NULL)""",
    """CREATE TABLE skill (
    success_analysis TEXT NOT NULL, mistake_analysis TEXT NOT NULL, golden_workflow TEXT NOT NULL, task_id TEXT NOT NULL,
    skill_id INTEGER PRIMARY KEY, source_iteration INTEGER NOT NULL, source_member INTEGER NOT NULL, source_reward REAL NOT NULL,
    source_completion REAL NOT NULL, checksum INTEGER NOT NULL)""",
    """CREATE TABLE state (
    evicted INTEGER NOT NULL, task_id TEXT NOT NULL, skills TEXT NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (evicted, task_id)) WITHOUT ROWID""",
)
"""In `skill` the columns are in the order of `Skill`, in `event` in that of `Event`. In `state`, `evicted` is 0 for the live skills of a
task, else the id of the evicted skill; `skills` is a list of `State`."""


class Event(NamedTuple):
    """One row of the log, and counts that hold after it."""

    seq: int  # position in the log, from 1 without holes
    iteration: int  # during which it happened, or BEFORE; never decreases along the log
    kind: Kind  # insert a new skill, merge a duplicate into one, use one, evict one
    skill_id: int
    reward: float | None  # of a use: mean reward of the group, if given
    gap: float | None  # of a use: outcome-aligned gap in nats, if given
    total_before: float | None  # of a use: the skill's State.total before it, to which `cut` goes back
    skills: int  # skills that were ever inserted
    live: int  # skills that are held
    tasks: int  # tasks that have a live skill
    uses: int  # uses of all live skills together
    merged: int  # duplicates that were ever merged


NO_EVENT = Event(0, BEFORE, "insert", 0, None, None, None, 0, 0, 0, 0, 0)
"""What stands before the first event."""


class State(NamedTuple):
    """How a skill stands now."""

    skill_id: int
    digest: str  # hash of its texts: equal for duplicates
    source_iteration: int
    source_reward: float
    uses: int
    total: float  # sum of the values of its uses; 0 if the value estimate is `source`
    mean_reward: float  # the value estimate itself, see SkillBank
    sources: int  # trajectories that gave exactly these texts


def checksum(values: tuple[Any, ...]) -> int:
    """CRC-32 of a row's values; the same in every Python, as `ascii` writes floats exactly and escapes all other letters."""
    return zlib.crc32(ascii(tuple(values)).encode())
