"""Playing an environment's own solution: demonstrations, and skills to look at before there is a bank."""

from __future__ import annotations

import random
from typing import Any

import gymnasium

from skillsd.trajectory import Task, Turn


def demonstrate(env: gymnasium.Env[str, str], task: Task, noise: float, rng: random.Random) -> tuple[list[Turn], list[str], str, bool]:
    """Play the solver's plan with noise.

    Args:
        env: An environment that offers `solution()` and `actions` (such as skillsd/Sokoban-v0).
        task: What to play.
        noise: Chance of a random action at each turn.
        rng: Source of the noise.

    Returns:
        turns (observation, executed action, reward), the label of each turn, the instruction, and whether the task was solved.
    """
    base: Any = env.unwrapped
    observation, info = env.reset(options={**task.options, "task_id": task.task_id})
    instruction = str(info.get("instruction", ""))
    turns, labels, over = [], [], False
    while not over and (plan := base.solution()):
        action = base.actions[int(rng.random() * len(base.actions))] if rng.random() < noise else plan[0]
        seen = observation
        observation, reward, terminated, truncated, info = env.step(action)
        turns.append(Turn(seen, action, float(reward)))
        labels.append(plan[0])
        over = terminated or truncated
    return turns, labels, instruction, bool(info["success"])
