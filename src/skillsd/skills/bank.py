"""The skill bank: a log of events in SQLite, and beside it the state that they come to.

The log holds every insert, merge, use and eviction with its iteration. State is a function of the log, so rewinding (`cut`) is undoing
its tail: evicted skills come back, ids are given again, sums are to the bit what they were. Memory does not grow with the bank: what is
asked for is read from the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import get_args

from skillsd.skills.bank_file import open_file
from skillsd.skills.ledger import Ledger
from skillsd.skills.retrieval import SQRT2, select
from skillsd.skills.skill import Skill
from skillsd.skills.tables import Event, Eviction, ValueEstimate


class SkillBank:
    """Skills per task, on disk or in memory. One connection, one thread, one writing process.

    Args:
        path: The SQLite file, by custom `bank.sqlite`; made with its folder if missing. None: in memory.
        capacity: Most skills a task keeps (>= 1); None: no limit, in which case never-used skills crowd out UCB.
        eviction: Which skill goes when a task is over capacity, the newcomer included. `worst`: lowest mean reward, of equals the oldest.
            `oldest`: lowest id.
        value_estimate: What a skill's mean reward is. `source`: reward of the trajectory it was made from. `next_visit`: mean over its
            uses of `reward`, until the first use the source's reward. `gap`: mean over its uses of `gap`, until the first use 0.
        read_only: Open an existing bank to look at it, also while a run writes to it: a snapshot, with the value estimate stored in it.
            Close it when done: as long as it is open, what a run writes stays in the `-wal` file beside the bank.

    Raises:
        ValueError: A setting is out of range, the file is not a usable bank (it is left as it is), or it has another value estimate. Any
            method raises it that meets a row which is damaged or missing.
        OSError: The file cannot be opened or read, is locked or the disk is full. Any method that writes raises it if it could not; the
            bank is then as before.
        RuntimeError: By any method that reads or writes: the bank is closed.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        capacity: int | None = 8,
        eviction: Eviction = "worst",
        value_estimate: ValueEstimate = "source",
        read_only: bool = False,
    ) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be >= 1 or None, got {capacity}")
        for name, value, known in (("eviction", eviction, Eviction), ("value_estimate", value_estimate, ValueEstimate)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}")
        self.path = None if path is None else Path(path)
        self.capacity = capacity
        self.eviction = eviction
        file = open_file(self.path, value_estimate, read_only)
        try:
            self._ledger = Ledger(file)
            if self.value_estimate != value_estimate and not read_only:
                raise ValueError(
                    f"{path}: its value_estimate is {self.value_estimate!r}, not {value_estimate!r}: set it to {self.value_estimate!r}, or "
                    "choose another path"
                )
        except BaseException:
            file.close()
            raise

    # Reading

    @property
    def value_estimate(self) -> ValueEstimate:
        """What a mean reward is here."""
        return self._ledger.value_estimate

    @property
    def position(self) -> int:
        """Number of events so far. Put it in a checkpoint and give it to `cut` as `expect`."""
        return self._ledger.last.seq

    @property
    def imported(self) -> int:
        """How many of the events, the first ones, are of `BEFORE`: what `cut(0)` leaves."""
        return self._ledger.length_before(0)

    def __len__(self) -> int:
        return self._ledger.last.live

    def tasks(self) -> list[str]:
        """Ids of the tasks that have a skill, sorted."""
        return sorted(self._ledger.tasks())

    def skills(self, task_id: str) -> list[Skill]:
        """The task's skills by id; empty if it has none."""
        return [self._ledger.skill(skill_id, state) for skill_id, state in sorted(self._ledger.states(task_id).items())]

    def get(self, skill_id: int) -> Skill:
        """A skill by id, also one that was evicted since. Raises KeyError if there never was one."""
        return self._ledger.skill(skill_id)

    def retrieve(self, task_id: str, c: float = SQRT2, unused_first: bool = True) -> Skill | None:
        """The skill to use next (`retrieval.select`), or None if the task has none. Does not count as a use."""
        state = select(list(self._ledger.states(task_id).values()), c, unused_first)
        return None if state is None else self._ledger.skill(state.skill_id, state)

    def events(self) -> Iterator[Event]:
        """What happened, from the first event on, one at a time."""
        return self._ledger.events()

    def stats(self) -> dict[str, float]:
        """Numbers to log: skills held (`size`), tasks that have one (`tasks`), `mean_uses` of those held, `merged` and `evicted` so far."""
        last = self._ledger.last
        mean_uses = last.uses / last.live if last.live else 0.0
        counts = {"size": last.live, "tasks": last.tasks, "mean_uses": mean_uses, "merged": last.merged, "evicted": last.skills - last.live}
        return {name: float(count) for name, count in counts.items()}

    # Writing

    def insert(self, skills: Sequence[Skill], iteration: int) -> list[int]:
        """Adds skills in the given order, all or none, and evicts what exceeds the capacity.

        Args:
            skills: With `task_id` and source set. One whose texts its task already holds only adds to that skill's `sources`.
            iteration: The iteration that is under way, which may be later than the source's; `BEFORE`: no run has begun.

        Returns:
            One id per skill; of a duplicate, the skill it was merged into. A newcomer may have been evicted at once.

        Raises:
            ValueError: A skill has no task or a reward that is not finite, or `iteration` lies before the last event.
        """
        for skill in skills:
            if not skill.task_id:
                raise ValueError("a skill needs a task_id: make it with Skill.of(trajectory)")
            _check_finite(source_reward=skill.source_reward, source_completion=skill.source_completion)
        self._check_iteration(iteration)
        with self._ledger.transaction() if skills else nullcontext():
            return [self._insert(skill, iteration) for skill in skills]

    def record_use(self, skill_id: int, iteration: int, *, reward: float | None = None, gap: float | None = None) -> None:
        """Records one use: the skill conditioned the teacher of one group of trajectories.

        Args:
            skill_id: The skill; it may have been evicted since it was retrieved.
            iteration: The iteration that is under way.
            reward: The group's mean reward; needed when the value estimate is `next_visit`.
            gap: The group's outcome-aligned gap, sum of A_i * (log tea - log stu) in nats; needed when the value estimate is `gap`.

        Raises:
            KeyError: No such skill.
            ValueError: The value that is needed is missing, a value or the sum of all is not finite, or `iteration` lies before the last
                event.
        """
        task_id = self._ledger.skill(skill_id).task_id
        self._check_iteration(iteration)
        _check_finite(reward=reward, gap=gap)
        reward, gap = (None if value is None else float(value) + 0.0 for value in (reward, gap))  # -0.0 becomes 0.0, as in SQLite
        with self._ledger.transaction():
            self._ledger.append("use", iteration, task_id, skill_id, reward, gap)

    def cut(self, iteration: int, expect: int | None = None) -> int:
        """Rewinds to the state in which `iteration` is about to begin: events of that iteration and later are forgotten, for good.

        Args:
            iteration: The first iteration to be run again.
            expect: The `position` that the checkpoint recorded.

        Returns:
            Number of events forgotten.

        Raises:
            ValueError: The remaining log has not `expect` events: the bank and the checkpoint do not belong together. Nothing is changed.
        """
        keep = self._ledger.length_before(iteration)
        if expect is not None and keep != expect:
            raise ValueError(
                f"{self.path or 'the in-memory bank'} has {keep} events before iteration {iteration}, the checkpoint saw {expect}: "
                "this bank does not belong to this checkpoint; put the run's own bank in place"
            )
        forgotten = self.position - keep
        with self._ledger.transaction() if forgotten else nullcontext():
            for _ in range(forgotten):
                self._ledger.undo()
        return forgotten

    def sync(self) -> None:
        """Flushes what was written to the disk, as a power cut would lose the last of it. Raises OSError, also if the file is gone."""
        self._ledger.file.sync()

    def close(self) -> None:
        """Closes the file, see `BankFile.close`. May be called twice."""
        self._ledger.file.close()

    def __enter__(self) -> SkillBank:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError, ValueError) if error else nullcontext():
            self.close()

    # Inside

    def _insert(self, skill: Skill, iteration: int) -> int:
        ledger, task_id = self._ledger, skill.task_id
        skill_id = ledger.duplicate(skill)
        if skill_id is not None:
            ledger.append("merge", iteration, task_id, skill_id)
        else:
            skill_id = ledger.insert(skill, iteration)
        while self.capacity is not None and len(live := ledger.states(task_id)) > self.capacity:
            worst = min(live.values(), key=lambda state: (0.0 if self.eviction == "oldest" else state.mean_reward, state.skill_id))
            ledger.append("evict", iteration, task_id, worst.skill_id)
        return skill_id

    def _check_iteration(self, iteration: int) -> None:
        last = self._ledger.last.iteration
        if iteration < last:
            raise ValueError(f"iteration {iteration} lies before the bank's last event ({last}): call cut({iteration}) when resuming")


def _check_finite(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
