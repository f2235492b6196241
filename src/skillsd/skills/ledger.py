"""The bank's log and the state that follows from it, kept side by side in SQLite; in memory there is the tally, the names of the
tasks and what was read last of a few.

An event changes the state of one skill, and is undone from itself and the state after it: a use keeps the total before it. So a cut costs
as much as what is cut off, and leaves to the bit what was there.

What a transaction writes waits in memory for its end, or until a thousand events have come together: a task's rows are read once, and a
state that changes twice is written once. Whatever is asked meanwhile is told as it will be.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from hashlib import blake2b
from math import isfinite

from skillsd.skills.skill import Skill
from skillsd.skills.tables import EVENT, SKILL, STATE, TALLY, TASK, Booking, Damaged, Event, Kind, State, Tally

_HOT_TASKS, _HOT_ROWS = 512, 32
"""Of so many tasks with at most so many skills what was read last is kept (4 MB): prompts may be chosen for all at each iteration."""
_MOST_WAITING = 1024
"""Events; so a long cut and the log of an earlier version need no more memory than a short one."""


class Elsewhere(Exception):
    """Another connection has written."""


@dataclass
class _Open:
    """A task in the transaction under way."""

    live: int
    stored: tuple[int, int]  # live and crc_sum in the file
    states: dict[int, State] | None  # the live ones by id, if they were read
    changed: dict[int, tuple[State | None, State | None]] = field(default_factory=dict)  # by id, in the file and now


class Ledger:
    """Log and state on one connection. What is written belongs between `with ledger.transaction():` and its end.

    Args:
        db: A connection that begins transactions only when told to, to a database with `SCHEMA`.
        booking: What `Skill.mean_reward` means, see `SkillBank`.

    Raises:
        Damaged: also by any method that reads: the rows are not those that were written.
    """

    def __init__(self, db: sqlite3.Connection, booking: Booking) -> None:
        self._db, self.booking, self._closed = db, booking, False
        self.tally = self._stored()
        self._open: dict[str, _Open] = {}
        self._waiting: dict[str, list[tuple[object, ...]]] = {SKILL.insert: [], EVENT.insert: []}  # rows to write, by statement
        self._tasks: list[str] | None = None
        self._hot: dict[str, list[State]] = {}

    # Reading

    def verify(self, every_row_counted: bool) -> None:
        """Looks whether all tasks are there and the log and the skills end where they should, or have as many rows as they should."""
        held = self.tasks()
        for table, key, n in (("event", "seq", self.tally.seq), ("skill", "skill_id", self.tally.skills)):
            found = self._db.execute(f"SELECT max({key}) FROM {table}").fetchone()[0] or 0
            if found == n and every_row_counted:
                found = self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            if found != n:
                raise Damaged(f"its table {table!r} holds {found} rows where {n} were written")
        if every_row_counted:
            found = self._db.execute("SELECT count(*), coalesce(sum(dropped = 0), 0) FROM state").fetchone()
            if found != (self.tally.skills, self.tally.live):
                raise Damaged(f"its table 'state' holds {found[0]} rows where {self.tally.skills} were written")
        assert len(held) == self.tally.tasks

    def tasks(self) -> list[str]:
        """Ids of the tasks that have a skill, sorted."""
        if self._tasks is None:
            rows = self._db.execute(f"{TASK.select} ORDER BY task_id").fetchall()
            self._tasks = [TASK.checked(row)[0] for row in rows]
            if len(rows) != self.tally.tasks or sum(row[-1] for row in rows) != self.tally.crc_sum:
                raise Damaged("rows of its table 'task' are missing or doubled")
        return list(self._tasks)

    def n_live(self, task_id: str) -> int:
        """How many skills the task has."""
        return self._open[task_id].live if task_id in self._open else self._task(task_id)[0]

    def live(self, task_id: str) -> list[State]:
        """How the task's skills that are not dropped stand, in no particular order."""
        task = self._open.get(task_id)
        if task is None and task_id in self._hot:
            return self._hot[task_id]
        if task is not None and task.states is not None:
            return list(task.states.values())
        n, crc_sum = task.stored if task is not None else self._task(task_id)
        rows = self._db.execute(f"{STATE.select} WHERE task_id = ? AND dropped = 0", (task_id,)).fetchall()
        states = list(map(State._make, STATE.all_checked(rows, task_id)))
        if len(rows) != n or sum(row[-1] for row in rows) != crc_sum:
            raise Damaged(f"rows of its table 'state' are missing or doubled (task {task_id!r})")
        if task is not None:
            states = _as_changed(states, task)
            task.states = {state.skill_id: state for state in states}
        elif n <= _HOT_ROWS:
            if len(self._hot) >= _HOT_TASKS:
                self._hot.clear()
            self._hot[task_id] = states
        return states

    def skill(self, skill_id: int) -> Skill:
        """A skill as it stands, also one that was dropped."""
        return self._as_it_stands(*self._both(skill_id))

    def skill_of(self, state: State) -> Skill:
        """The skill that stands so."""
        return self._as_it_stands(self._source(state.skill_id), state)

    def state(self, skill_id: int) -> State:
        """How a skill stands. Raises ValueError if there never was one."""
        if not 1 <= skill_id <= self.tally.skills:
            raise ValueError(f"skill {skill_id} was never inserted")
        return self._both(skill_id)[1]

    def duplicate(self, skill: Skill) -> State | None:
        """The live skill of the same task with the same texts, if any; asked within a transaction, before it is inserted or merged."""
        task, digest = self._opened(skill.task_id), _digest(skill)
        if task.live <= _HOT_ROWS:
            states = self.live(skill.task_id)
        else:
            rows = self._db.execute(f"{STATE.select} WHERE task_id = ? AND dropped = 0 AND digest = ?", (skill.task_id, digest)).fetchall()
            states = _as_changed([State._make(STATE.checked(row)) for row in rows], task)
        same = (state for state in states if state.digest == digest)
        return next((state for state in same if self._source(state.skill_id).texts == skill.texts), None)

    def events(self) -> Iterator[Event]:
        """The log from its beginning."""
        self._flush()
        n, gap = 0, Damaged("rows of its table 'event' are missing")
        for n, row in enumerate(self._db.execute(f"{EVENT.select} ORDER BY seq"), 1):
            event = Event._make(EVENT.checked(row))
            if event.seq != n:
                raise gap
            yield event
        if n != self.tally.seq:
            raise gap

    def length_before(self, iteration: int) -> int:
        """Number of events of earlier iterations."""
        return bisect_left(range(1, self.tally.seq + 1), iteration, key=lambda seq: self._event(seq).iteration)

    def overtaken(self) -> bool:
        """Whether another connection has written since this one last read or wrote the tally."""
        return self._stored() != self.tally

    def checkpoint(self) -> None:
        """Moves what stands in the WAL into the file; closing does that too, but tells of no error. Does nothing once it is closed."""
        if not self._closed:
            self._db.execute("PRAGMA wal_checkpoint")

    def close(self) -> None:
        """Closes the connection. May be called twice."""
        self._closed = True
        self._db.close()

    # Writing

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is done inside, or nothing. Raises Elsewhere if another connection has written."""
        before = replace(self.tally)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            if self.overtaken():
                raise Elsewhere
            yield
            self.settle()
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self.tally, self._tasks = before, None
            self._open.clear()
            self._hot.clear()
            for rows in self._waiting.values():
                rows.clear()
            raise

    def append(self, kind: Kind, iteration: int, what: Skill | State, reward: float | None = None, gap: float | None = None) -> None:
        """One more event: of an insert the skill, whose texts and source alone count, of the others how the skill stands before it.

        Raises:
            ValueError: It cannot follow what is there.
        """
        tally, total = self.tally, None
        if iteration < tally.earliest:
            raise ValueError(f"an event of iteration {iteration} cannot follow one of {tally.earliest}")
        if isinstance(what, Skill):
            if kind != "insert":
                raise ValueError(f"an event is of unknown kind {kind!r}")
            state = self._insert(what)
        elif kind == "merge":
            state = what._replace(sources=what.sources + 1)
            tally.merged += 1
        elif kind == "use":
            state, total = self._used(what, reward, gap), what.total
        elif kind == "drop" and not what.dropped:
            state = what._replace(dropped=1)
            tally.dropped += 1
        else:
            raise ValueError(f"skill {what.skill_id} is dropped twice, or an event is of unknown kind {kind!r}")
        self._put(None if isinstance(what, Skill) else what, state)
        tally.seq, tally.iteration = tally.seq + 1, iteration
        event = Event(kind, tally.seq, iteration, state.skill_id, reward, gap, total)
        self._waiting[EVENT.insert].append((*event, EVENT.crc(event)))

    def undo(self) -> None:
        """Forgets the last event."""
        tally = self.tally
        event = self._event(tally.seq)
        state = self._both(event.skill_id)[1]
        if event.kind == "insert":
            self._put(state, None)
            self._db.execute(SKILL.delete, (event.skill_id,))
            tally.skills -= 1
        elif event.kind == "merge":
            self._put(state, state._replace(sources=state.sources - 1))
            tally.merged -= 1
        elif event.kind == "use":
            uses, total = state.uses - 1, event.total_before or 0.0
            self._put(state, state._replace(uses=uses, total=total, mean_reward=self._mean(state.source_reward, uses, total)))
        else:
            self._put(state, state._replace(dropped=0))
            tally.dropped -= 1
        self._db.execute(EVENT.delete, (event.seq,))
        tally.seq -= 1
        tally.iteration = self._event(tally.seq).iteration if tally.seq else 0

    def settle(self) -> None:
        """Writes what waits, and the sums: what a transaction ends with."""
        self._flush()
        gone, states = [], []
        for task_id, task in self._open.items():
            live, crc_sum = task.stored
            if live:
                self.tally.crc_sum -= TASK.crc((task_id, *task.stored))
            for stored, now in task.changed.values():
                if stored is not None:
                    crc_sum -= 0 if stored.dropped else STATE.crc(stored)
                    if now is None or now[:4] != stored[:4]:
                        gone.append(stored[:4])
                if now is not None:
                    states.append((*now, STATE.crc(now)))
                    crc_sum += 0 if now.dropped else states[-1][-1]
            if task.live:
                row = (task_id, task.live, crc_sum)
                self.tally.crc_sum += TASK.crc(row)
                self._db.execute(TASK.replace, (*row, TASK.crc(row)))
            else:
                self._db.execute(TASK.delete, (task_id,))
            if bool(task.live) != bool(live):
                self.tally.tasks += 1 if task.live else -1
                self._tasks = None
        self._db.executemany(STATE.delete, gone)
        self._db.executemany(STATE.replace, states)
        self._open.clear()
        tally = (1, *astuple(self.tally))
        self._db.execute(TALLY.replace, (*tally, TALLY.crc(tally)))

    # Inside

    def _insert(self, skill: Skill) -> State:
        skill_id, iteration = self.tally.skills + 1, int(skill.source_iteration)
        reward, completion = float(skill.source_reward) + 0.0, float(skill.source_completion) + 0.0  # -0.0 becomes 0.0, as in SQLite
        row = (skill.task_id, *skill.texts, skill_id, iteration, int(skill.source_member), reward, completion)
        self._waiting[SKILL.insert].append((*row, SKILL.crc(row)))
        self.tally.skills += 1
        return State(skill.task_id, 0, _digest(skill), skill_id, iteration, reward, 0, 0.0, self._mean(reward, 0, 0.0), 1)

    def _used(self, state: State, reward: float | None, gap: float | None) -> State:
        uses, total = state.uses + 1, state.total
        if self.booking != "source":
            value = reward if self.booking == "next_visit" else gap
            if value is None:
                raise ValueError(f"a use of skill {state.skill_id} lacks the value that booking {self.booking!r} needs")
            total += value
            if not isfinite(total):
                raise ValueError(f"what was booked for skill {state.skill_id} must add up to a finite number, got {total}")
        return state._replace(uses=uses, total=total, mean_reward=self._mean(state.source_reward, uses, total))

    def _mean(self, source_reward: float, uses: int, total: float) -> float:
        if self.booking == "source":
            return source_reward
        # A gap in nats says nothing on a reward's scale: under "gap" an untried skill starts at 0, elsewhere at its source's reward.
        return total / uses if uses else 0.0 if self.booking == "gap" else source_reward

    def _opened(self, task_id: str) -> _Open:
        if task_id not in self._open:
            stored, states = self._task(task_id), self._hot.pop(task_id, None)
            self._open[task_id] = _Open(stored[0], stored, None if states is None else {state.skill_id: state for state in states})
        return self._open[task_id]

    def _put(self, old: State | None, new: State | None) -> None:
        either = new or old
        assert either is not None
        task, skill_id = self._opened(either.task_id), either.skill_id
        task.changed[skill_id] = (task.changed[skill_id][0] if skill_id in task.changed else old, new)
        for state, sign in ((old, -1), (new, 1)):
            if state is not None and not state.dropped:
                task.live += sign
                self.tally.live += sign
                self.tally.uses += sign * state.uses
        if task.states is not None:
            task.states.pop(skill_id, None)
            if new is not None and not new.dropped:
                task.states[skill_id] = new
        if self.tally.seq % _MOST_WAITING == 0:
            self.settle()

    def _flush(self) -> None:
        for statement, rows in self._waiting.items():
            if rows:
                self._db.executemany(statement, rows)
                rows.clear()

    def _as_it_stands(self, skill: Skill, state: State) -> Skill:
        return replace(skill, uses=state.uses, mean_reward=state.mean_reward, sources=state.sources)

    def _stored(self) -> Tally:
        return Tally(*TALLY.checked(self._db.execute(TALLY.select).fetchone())[1:])

    def _task(self, task_id: str) -> tuple[int, int]:
        row = self._db.execute(f"{TASK.select} WHERE task_id = ?", (task_id,)).fetchone()
        return (0, 0) if row is None else TASK.checked(row)[1:]

    def _event(self, seq: int) -> Event:
        self._flush()
        return Event._make(EVENT.checked(self._db.execute(f"{EVENT.select} WHERE seq = ?", (seq,)).fetchone()))

    def _source(self, skill_id: int) -> Skill:
        self._flush()
        task_id, *texts, _, iteration, member, reward, completion = SKILL.checked(
            self._db.execute(f"{SKILL.select} WHERE skill_id = ?", (skill_id,)).fetchone()
        )
        success, mistakes, workflow = texts
        return Skill(success, mistakes, workflow, task_id, skill_id, iteration, member, reward, completion)

    def _both(self, skill_id: int) -> tuple[Skill, State]:
        skill = self._source(skill_id)
        task = self._open.get(skill.task_id)
        if task is not None and (now := task.changed.get(skill_id, (None, None))[1]) is not None:
            return skill, now
        at = (skill.task_id, _digest(skill), skill_id)
        rows = self._db.execute(f"{STATE.select} WHERE task_id = ? AND dropped IN (0, 1) AND digest = ? AND skill_id = ?", at).fetchall()
        return skill, State._make(STATE.checked(rows[0] if len(rows) == 1 else None))


def _digest(skill: Skill) -> int:
    return int.from_bytes(blake2b("\0".join(skill.texts).encode(), digest_size=8).digest(), "little", signed=True)


def _as_changed(stored: list[State], task: _Open) -> list[State]:
    """Of a task's live states those that are so still, and those that have become so."""
    now = [state for _, state in task.changed.values() if state is not None and not state.dropped]
    return [state for state in stored if state.skill_id not in task.changed] + now
