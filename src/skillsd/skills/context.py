"""What the teacher may see beside the student's prompt: a skill of the bank, or something made from the group just played.

Contexts of the first kind choose before the rollout, those of the second after it. Both are functions of their arguments and of the
bank's state alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

from skillsd.hashing import seeded_order
from skillsd.skills.bank import SkillBank
from skillsd.skills.retrieval import SQRT2
from skillsd.skills.skill import Skill
from skillsd.trajectory import Trajectory


@runtime_checkable
class PrivilegedContext(Protocol):
    """Chooses the skill that conditions the teacher of one group."""

    def __call__(self, bank: SkillBank, task_id: str, all_task_ids: Sequence[str], seed: int, epoch: int) -> Skill | None:
        """The skill for the task, or None.

        Args:
            bank: The run's bank; it is only read.
            task_id: The task of the group.
            all_task_ids: Every training task, in any order.
            seed: The run seed.
            epoch: Number of full passes over the tasks so far.
        """
        ...


class BankContext:
    """The task's own skill by UCB, as in the paper.

    Args:
        c: Weight of exploration.
        unused_first: Never-used skills come first, as in the paper; false: they count as used once (`retrieval.select`).
    """

    def __init__(self, c: float = SQRT2, unused_first: bool = True) -> None:
        self.c, self.unused_first = c, unused_first

    def __call__(self, bank: SkillBank, task_id: str, all_task_ids: Sequence[str], seed: int, epoch: int) -> Skill | None:
        """The task's top skill; None while it has none."""
        return bank.retrieve(task_id, self.c, self.unused_first)


class NoContext:
    """No skill: the teacher sees the student's prompt."""

    def __call__(self, bank: SkillBank, task_id: str, all_task_ids: Sequence[str], seed: int, epoch: int) -> Skill | None:
        """Always None."""
        return None


class ShuffledContext:
    """Another task's skill. If the method gains as much with it, the gain is not the skill's.

    All tasks are laid out on a circle in an order drawn from (seed, epoch), and each takes the top skill of the next one that has any: on
    the tasks with skills that is a derangement, fixed for the epoch but for tasks that get their first skill meanwhile. A task without a
    skill of its own gets none, as it would from `BankContext`. Uses count for the lender's skill.

    Args:
        c: Weight of exploration in the lending task's choice.
        unused_first: As for `BankContext`, in the lending task's choice.
    """

    def __init__(self, c: float = SQRT2, unused_first: bool = True) -> None:
        self.c, self.unused_first = c, unused_first

    def __call__(self, bank: SkillBank, task_id: str, all_task_ids: Sequence[str], seed: int, epoch: int) -> Skill | None:
        """The lender's top skill; None if the task has no skill or is the only one that has.

        Raises:
            ValueError: `task_id` is not among `all_task_ids`.
        """
        circle, places = _circle(tuple(all_task_ids), seed, epoch)
        if task_id not in places:
            raise ValueError(f"task {task_id!r} is not among the {len(all_task_ids)} tasks to shuffle")
        with_skill, at = set(bank.tasks()), places[task_id]
        if task_id not in with_skill:
            return None
        others = (circle[at + i - len(circle)] for i in range(1, len(circle)))
        lender = next((other for other in others if other in with_skill), None)
        return None if lender is None else bank.retrieve(lender, self.c, self.unused_first)


@lru_cache(maxsize=4)
def _circle(task_ids: tuple[str, ...], seed: int, epoch: int) -> tuple[list[str], dict[str, int]]:
    """The circle, and where on it each task is."""
    circle = seeded_order(set(task_ids), seed, "shuffled", epoch)
    return circle, {task_id: at for at, task_id in enumerate(circle)}


class GroupContext(ABC):
    """Base of the contexts that need the trajectories. The bank is filled as ever, and not read."""

    needs_skills = False
    """`choose` needs the summaries of the group: training then waits for a slow summariser."""

    @abstractmethod
    def choose(self, group: Sequence[Trajectory], skills: Sequence[Skill | None]) -> Sequence[Skill | Trajectory | None]:
        """What each member's teacher sees: a skill, another attempt, or nothing.

        Args:
            group: One task's trajectories, by member.
            skills: With `needs_skills` the summary of each, None where there is none.
        """

    def __call__(self, bank: SkillBank, task_id: str, all_task_ids: Sequence[str], seed: int, epoch: int) -> Skill | None:
        """Nothing is chosen before the rollout."""
        return None


class HindsightContext(GroupContext):
    """The skill of the same trajectory (OPID, SEED): the teacher knows how this very attempt went."""

    needs_skills = True

    def choose(self, group: Sequence[Trajectory], skills: Sequence[Skill | None]) -> Sequence[Skill | Trajectory | None]:
        """Each member's own skill."""
        return skills


class SiblingContext(GroupContext):
    """A sibling that solved the task (SDPO): for each member the shortest one, of equals the first, never its own."""

    def choose(self, group: Sequence[Trajectory], skills: Sequence[Skill | None]) -> Sequence[Skill | Trajectory | None]:
        """The sibling's attempt; None where no other member solved the task."""
        solved = sorted((t for t in group if t.success), key=lambda t: (len(t.turns), t.member))
        return [next((s for s in solved if s.member != t.member), None) for t in group]


class GroundTruthContext(GroupContext):
    """The skill of the environment's own solution (OPSD): an upper bound on what any skill could say, for environments with a solver."""

    def __init__(self) -> None:
        self.solve: Callable[[str], Skill | None] | None = None
        self._known: dict[str, Skill | None] = {}

    def bind(self, solve: Callable[[str], Skill | None]) -> None:
        """Give it a way to play a task's solution; the data module does."""
        self.solve = solve

    def choose(self, group: Sequence[Trajectory], skills: Sequence[Skill | None]) -> Sequence[Skill | Trajectory | None]:
        """The same for all members."""
        assert self.solve is not None, "bind() comes first"
        task_id = group[0].task_id
        if task_id not in self._known:
            self._known[task_id] = self.solve(task_id)
        return [self._known[task_id]] * len(group)
