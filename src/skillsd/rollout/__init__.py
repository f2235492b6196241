"""From tasks to trajectories: conversation format, sampling noise, engines and the collector."""

from skillsd.rollout.ask import ask, check_env, label, plan_of, tasks_of
from skillsd.rollout.background import Background
from skillsd.rollout.cache import CacheFull, Room
from skillsd.rollout.chat import Chat
from skillsd.rollout.collector import Collector, Row, make_env
from skillsd.rollout.demonstrate import demonstrate
from skillsd.rollout.engine import Completion, Engine, Request, Session
from skillsd.rollout.in_process import InProcessEngine
from skillsd.rollout.make_engine import make_engine
from skillsd.rollout.settings import RolloutSettings
from skillsd.rollout.tasks_file import read_tasks
from skillsd.rollout.vllm_server import VllmServers

__all__ = [
    "Background",
    "CacheFull",
    "Chat",
    "Collector",
    "Completion",
    "Engine",
    "InProcessEngine",
    "Request",
    "RolloutSettings",
    "Room",
    "Row",
    "Session",
    "VllmServers",
    "ask",
    "check_env",
    "demonstrate",
    "label",
    "make_engine",
    "make_env",
    "plan_of",
    "read_tasks",
    "tasks_of",
]
