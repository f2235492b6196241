"""The bank's log and the states that follow from it, side by side in its file; in memory are the last event and the names of the tasks.

An event changes the state of one skill, and can be undone: a use keeps the total before it. So a cut costs as much as what is cut off,
and leaves to the bit what was there.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from itertools import zip_longest
from math import isfinite
from typing import Any

from skillsd.skills.bank_file import BankFile
from skillsd.skills.skill import Skill
from skillsd.skills.tables import NO_EVENT, Event, Kind, State, ValueEstimate


class Ledger:
    """Log and states. What writes is called within `with ledger.transaction():`.

    Args:
        file: The bank's file.

    Raises:
        ValueError: Also by any method that reads: rows are not those that were written.
    """

    def __init__(self, file: BankFile) -> None:
        self.file = file
        self.value_estimate: ValueEstimate = file.row("head")[1]
        self.last = self._stored_last()
        self._tasks: set[str] | None = None

    # Reading

    def tasks(self) -> set[str]:
        """Ids of the tasks that have a live skill. Do not change it."""
        if self._tasks is None:
            names = [row[1] for row in self.file.rows("state", "WHERE evicted = 0 ORDER BY task_id")]
            if names != sorted(set(names)) or len(names) != self.last.tasks:
                raise self._damaged("rows of its table 'state' are missing or out of order")
            self._tasks = set(names)
        return self._tasks

    def states(self, task_id: str, evicted: int = 0) -> dict[int, State]:
        """How a task's live skills stand, by id; or the skill of id `evicted`, which it has no longer. Empty if there is none."""
        states: dict[int, State] = {}
        for *_, skills in self.file.rows("state", "WHERE evicted = ? AND task_id = ?", (evicted, task_id)):
            states = {state[0]: State(*state) for state in json.loads(skills)}
        if not states and not evicted and task_id in self.tasks():
            raise self._damaged(f"the row of task {task_id!r} in its table 'state' is missing")
        return states

    def skill(self, skill_id: int, state: State | None = None) -> Skill:
        """A skill as it stands, live or evicted; with `state`, as it stands according to that. Raises KeyError if there never was one."""
        if not 1 <= skill_id <= self.last.skills:
            raise KeyError(f"no skill {skill_id} in the bank")
        skill = Skill(*self.file.row("skill", "WHERE skill_id = ?", (skill_id,)))
        state = state or self._states_with(skill.task_id, skill_id)[1][skill_id]
        return replace(skill, uses=state.uses, mean_reward=state.mean_reward, sources=state.sources)

    def duplicate(self, skill: Skill) -> int | None:
        """The id of the live skill of the same task with the same texts, if there is one."""
        digest = _digest(skill)
        return next((state.skill_id for state in self.states(skill.task_id).values() if state.digest == digest), None)

    def events(self) -> Iterator[Event]:
        """The log from its beginning."""
        for seq, row in zip_longest(range(1, self.last.seq + 1), self.file.rows("event", "ORDER BY seq"), fillvalue=()):
            if row[:1] != (seq,):
                raise self._damaged("rows of its table 'event' are missing")
            yield Event(*row)

    def length_before(self, iteration: int) -> int:
        """Number of events of earlier iterations."""
        return bisect_left(range(1, self.last.seq + 1), iteration, key=lambda seq: self._event(seq).iteration)

    # Writing

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is done inside, or nothing."""
        before = self.last
        try:
            with self.file.transaction():
                if self._stored_last() != self.last:
                    raise self.file.overtaken()
                self.tasks()
                yield
                self.file.write("REPLACE", "head", (1, self.value_estimate, self.last.seq))
        except BaseException:
            self.last, self._tasks = before, None
            raise

    def insert(self, skill: Skill, iteration: int) -> int:
        """Adds a skill, of which the texts, the task and the source count. Returns its id."""
        skill_id, task_id, source_iteration = self.last.skills + 1, skill.task_id, int(skill.source_iteration)
        reward, completion = float(skill.source_reward) + 0.0, float(skill.source_completion) + 0.0  # -0.0 becomes 0.0, as in SQLite
        source = (source_iteration, int(skill.source_member), reward, completion)
        state = State(skill_id, _digest(skill), source_iteration, reward, 0, 0.0, 0.0, 1)
        self._write_states(task_id, self.states(task_id) | {skill_id: self._with_uses(state, 0, 0.0)})
        self.tasks().add(task_id)
        self.file.write("INSERT", "skill", (*skill.texts, task_id, skill_id, *source))
        self._log("insert", iteration, skill_id, skills=skill_id, live=self.last.live + 1)
        return skill_id

    def append(
        self, kind: Kind, iteration: int, task_id: str, skill_id: int, reward: float | None = None, gap: float | None = None
    ) -> None:
        """One more event of a skill that was inserted: `merge`, `use` or `evict`.

        Raises:
            ValueError: A use has no value where one is needed, or the sum of all values is not finite.
        """
        evicted, states = self._states_with(task_id, skill_id)
        state, last = states.pop(skill_id), self.last
        changed: dict[str, float | None]
        if kind == "merge":
            states[skill_id] = state._replace(sources=state.sources + 1)
            changed = {"merged": last.merged + 1}
        elif kind == "use":
            value = {"source": 0.0, "next_visit": reward, "gap": gap}[self.value_estimate]
            if value is None:
                raise ValueError(
                    f"value_estimate {self.value_estimate!r} needs the {'gap' if self.value_estimate == 'gap' else 'reward'} of a use"
                )
            if not isfinite(state.total + value):
                raise ValueError(f"the values of the uses of skill {skill_id} must add up to a finite number, got {state.total + value}")
            states[skill_id] = self._with_uses(state, state.uses + 1, state.total + value)
            changed = {"reward": reward, "gap": gap, "total_before": state.total, "uses": last.uses + (not evicted)}
        else:
            self._write_states(task_id, {skill_id: state}, evicted=skill_id)
            changed = {"live": last.live - 1, "uses": last.uses - state.uses}
        self._write_states(task_id, states, evicted)
        self._log(kind, iteration, skill_id, **changed)

    def undo(self) -> None:
        """Forgets the last event."""
        event = self.last
        skill_id, task_id = event.skill_id, self.skill(event.skill_id).task_id
        evicted, states = self._states_with(task_id, skill_id)
        state = states.pop(skill_id)
        if event.kind == "insert":
            self.file.delete("skill", "skill_id = ?", (skill_id,))
        elif event.kind == "merge":
            states[skill_id] = state._replace(sources=state.sources - 1)
        elif event.kind == "use":
            states[skill_id] = self._with_uses(state, state.uses - 1, event.total_before or 0.0)
        else:
            self._write_states(task_id, self.states(task_id) | {skill_id: state})
        self._write_states(task_id, states, evicted)
        if not states and not evicted:
            self.tasks().discard(task_id)
        self.file.delete("event", "seq = ?", (event.seq,))
        self.last = self._event(event.seq - 1)

    # Inside

    def _event(self, seq: int) -> Event:
        return Event(*self.file.row("event", "WHERE seq = ?", (seq,))) if seq else NO_EVENT

    def _stored_last(self) -> Event:
        return self._event(self.file.row("head")[2])

    def _damaged(self, why: str) -> Exception:
        """The error for rows that contradict each other; or of which some are those of another writer."""
        return self.file.damaged(why) if self._stored_last() == self.last else self.file.overtaken()

    def _states_with(self, task_id: str, skill_id: int) -> tuple[int, dict[int, State]]:
        """The row in which this skill's state is: its `evicted`, and the states of its task's live skills or its own alone."""
        for evicted in (0, skill_id):
            if skill_id in (states := self.states(task_id, evicted)):
                return evicted, states
        raise self._damaged(f"the state of skill {skill_id} is missing")

    def _write_states(self, task_id: str, states: dict[int, State], evicted: int = 0) -> None:
        """Writes a row of states; without any there is none."""
        if states:
            self.file.write("REPLACE", "state", (evicted, task_id, json.dumps(sorted(states.values()))))
        else:
            self.file.delete("state", "evicted = ? AND task_id = ?", (evicted, task_id))

    def _with_uses(self, state: State, uses: int, total: float) -> State:
        mean = state.source_reward
        if self.value_estimate != "source" and uses:
            mean = total / uses
        elif self.value_estimate == "gap":  # a gap in nats is not on the scale of the source's reward
            mean = 0.0
        return state._replace(uses=uses, total=total, mean_reward=mean)

    def _log(self, kind: Kind, iteration: int, skill_id: int, **columns: float | None) -> None:
        """Writes the event; columns that are not named are those of the event before it, of a use's columns none."""
        fresh: dict[str, Any] = {"reward": None, "gap": None, "total_before": None, "tasks": len(self.tasks())} | columns
        self.last = self.last._replace(seq=self.last.seq + 1, iteration=iteration, kind=kind, skill_id=skill_id, **fresh)
        self.file.write("INSERT", "event", self.last)


def _digest(skill: Skill) -> str:
    return blake2b("\0".join(skill.texts).encode(), digest_size=16).hexdigest()
