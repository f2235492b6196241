"""The skill bank: an append-only log of events in SQLite, the state derived from it in memory.

The log holds every insert, merge, use and drop with its iteration. State is a function of the log, so rewinding (`cut`) is forgetting
its tail: dropped skills come back, ids are given again, sums are summed again in the same order.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import get_args

from skillsd.skills import bank_file
from skillsd.skills.ledger import Booking, Drop, Event, Ledger
from skillsd.skills.retrieval import SQRT2, Untried, select
from skillsd.skills.skill import Skill


class SkillBank:
    """Skills per task, on disk or in memory. One connection, one thread, one writing process.

    Args:
        path: The SQLite file, by custom `bank.sqlite`; made with its folder if missing. None: in memory.
        capacity: Most skills a task keeps (>= 1); None: no limit, in which case never-used skills crowd out UCB.
        drop: Which skill goes when a task is over capacity, the newcomer included. `worst`: lowest mean reward, of equals the oldest.
            `oldest`: lowest id.
        booking: What a skill's mean reward is. `source`: reward of the trajectory it was made from. `next_visit`: mean over its uses of
            `reward`, until the first use the source's reward. `gap`: mean over its uses of `gap`, until the first use 0.
        read_only: Open an existing bank to look at it, also while a run writes to it: a snapshot, with the booking stored in it.

    Raises:
        ValueError: A setting is out of range, the file is not a usable bank (it is left as it is), or it was booked differently.
        OSError: The file cannot be opened, is locked or the disk is full.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        capacity: int | None = 8,
        drop: Drop = "worst",
        booking: Booking = "source",
        read_only: bool = False,
    ) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be >= 1 or None, got {capacity}")
        if drop not in get_args(Drop):
            raise ValueError(f"drop must be one of {get_args(Drop)}, got {drop!r}")
        if booking not in get_args(Booking):
            raise ValueError(f"booking must be one of {get_args(Booking)}, got {booking!r}")
        self.path = None if path is None else Path(path)
        self.capacity = capacity
        self.drop = drop
        self._db = bank_file.connect(self.path, booking, read_only)
        try:
            self._ledger = self._load()
            if not read_only and self._ledger.booking != booking:
                raise ValueError(
                    f"{self.path}: its mean rewards are booked as {self._ledger.booking!r}, not {booking!r}: "
                    f"set booking to {self._ledger.booking!r} or choose another path"
                )
        except BaseException:
            self._db.close()
            raise

    # Reading

    @property
    def booking(self) -> Booking:
        """What a mean reward means here."""
        return self._ledger.booking

    @property
    def position(self) -> int:
        """Number of events so far. Put it in a checkpoint and give it to `cut` as `expect`."""
        return self._ledger.seq

    def __len__(self) -> int:
        return len(self._ledger.skills) - self._ledger.dropped

    def tasks(self) -> list[str]:
        """Ids of the tasks that have a skill, sorted."""
        return self._ledger.tasks()

    def skills(self, task_id: str) -> list[Skill]:
        """The task's skills by id; empty if it has none."""
        return self._ledger.live(task_id)

    def get(self, skill_id: int) -> Skill:
        """A skill by id, also one that was dropped since. Raises KeyError if there never was one."""
        return self._ledger.skills[skill_id]

    def retrieve(self, task_id: str, c: float = SQRT2, untried: Untried = "first") -> Skill | None:
        """The skill to use next (`retrieval.select`), or None if the task has none. Does not count as a use."""
        return select(self.skills(task_id), c, untried)

    def stats(self) -> dict[str, float]:
        """Numbers to log: skills held (`size`), tasks that have one (`tasks`), `mean_uses` of those held, `merged` and `dropped` so far."""
        live = [skill for task_id in self.tasks() for skill in self.skills(task_id)]
        return {
            "size": float(len(live)),
            "tasks": float(len(self.tasks())),
            "mean_uses": sum(skill.uses for skill in live) / len(live) if live else 0.0,
            "merged": float(self._ledger.merged),
            "dropped": float(self._ledger.dropped),
        }

    # Writing

    def insert(self, skills: Sequence[Skill], iteration: int) -> list[int]:
        """Adds skills in the given order, all or none, and drops what exceeds the capacity.

        Args:
            skills: With `task_id` and source set. One whose texts its task already holds only adds to that skill's `sources`.
            iteration: The iteration that is under way, which may be later than the source's.

        Returns:
            One id per skill; of a duplicate, the skill it was merged into. A newcomer may have been dropped at once.

        Raises:
            ValueError: A skill has no task or a reward that is not finite, or `iteration` lies before the last event.
            OSError: It could not be written; the bank is as before.
        """
        for skill in skills:
            if not skill.task_id:
                raise ValueError("a skill needs a task_id: make it with Skill.of(trajectory)")
            _finite(source_reward=skill.source_reward, source_completion=skill.source_completion)
        self._check_iteration(iteration)
        ids: list[int] = []
        events: list[Event] = []
        new: list[Skill] = []

        def log(event: Event, skill: Skill | None = None) -> None:
            self._ledger.apply(event, skill)
            events.append(event)

        for skill in skills:
            known = self._ledger.duplicate(skill)
            if known is not None:
                log(Event(self._ledger.seq + 1, iteration, "merge", known))
                ids.append(known)
                continue
            skill_id = len(self._ledger.skills) + 1
            # Adding 0.0 turns -0.0 into 0.0, as SQLite does.
            clean = replace(
                skill,
                skill_id=skill_id,
                source_reward=float(skill.source_reward) + 0.0,
                source_completion=float(skill.source_completion) + 0.0,
            )
            log(Event(self._ledger.seq + 1, iteration, "insert", skill_id), clean)
            new.append(clean)
            ids.append(skill_id)
            while (victim := self._surplus(skill.task_id)) is not None:
                log(Event(self._ledger.seq + 1, iteration, "drop", victim))
        self._write(events, new)
        return ids

    def record_use(self, skill_id: int, iteration: int, *, reward: float | None = None, gap: float | None = None) -> None:
        """Books one use: the skill conditioned the teacher of one group of trajectories.

        Args:
            skill_id: The skill; it may have been dropped since it was retrieved.
            iteration: The iteration that is under way.
            reward: The group's mean reward; needed when booking is `next_visit`.
            gap: The group's outcome-aligned gap, sum of A_i * (log tea - log stu) in nats; needed when booking is `gap`.

        Raises:
            KeyError: No such skill.
            ValueError: The value that booking needs is missing, a value is not finite, or `iteration` lies before the last event.
            OSError: It could not be written; the bank is as before.
        """
        if skill_id not in self._ledger.skills:
            raise KeyError(f"no skill {skill_id} in the bank")
        needed = {"source": 0.0, "next_visit": reward, "gap": gap}[self.booking]
        if needed is None:
            raise ValueError(f"booking {self.booking!r} needs {'reward' if self.booking == 'next_visit' else 'gap'}=")
        self._check_iteration(iteration)
        _finite(reward=reward, gap=gap)
        values = [None if value is None else float(value) + 0.0 for value in (reward, gap)]
        event = Event(self._ledger.seq + 1, iteration, "use", skill_id, *values)
        self._ledger.apply(event)
        self._write([event], [])

    def cut(self, iteration: int, expect: int | None = None) -> int:
        """Rewinds to the state in which `iteration` is about to begin: events of that iteration and later are forgotten, for good.

        Args:
            iteration: The first iteration to be run again.
            expect: The `position` that the checkpoint recorded.

        Returns:
            Number of events forgotten.

        Raises:
            ValueError: The remaining log has not `expect` events: the bank and the checkpoint do not belong together. Nothing is changed.
            OSError: It could not be written; the bank is as before.
        """
        try:
            keep = self._db.execute("SELECT count(*) FROM event WHERE iteration < ?", (iteration,)).fetchone()[0]
        except sqlite3.Error as error:
            raise bank_file.translated(error, self.path) from error
        if expect is not None and keep != expect:
            raise ValueError(
                f"{self.path or 'the in-memory bank'} has {keep} events before iteration {iteration}, the checkpoint saw {expect}: "
                "this bank does not belong to this checkpoint; put the run's own bank in place"
            )
        forgotten = self.position - keep
        if forgotten:
            self._transaction(lambda: bank_file.truncate(self._db, keep))
            self._ledger = self._load()
        return forgotten

    def close(self) -> None:
        """Closes the file. May be called twice."""
        self._db.close()

    def __enter__(self) -> SkillBank:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Inside

    def _surplus(self, task_id: str) -> int | None:
        live = self.skills(task_id)
        if self.capacity is None or len(live) <= self.capacity:
            return None
        if self.drop == "oldest":
            return live[0].skill_id
        return min(live, key=lambda skill: (skill.mean_reward, skill.skill_id)).skill_id

    def _check_iteration(self, iteration: int) -> None:
        if iteration < self._ledger.iteration:
            raise ValueError(
                f"iteration {iteration} lies before the bank's last event ({self._ledger.iteration}): call cut({iteration}) when resuming"
            )

    def _write(self, events: list[Event], new: list[Skill]) -> None:
        if events:
            self._transaction(lambda: bank_file.append(self._db, events, new))

    def _transaction(self, work: Callable[[], None]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            work()
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._ledger = self._load()  # the events were applied in memory before they were written
            if isinstance(error, sqlite3.Error):
                raise bank_file.translated(error, self.path) from error
            raise

    def _load(self) -> Ledger:
        try:
            return Ledger.replay(*bank_file.read(self._db))
        except sqlite3.Error as error:
            raise bank_file.translated(error, self.path) from error
        except ValueError as error:
            raise bank_file.refused(self.path or Path(":memory:"), f"its log does not add up ({error})") from error


def _finite(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
