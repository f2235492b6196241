"""The bank's state, derived from its events one by one. No file, no policy: the same events give the same state, to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from skillsd.skills.skill import Skill

Booking = Literal["source", "next_visit", "gap"]
Drop = Literal["worst", "oldest"]
Kind = Literal["insert", "merge", "use", "drop"]


@dataclass(frozen=True)
class Event:
    """One line of the bank's log.

    Args:
        seq: Position in the log, from 1 without holes.
        iteration: Iteration during which it happened; never decreases along the log.
        kind: `insert` a new skill, `merge` a duplicate into one, `use` it, `drop` it.
        skill_id: The skill.
        reward: Of a use: mean reward of the group, if given.
        gap: Of a use: outcome-aligned gap, if given.
    """

    seq: int
    iteration: int
    kind: Kind
    skill_id: int
    reward: float | None = None
    gap: float | None = None


class Ledger:
    """State after a prefix of the log.

    Args:
        booking: What `Skill.mean_reward` means, see `SkillBank`.
    """

    def __init__(self, booking: Booking) -> None:
        self.booking = booking
        self.skills: dict[int, Skill] = {}
        """Every skill ever inserted, by id; dropped ones too."""
        self.seq = 0
        self.iteration = 0
        self.merged = 0
        self.dropped = 0
        self._totals: dict[int, float] = {}
        self._tasks: dict[str, dict[int, None]] = {}
        self._by_text: dict[tuple[str, str, str, str], int] = {}

    @classmethod
    def replay(cls, booking: Booking, events: Iterable[Event], skills: Mapping[int, Skill]) -> Ledger:
        """State after `events`, whose inserts take their texts from `skills`.

        Raises:
            ValueError: The log has a hole, goes back in time or names an unknown skill.
        """
        ledger = cls(booking)
        for event in events:
            ledger.apply(event, skills.get(event.skill_id))
        return ledger

    def live(self, task_id: str) -> list[Skill]:
        """The task's skills that are not dropped, by id."""
        return [self.skills[i] for i in self._tasks.get(task_id, ())]

    def tasks(self) -> list[str]:
        """Ids of the tasks that have a skill, sorted."""
        return sorted(self._tasks)

    def duplicate(self, skill: Skill) -> int | None:
        """Id of the live skill of the same task with the same texts, if any."""
        return self._by_text.get((skill.task_id, *skill.texts))

    def apply(self, event: Event, skill: Skill | None = None) -> None:
        """Takes the next event; an insert comes with its `skill`."""
        if event.seq != self.seq + 1 or event.iteration < self.iteration:
            raise ValueError(f"event {event.seq} of iteration {event.iteration} cannot follow event {self.seq} of {self.iteration}")
        if event.kind == "insert":
            if skill is None or event.skill_id != len(self.skills) + 1:
                raise ValueError(f"event {event.seq} inserts skill {event.skill_id}, which is missing or out of order")
            self._insert(event.skill_id, skill)
        elif event.skill_id not in self.skills:
            raise ValueError(f"event {event.seq} names skill {event.skill_id}, which was never inserted")
        elif event.kind == "merge":
            old = self.skills[event.skill_id]
            self.skills[event.skill_id] = replace(old, sources=old.sources + 1)
            self.merged += 1
        elif event.kind == "use":
            self._use(event)
        elif event.kind == "drop":
            self._drop(self.skills[event.skill_id])
        else:
            raise ValueError(f"event {event.seq} is of unknown kind {event.kind!r}")
        self.seq, self.iteration = event.seq, event.iteration

    def _insert(self, skill_id: int, skill: Skill) -> None:
        # A gap in nats says nothing on a reward's scale: under "gap" an untried skill starts at 0, elsewhere at its source's reward.
        mean = 0.0 if self.booking == "gap" else skill.source_reward
        self.skills[skill_id] = replace(skill, skill_id=skill_id, uses=0, sources=1, mean_reward=mean)
        self._totals[skill_id] = 0.0
        self._tasks.setdefault(skill.task_id, {})[skill_id] = None
        self._by_text[(skill.task_id, *skill.texts)] = skill_id

    def _use(self, event: Event) -> None:
        skill = self.skills[event.skill_id]
        uses, mean = skill.uses + 1, skill.mean_reward
        if self.booking != "source":
            value = event.reward if self.booking == "next_visit" else event.gap
            if value is None:
                raise ValueError(f"event {event.seq} lacks the value that booking {self.booking!r} needs")
            self._totals[event.skill_id] += value
            mean = self._totals[event.skill_id] / uses
        self.skills[event.skill_id] = replace(skill, uses=uses, mean_reward=mean)

    def _drop(self, skill: Skill) -> None:
        ids = self._tasks.get(skill.task_id, {})
        if skill.skill_id not in ids:
            raise ValueError(f"skill {skill.skill_id} is dropped twice")
        del ids[skill.skill_id]
        if not ids:
            del self._tasks[skill.task_id]
        del self._by_text[(skill.task_id, *skill.texts)]
        self.dropped += 1
