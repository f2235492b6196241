"""The skill bank: a log of events in SQLite, and beside it the state that they come to.

The log holds every insert, merge, use and drop with its iteration. State is a function of the log, so rewinding (`cut`) is undoing its
tail: dropped skills come back, ids are given again, sums are to the bit what they were. Memory does not grow with the bank: what is asked
for is read from the file, and every row is checked against its CRC when it is read.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import get_args

from skillsd.files.durable import sync
from skillsd.skills import bank_file
from skillsd.skills.ledger import Elsewhere
from skillsd.skills.retrieval import SQRT2, Untried, select
from skillsd.skills.skill import Skill
from skillsd.skills.tables import BEFORE, Booking, Damaged, Drop, Event, State


class SkillBank:
    """Skills per task, on disk or in memory. One connection, one thread, one writing process.

    Args:
        path: The SQLite file, by custom `bank.sqlite`; made with its folder if missing. None: in memory.
        capacity: Most skills a task keeps (>= 1); None: no limit, in which case never-used skills crowd out UCB.
        drop: Which skill goes when a task is over capacity, the newcomer included. `worst`: lowest mean reward, of equals the oldest.
            `oldest`: lowest id.
        booking: What a skill's mean reward is. `source`: reward of the trajectory it was made from. `next_visit`: mean over its uses of
            `reward`, until the first use the source's reward. `gap`: mean over its uses of `gap`, until the first use 0.
        read_only: Open an existing bank to look at it, also while a run writes to it: a snapshot, with the booking stored in it. Close it
            when done: as long as it is open, what a run writes stays in the `-wal` file beside the bank.

    Raises:
        ValueError: A setting is out of range, the file is not a usable bank (it is left as it is), or it was booked differently. Any method
            raises it that meets a row which is damaged or missing.
        OSError: The file cannot be opened or read, is locked or the disk is full.
        RuntimeError: By any method that reads or writes: the bank is closed.
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
        self._read_only = read_only
        self._ledger = bank_file.connect(self.path, booking, read_only)
        self._identity = None if self.path is None else bank_file.identity(self.path)

    # Reading

    @property
    def booking(self) -> Booking:
        """What a mean reward means here."""
        return self._ledger.booking

    @property
    def position(self) -> int:
        """Number of events so far. Put it in a checkpoint and give it to `cut` as `expect`."""
        return self._ledger.tally.seq

    @property
    def imported(self) -> int:
        """How many of the events, the first ones, are of `BEFORE`: what `cut(0)` leaves."""
        with self._told():
            return self._ledger.length_before(0)

    def __len__(self) -> int:
        return self._ledger.tally.live

    def tasks(self) -> list[str]:
        """Ids of the tasks that have a skill, sorted."""
        with self._told():
            return self._ledger.tasks()

    def skills(self, task_id: str) -> list[Skill]:
        """The task's skills by id; empty if it has none."""
        with self._told():
            return [self._ledger.skill_of(state) for state in sorted(self._ledger.live(task_id), key=lambda state: state.skill_id)]

    def get(self, skill_id: int) -> Skill:
        """A skill by id, also one that was dropped since. Raises KeyError if there never was one."""
        if not 1 <= skill_id <= self._ledger.tally.skills:
            raise KeyError(skill_id)
        with self._told():
            return self._ledger.skill(skill_id)

    def retrieve(self, task_id: str, c: float = SQRT2, untried: Untried = "first") -> Skill | None:
        """The skill to use next (`retrieval.select`), or None if the task has none. Does not count as a use."""
        with self._told():
            state = select(self._ledger.live(task_id), c, untried)
            return None if state is None else self._ledger.skill_of(state)

    def events(self) -> Iterator[Event]:
        """What happened, from the first event on, one at a time."""
        with self._told():
            yield from self._ledger.events()

    def stats(self) -> dict[str, float]:
        """Numbers to log: skills held (`size`), tasks that have one (`tasks`), `mean_uses` of those held, `merged` and `dropped` so far."""
        tally = self._ledger.tally
        return {
            "size": float(tally.live),
            "tasks": float(tally.tasks),
            "mean_uses": tally.uses / tally.live if tally.live else 0.0,
            "merged": float(tally.merged),
            "dropped": float(tally.dropped),
        }

    # Writing

    def insert(self, skills: Sequence[Skill], iteration: int) -> list[int]:
        """Adds skills in the given order, all or none, and drops what exceeds the capacity.

        Args:
            skills: With `task_id` and source set. One whose texts its task already holds only adds to that skill's `sources`.
            iteration: The iteration that is under way, which may be later than the source's; `BEFORE`: no run has begun.

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
        with self._writing(bool(skills)):
            for skill in skills:
                known = self._ledger.duplicate(skill)
                ids.append(self._ledger.tally.skills + 1 if known is None else known.skill_id)
                self._ledger.append("insert" if known is None else "merge", iteration, known or skill)
                while (victim := self._surplus(skill.task_id)) is not None:
                    self._ledger.append("drop", iteration, victim)
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
            ValueError: The value that booking needs is missing, a value or the sum of all is not finite, or `iteration` lies before the
                last event.
            OSError: It could not be written; the bank is as before.
        """
        if not 1 <= skill_id <= self._ledger.tally.skills:
            raise KeyError(f"no skill {skill_id} in the bank")
        needed = {"source": 0.0, "next_visit": reward, "gap": gap}[self.booking]
        if needed is None:
            raise ValueError(f"booking {self.booking!r} needs {'reward' if self.booking == 'next_visit' else 'gap'}=")
        self._check_iteration(iteration)
        _finite(reward=reward, gap=gap)
        reward, gap = (None if value is None else float(value) + 0.0 for value in (reward, gap))  # -0.0 becomes 0.0, as in SQLite
        with self._writing():
            self._ledger.append("use", iteration, self._ledger.state(skill_id), reward, gap)

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
        with self._told():
            keep = self._ledger.length_before(iteration)
        if expect is not None and keep != expect:
            raise ValueError(
                f"{self.path or 'the in-memory bank'} has {keep} events before iteration {iteration}, the checkpoint saw {expect}: "
                "this bank does not belong to this checkpoint; put the run's own bank in place"
            )
        forgotten = self.position - keep
        with self._writing(forgotten > 0):
            for _ in range(forgotten):
                self._ledger.undo()
        return forgotten

    def sync(self) -> None:
        """Flushes what was written to the disk, as a power cut would lose the last of it. Raises OSError, also if the file is gone."""
        if self.path is not None:
            if bank_file.identity(self.path) != self._identity:
                raise OSError(f"{self.path}: the bank was removed or replaced while it was written to: put it back")
            for path in (self.path, self.path.with_name(f"{self.path.name}-wal")):
                if path.exists():
                    sync(path)

    def close(self) -> None:
        """Moves what stands in the log beside the file into it, and closes it. May be called twice.

        Raises:
            OSError: The disk is full or broken. Nothing is lost: what could not be moved stays in the log.
        """
        try:
            if self.path is not None and not self._read_only:
                with self._told():
                    self._ledger.checkpoint()
        finally:
            self._ledger.close()

    def __enter__(self) -> SkillBank:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError, ValueError) if error else nullcontext():
            self.close()

    # Inside

    def _surplus(self, task_id: str) -> State | None:
        if self.capacity is None or self._ledger.n_live(task_id) <= self.capacity:
            return None
        live = self._ledger.live(task_id)
        return min(live, key=lambda state: (0.0 if self.drop == "oldest" else state.mean_reward, state.skill_id))

    def _check_iteration(self, iteration: int) -> None:
        last = self._ledger.tally.earliest
        if iteration < BEFORE:
            raise ValueError(f"iteration {iteration} lies before {BEFORE}, with which a bank begins")
        if iteration < last:
            raise ValueError(f"iteration {iteration} lies before the bank's last event ({last}): call cut({iteration}) when resuming")

    @contextmanager
    def _writing(self, anything: bool = True) -> Iterator[None]:
        if not anything:
            yield
            return
        if self._read_only:
            raise OSError(f"{self.path}: the bank was opened read-only")
        with self._told(), self._ledger.transaction():
            yield

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors in the bank's own words."""
        try:
            yield
        except Elsewhere as error:
            raise bank_file.overtaken(self.path) from error
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise bank_file.translated(error, self.path) from error
        except Damaged as error:
            with suppress(sqlite3.Error, Damaged):
                if not self._read_only and self._ledger.overtaken():  # what was read is of two moments
                    raise bank_file.overtaken(self.path) from error
            raise bank_file.refused(self.path or Path(":memory:"), f"the file is damaged ({error})") from error


def _finite(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
