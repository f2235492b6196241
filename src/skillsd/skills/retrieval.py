"""Which skill of a task is used next: UCB, top-1, never-used skills first. Pure functions.

    score = mean_reward + c * sqrt(ln N / n)

n is the number of uses of the skill and N their sum over the task's skills that are in the bank (an evicted skill no longer counts).
Never-used skills come first: highest source reward, then newest source iteration, then lowest id. Equal scores are settled by newest
source iteration, then lowest id. While each visit adds skills faster than it uses them, only the first rule acts: a bank's capacity
ends that in time, `unused_first=False` at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

SQRT2 = math.sqrt(2.0)


class Scored(Protocol):
    """What is chosen by: a skill has it, and the bank's row of one."""

    @property
    def skill_id(self) -> int | None: ...
    @property
    def source_iteration(self) -> int: ...
    @property
    def source_reward(self) -> float: ...
    @property
    def uses(self) -> int: ...
    @property
    def mean_reward(self) -> float: ...


S = TypeVar("S", bound=Scored)


def ucb_score(mean_reward: float, n_uses: int, total_uses: int, c: float = SQRT2) -> float:
    """Upper confidence bound of a skill that was used at least once.

    Args:
        mean_reward: The skill's mean reward.
        n_uses: Its uses, n >= 1.
        total_uses: Uses of all skills of the task, N >= n.
        c: Weight of exploration.

    Raises:
        ValueError: n < 1 or N < n.
    """
    if n_uses < 1 or total_uses < n_uses:
        raise ValueError(f"UCB needs 1 <= n_uses <= total_uses, got {n_uses} and {total_uses}")
    return mean_reward + c * math.sqrt(math.log(total_uses) / n_uses)


def scores(skills: Sequence[Scored], c: float = SQRT2, unused_first: bool = True) -> list[float]:
    """The UCB score of each of a task's skills, by which `select` chooses: inf for never-used ones where those come first.

    Args:
        skills: All of the task's skills.
        c: Weight of exploration.
        unused_first: As for `select`.
    """
    counted = [skill.uses if unused_first else max(1, skill.uses) for skill in skills]
    total = sum(counted)
    return [ucb_score(skill.mean_reward, n, total, c) if n else math.inf for skill, n in zip(skills, counted, strict=True)]


def select(skills: Sequence[S], c: float = SQRT2, unused_first: bool = True) -> S | None:
    """The skill to use next, or None if there is none. The order of `skills` does not matter as long as each has its id.

    Args:
        skills: The task's skills.
        c: Weight of exploration.
        unused_first: Never-used skills come first. False: one counts as used once, with the mean reward it starts with, so that a skill
            of a failed attempt waits behind one of a success; with c = 0 the best skill is always used.
    """
    if not skills:
        return None
    unused = [skill for skill in skills if skill.uses == 0]
    if unused and unused_first:
        return _best(unused, [skill.source_reward for skill in unused])
    return _best(skills, scores(skills, c, unused_first))


def _best(skills: Sequence[S], scores: Sequence[float]) -> S:
    highest = max(scores)
    return min((skill for skill, score in zip(skills, scores, strict=True) if score == highest), key=_newest)


def _newest(skill: Scored) -> tuple[int, int]:
    return (-skill.source_iteration, skill.skill_id or 0)
