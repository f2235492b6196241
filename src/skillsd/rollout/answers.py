"""What an environment answers, checked: text that tokens can hold, numbers that are finite. Anything else ends the episode as failed.

Nothing is repaired. An observation is the record of what the policy saw, so one that cannot be written down as it is (a lone surrogate) is
refused. Control characters are legal text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from skillsd.timeouts import Misbehaved
from skillsd.trajectory import FinishReason, Task

Env = gymnasium.Env[str, str]
MAX_REWARD = 1e37
"""The largest reward, of a step and of an episode: float32, in which losses are, holds ten times as much."""


class Start(NamedTuple):
    """After `reset`."""

    observation: str
    instruction: str
    info: Mapping[str, Any]


class End(NamedTuple):
    """What an episode came to: completion in 0..1."""

    completion: float = 0.0
    success: bool = False


NOTHING = End()


class Reply(NamedTuple):
    """After `step`; `finish` is None while the episode goes on."""

    observation: str
    reward: float
    finish: FinishReason | None
    end: End
    info: Mapping[str, Any]


def reset(env: Env, task: Task, most: int) -> Start:
    """Begin an episode.

    Args:
        env: The environment.
        task: Its task.
        most: Characters that an observation may have.

    Raises:
        Misbehaved: an answer breaks the contract; so do `step` and `score`.
    """
    # Always the same seed: a task is the same in every run and for every member of its group.
    observation, info = _parts("reset", env.reset(seed=0, options={**task.options, "task_id": task.task_id}), 2)
    info = _info(info)
    return Start(_text("the observation", observation, most), _text("info['instruction']", info.get("instruction", ""), most), info)


def step(env: Env, action: str, most: int) -> Reply:
    """Play one turn."""
    observation, reward, terminated, truncated, info = _parts("step", env.step(action), 5)
    info = _info(info)
    finish: FinishReason | None = "done" if flag("terminated", terminated) else "horizon" if flag("truncated", truncated) else None
    outcome = end(info) if finish is not None else NOTHING  # first: if the environment calls the episode failed, the rest does not count
    return Reply(_text("the observation", observation, most), number("the reward", reward, -MAX_REWARD, MAX_REWARD), finish, outcome, info)


def valid(info: Mapping[str, Any]) -> bool | None:
    """Whether the environment could read the last action; None where it does not say."""
    said = info.get("valid")
    return bool(said) if isinstance(said, bool | np.bool_) else None


def score(env: Env, info: Mapping[str, Any]) -> End:
    """Of an episode that is cut: the environment's own `finish()` where it has one, else what its last info says."""
    finish = getattr(env.unwrapped, "finish", None)
    return end(_info(finish()) if finish is not None else info)


def end(info: Mapping[str, Any]) -> End:
    """What a last info says. Misbehaved also where the environment itself calls the episode failed."""
    if info.get("failed"):
        raise Misbehaved("environment", str(info["failed"]))
    return End(number("the completion", info.get("completion", 0.0), 0.0, 1.0), flag("info['success']", info.get("success", False)))


def flag(what: str, value: Any) -> bool:
    """A bool, also NumPy's, or 0 or 1; Misbehaved for anything else, whose truth might not be what is meant ("False")."""
    if value is True or value is False:  # as nearly always
        return value
    if not isinstance(value, int | np.bool_ | np.integer) or value not in (0, 1):
        raise Misbehaved("reward", f"{what} is {value!r:.80}, not a bool")
    return bool(value)


def _parts(call: str, answer: Any, n: int) -> tuple[Any, ...]:
    if not isinstance(answer, tuple) or len(answer) != n:
        size = f" of {len(answer)}" if isinstance(answer, tuple) else ""
        raise Misbehaved("observation", f"{call} returned a {type(answer).__name__}{size}, not a tuple of {n}")
    return answer


def _info(info: Any) -> Mapping[str, Any]:
    if type(info) is not dict and not isinstance(info, Mapping):
        raise Misbehaved("observation", f"info is a {type(info).__name__}, not a dict")
    return info


def _text(what: str, text: Any, most: int) -> str:
    if not isinstance(text, str):
        raise Misbehaved("observation", f"{what} is a {type(text).__name__}, not a str")
    if len(text) > most:
        raise Misbehaved("observation", f"{what} has {len(text):,} characters, more than {most:,} (rollout.max_observation_chars)")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise Misbehaved("observation", f"{what} is no text: a lone surrogate at character {e.start}") from e
    return text if type(text) is str else str.__str__(text)  # of NumPy's


def number(what: str, value: Any, least: float, most: float) -> float:
    """A finite number between two bounds, as a float. Misbehaved for anything else."""
    if type(value) is float and math.isfinite(value) and least <= value <= most:  # as nearly always
        return value
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise Misbehaved("reward", f"{what} is a {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Misbehaved("reward", f"{what} is {number}")
    if not least <= number <= most:
        raise Misbehaved("reward", f"{what} is {number:g}, not between {least:g} and {most:g}")
    return number
