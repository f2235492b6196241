"""Sokoban in which a step of a rollout of rank 1 takes longer than anybody's patience but that for rollouts."""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium

SECONDS = 20.0
SLOW = 5
"""Which step is slow: the first few are those of the check before the run."""


class Slow(gymnasium.Wrapper):
    steps = 0

    def step(self, action: Any) -> Any:
        Slow.steps += 1
        if os.environ.get("LOCAL_RANK") == "1" and Slow.steps == SLOW:
            time.sleep(SECONDS)
        return self.env.step(action)


def make(**kwargs: Any) -> gymnasium.Env:
    return Slow(gymnasium.make("skillsd_sokoban:skillsd/Sokoban-v0", disable_env_checker=True, **kwargs))


gymnasium.register("tests/Slow-v0", entry_point=make)
