"""From tasks to trajectories: conversation format, episodes and the collector. Tokens come from `skillsd.engines`."""

from skillsd.rollout.ask import ask, check_env, label, plan_of, tasks_of
from skillsd.rollout.background import Background
from skillsd.rollout.chat import Chat
from skillsd.rollout.collector import Collector, Row, make_env
from skillsd.rollout.demonstrate import demonstrate
from skillsd.rollout.settings import RolloutSettings
from skillsd.rollout.tasks_file import read_tasks

__all__ = [
    "Background",
    "Chat",
    "Collector",
    "RolloutSettings",
    "Row",
    "ask",
    "check_env",
    "demonstrate",
    "label",
    "make_env",
    "plan_of",
    "read_tasks",
    "tasks_of",
]
