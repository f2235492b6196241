"""Sokoban as a text environment for Gymnasium. `gymnasium.make("skillsd_sokoban:skillsd/Sokoban-v0")` imports and builds it."""

import gymnasium

from skillsd_sokoban.env import SokobanEnv
from skillsd_sokoban.level import Level

__all__ = ["Level", "SokobanEnv"]

# The environment itself counts turns, checks the order of calls and accepts any text: a wrapper would only cost time.
gymnasium.register("skillsd/Sokoban-v0", entry_point="skillsd_sokoban.env:SokobanEnv", order_enforce=False, disable_env_checker=True)
