"""An environment whose tasks name what it does wrong, and when."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np
import pytest

CONTROL = "".join(map(chr, [*range(32), 127, 0x9B, 0x202E])) + "\x1b[2J\u2028"


class RudeError(Exception):
    """It cannot say what it is."""

    def __str__(self) -> str:
        raise ValueError


def boom(error: BaseException) -> Any:
    raise error


def spin() -> None:
    """A loop that catches whatever is raised into it, once."""
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)


INFO = {"completion": 0.5, "success": False}


MISDEEDS: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (lambda: boom(OSError("the host\nis gone")), "raised: OSError: the host is gone"),
    "raises what cannot be said": (lambda: boom(RudeError()), "raised: RudeError"),
    "raises a book": (lambda: boom(ValueError("x" * 10_000_000)), "raised: ValueError: xxx"),
    "raises escapes": (lambda: boom(ValueError("\x1b[2J\ud800")), "raised: ValueError: \\x1b[2J\\ud800"),
    "out of memory": (lambda: boom(MemoryError()), "raised: MemoryError"),
    "sleeps": (lambda: time.sleep(60), "hung: no answer in 1 s (data.rollout.env_timeout)"),
    "sleeps on": (spin, "hung: no answer in 1 s"),
    "bytes": (lambda: (b"up", 0.0, False, False, INFO), "observation: the observation is a bytes, not a str"),
    "nothing": (lambda: None, "observation: step returned a NoneType, not (observation, reward, terminated, truncated, info)"),
    "too little": (lambda: ("up", 0.0), "observation: step returned a tuple of 2, not (observation, reward"),
    "no info": (lambda: ("up", 0.0, False, False, None), "observation: info is a NoneType, not a dict"),
    "10 MB": (
        lambda: ("up " * 3_495_254, 0.0, False, False, INFO),
        "observation: the observation has 10,485,762 characters, more than 1,000,000 (data.rollout.max_observation_chars)",
    ),
    "surrogate": (
        lambda: ("up \ud83d", 0.0, False, False, INFO),
        "observation: the observation is no text: a lone surrogate at character 3",
    ),
    "nan": (lambda: ("up", math.nan, False, False, INFO), "reward: the reward is nan"),
    "numpy's inf": (lambda: ("up", np.float32("inf"), True, False, INFO), "reward: the reward is inf"),
    "a huge int": (lambda: ("up", 10**400, False, False, INFO), "reward: the reward is inf"),
    "a text": (lambda: ("up", "1.0", False, False, INFO), "reward: the reward is a str, not a number"),
    "nan completion": (lambda: ("up", 0.0, True, False, {"completion": math.nan}), "reward: the completion is nan"),
    "too complete": (lambda: ("up", 0.0, False, True, {"completion": 1.5}), "reward: the completion is 1.5, not between 0 and 1"),
    "gives up": (lambda: ("up", 1.0, True, False, INFO | {"failed": "the\nhost"}), "environment: the host"),
}  # fmt: skip


class Hostile(gymnasium.Env):
    """Three turns. A task `name:turn` does the misdeed at that turn (0 is the reset); others play on."""

    observation_space = action_space = gymnasium.spaces.Text(1)
    made: list[Hostile] = []

    def __init__(self, says: str = "up ", closing: Callable[[], None] = lambda: None) -> None:
        self.says, self.closing, self.actions, self.closed = says, closing, [], threading.Event()
        self.made.append(self)

    def tasks(self, split: str) -> list[dict[str, Any]]:
        return [{"task_id": t} for t in (self.splits[split] if isinstance(self.splits, Mapping) else [])]

    splits: Any = None

    def reset(self, *, seed=None, options=None):
        self.misdeed, _, when = options["task_id"].partition(":")
        self.when, self.turn = int(when) if when else -1, 0
        if self.when == 0:
            answer = MISDEEDS[self.misdeed][0]()
            return answer if answer is None else (answer[0], answer[-1])
        return self.says * 3, {"task_id": options["task_id"], "instruction": ""}

    def step(self, action):
        self.turn += 1
        self.actions.append(action)
        if self.turn == self.when:
            return MISDEEDS[self.misdeed][0]()
        over = self.turn == 3
        return self.says * self.turn, 0.25, over, False, {"completion": float(over), "success": over}

    def close(self):
        self.closed.set()
        self.closing()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gymnasium.register("test/Hostile-v0", Hostile, disable_env_checker=True, order_enforce=False)
    Hostile.made = []
    yield
    del gymnasium.registry["test/Hostile-v0"]
