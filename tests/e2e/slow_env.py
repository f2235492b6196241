"""Sokoban in which the first step of rank 1 takes longer than anybody's patience but that for rollouts."""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium

SECONDS = 20.0


class Slow(gymnasium.Wrapper):
    waited = False

    def step(self, action: Any) -> Any:
        if os.environ.get("LOCAL_RANK") == "1" and not Slow.waited:
            Slow.waited = True
            time.sleep(SECONDS)
        return self.env.step(action)


def make(**kwargs: Any) -> gymnasium.Env:
    return Slow(gymnasium.make("skillsd_sokoban:skillsd/Sokoban-v0", disable_env_checker=True, **kwargs))


gymnasium.register("tests/Slow-v0", entry_point=make)
