"""Which skill of a task is tried next: UCB, top-1, never-used skills first. Pure functions.

    score = mean_reward + c * sqrt(ln N / n)

n is the number of uses of the skill and N their sum over the task's skills that are in the bank (a dropped skill no longer counts).
Never-used skills come first: highest source reward, then newest source iteration, then lowest id. Equal scores are settled by newest
source iteration, then lowest id. While each visit adds skills faster than it uses them, only the first rule acts: a bank's capacity
ends that in time, `untried="prior"` at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from skillsd.skills.skill import Skill

SQRT2 = math.sqrt(2.0)
Untried = Literal["first", "prior"]


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


def select(skills: Sequence[Skill], c: float = SQRT2, untried: Untried = "first") -> Skill | None:
    """The skill to use next, or None if there is none. The order of `skills` does not matter as long as each has its id.

    Args:
        skills: The task's skills.
        c: Weight of exploration.
        untried: `first`: never-used skills come first. `prior`: one counts as used once, with the mean reward it starts with, so that a
            skill of a failed attempt waits behind one of a success; with c = 0 the best skill is always used.
    """
    if not skills:
        return None
    unused = [skill for skill in skills if skill.uses == 0]
    if unused and untried == "first":
        return min(unused, key=lambda skill: (-skill.source_reward, *_newest(skill)))
    total = sum(max(1, skill.uses) for skill in skills)
    return min(skills, key=lambda skill: (-ucb_score(skill.mean_reward, max(1, skill.uses), total, c), *_newest(skill)))


def _newest(skill: Skill) -> tuple[int, int]:
    return (-skill.source_iteration, skill.skill_id or 0)
