"""The contract of a summariser, and the half of it that synchronous ones share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

from skillsd.skills.skill import Skill
from skillsd.trajectory import Trajectory


class Finished(NamedTuple):
    """The summaries of one `submit`: its iteration, the skills in (task, member) order, and how many trajectories gave none."""

    iteration: int
    skills: list[Skill]
    n_failed: int


@runtime_checkable
class Summariser(Protocol):
    """Makes skills of finished trajectories. A summary that fails is counted, never raised."""

    asynchronous: bool
    """`submit` returns before the summaries are ready."""

    def summarise(self, trajectories: Sequence[Trajectory]) -> list[Skill | None]:
        """One skill per trajectory in the given order, None where it failed. Blocks."""
        ...

    def submit(self, iteration: int, trajectories: Sequence[Trajectory]) -> None:
        """Hands over the trajectories of an iteration, in any order."""
        ...

    def collect(self) -> list[Finished]:
        """What is ready, in the order of submission and each once: never a part of a submission, never a later one before an earlier."""
        ...

    def drain(self) -> None:
        """Waits until every submission is ready; `collect` then returns them all."""
        ...

    def close(self) -> None:
        """Gives up what is under way. May be called twice."""
        ...


def in_order(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """By task, then member: the order in which skills reach the bank."""
    return sorted(trajectories, key=lambda trajectory: (trajectory.task_id, trajectory.member))


def finished(iteration: int, summaries: Sequence[Skill | None]) -> Finished:
    """Counts the failures."""
    skills = [skill for skill in summaries if skill is not None]
    return Finished(iteration, skills, len(summaries) - len(skills))


class SynchronousSummariser(ABC):
    """Implements `submit`, `collect`, `drain` and `close` on top of `summarise`."""

    asynchronous: bool = False

    _ready: list[Finished]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Not in __init__: a subclass that has one of its own need not call it."""
        made = super().__new__(cls)
        made._ready = []
        return made

    @abstractmethod
    def summarise(self, trajectories: Sequence[Trajectory]) -> list[Skill | None]:
        """See `Summariser.summarise`."""

    def submit(self, iteration: int, trajectories: Sequence[Trajectory]) -> None:
        """Summarises at once. The place of a skill says whose it is.

        Raises:
            ValueError: `summarise` returned more or fewer than it was given.
        """
        rows = in_order(trajectories)
        given = self.summarise(rows)
        if len(given) != len(rows):
            raise ValueError(f"summarise() returned {len(given)} summaries of {len(rows)} trajectories")
        self._ready.append(finished(iteration, [s.of(t) if isinstance(s, Skill) else s for s, t in zip(given, rows, strict=True)]))

    def collect(self) -> list[Finished]:
        """Everything submitted since the last call."""
        ready, self._ready = self._ready, []
        return ready

    def drain(self) -> None:  # noqa: B027 - a default, not a gap
        """Nothing to wait for."""

    def close(self) -> None:
        """Forgets what was not collected."""
        self._ready = []
