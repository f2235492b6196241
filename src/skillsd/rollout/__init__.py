"""From tasks to trajectories: conversation format, episodes and the collector. Tokens come from `skillsd.engines`."""

from skillsd.rollout.background import Background
from skillsd.rollout.chat import Chat
from skillsd.rollout.collector import Collector, Episode
from skillsd.rollout.settings import RolloutSettings

__all__ = [
    "Background",
    "Chat",
    "Collector",
    "Episode",
    "RolloutSettings",
]
