"""Small makers of trajectories and skills."""

from collections.abc import Callable, Sequence

import pytest

from skillsd.skills import Skill
from skillsd.trajectory import Trajectory, Turn


def _trajectory(
    task_id: str = "t1",
    member: int = 0,
    pairs: Sequence[tuple[str, str]] = (("s0", "up"), ("s1", "left")),
    completion: float = 1.0,
    iteration: int = 3,
    instruction: str = "Solve it.",
) -> Trajectory:
    turns = tuple(Turn(observation, action, 0.0) for observation, action in pairs)
    return Trajectory(
        iteration, task_id, member, 7, instruction, (1,), (2,), (True,), (-0.5,), turns, completion, completion, completion == 1.0, "done"
    )


def _skill(text: str = "a", task_id: str = "t1", reward: float = 0.0, iteration: int = 0, **rest: object) -> Skill:
    return Skill(
        f"{text}!", f"{text}?", f"{text}.", task_id, source_reward=reward, source_completion=reward, source_iteration=iteration, **rest
    )


@pytest.fixture
def make_trajectory() -> Callable[..., Trajectory]:
    return _trajectory


@pytest.fixture
def make_skill() -> Callable[..., Skill]:
    return _skill
