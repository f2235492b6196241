"""Playing an environment's own solution: demonstrations, and skills to look at before there is a bank."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium

from skillsd.rollout.answers import flag
from skillsd.rollout.ask import ask, plan_of
from skillsd.trajectory import Task, Turn


class Demonstration(NamedTuple):
    """A play of the solver: turns with the executed actions, the solver's own action for each turn, the instruction, whether the task was
    solved, and what the environment said last."""

    turns: list[Turn]
    labels: list[str]
    instruction: str
    success: bool
    final_observation: str


def demonstrate(env: gymnasium.Env[str, str], task: Task, noise: float, rng: random.Random) -> Demonstration:
    """Play the solver's plan with noise.

    Args:
        env: An environment that offers `solution()` and `actions` (such as skillsd/Sokoban-v0).
        task: What to play.
        noise: Chance of a random action at each turn.
        rng: Source of the noise.

    Raises:
        ConfigError: a call of the environment fails.
    """
    base: Any = env.unwrapped

    def reset() -> tuple[str, str, bool]:
        observation, info = env.reset(options={**task.options, "task_id": task.task_id})
        return _text(observation), _text(info.get("instruction", ""), "info['instruction']"), _success(info)

    def step() -> tuple[str, float, bool, bool]:
        observation, reward, terminated, truncated, info = env.step(action)
        return _text(observation), float(reward), flag("terminated", terminated) or flag("truncated", truncated), _success(info)

    observation, instruction, success = ask(env, "reset()", reset)
    turns, labels, over = [], [], False
    while not over and (plan := plan_of(env)):
        action = base.actions[int(rng.random() * len(base.actions))] if rng.random() < noise else plan[0]
        seen = observation
        observation, reward, over, success = ask(env, "step()", step)
        turns.append(Turn(seen, action, reward))
        labels.append(plan[0])
    return Demonstration(turns, labels, instruction, success, observation)


def _text(text: Any, what: str = "the observation") -> str:
    if not isinstance(text, str):
        raise TypeError(f"{what} is a {type(text).__name__}, not a str")
    return text


def _success(info: Mapping[str, Any]) -> bool:
    return flag("info['success']", info.get("success", False))
