"""Calls of environments outside of a rollout, where there is no episode to end: one that fails ends the command, in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

from skillsd.bounded import visible
from skillsd.errors import ConfigError
from skillsd.rollout import answers
from skillsd.rollout.settings import RolloutSettings
from skillsd.timeouts import MOST_SAID, Alarm, Failure, failure
from skillsd.trajectory import Task

log = logging.getLogger(__name__)
T = TypeVar("T")


def ask(env: Any, call: str, work: Callable[[], T], told: tuple[type[Exception], ...] = ()) -> T:
    """What `work` gives.

    Args:
        env: The environment.
        call: What is called, for the error.
        work: Calls it, and raises if the answer is not what it should be.
        told: Errors that are not the environment's fault, such as an unknown split; they come as they are.

    Raises:
        ConfigError: it raised; the traceback is that of SKILLSD_DEBUG=1.
    """
    try:
        return work()
    except told:
        raise
    except Exception as e:
        cure = "" if isinstance(e, OSError | MemoryError) else ": mend the environment"  # those may be the machine's
        raise ConfigError(f"data.init_args.env: {_name(env)}: {call} failed ({failure(e).text()}){cure}.") from e


UNREADABLE = ("", "\x00 \u2603 no such action")
"""Actions that no environment can read."""


def check_env(env: Any, task: Task, settings: RolloutSettings) -> None:
    """`skillsd.testing.check_text_env` in short, before a run: one reset, and a few actions that cannot be read. What a rollout would take
    for a failed episode is found, and an environment that plays another task than it is asked for.

    Args:
        env: The environment, which nobody else plays.
        task: What it is reset to.
        settings: A rollout's limits.

    Raises:
        ConfigError: A call breaks the contract, raises or hangs. Where all episodes may fail (`rollout.max_failed` is 1) it is a warning.
            That an episode on these actions ends as failed breaks nothing.
    """
    most = settings.max_observation_chars
    try:
        with Alarm(settings.env_timeout) as alarm:
            start = _ask(alarm, f"reset() to task {task.task_id}", lambda: answers.reset(env, task, most))
            if (played := start.info.get("task_id", task.task_id)) != task.task_id:
                raise _Breach(f"reset() to task {task.task_id}: info['task_id'] is {played!r:.80}, so it plays another task")
            for action in UNREADABLE:
                if _ask(alarm, f"step({action!r})", partial(answers.step, env, action, most)).finish is not None:
                    return
            if hasattr(env.unwrapped, "finish"):
                _ask(alarm, "finish()", lambda: answers.score(env, {}))
    except _Breach as e:
        said = f"data.init_args.env: {_name(env)}: {visible(' '.join(str(e).split()))[:MOST_SAID]}"
        if settings.max_failed < 1:
            raise ConfigError(f"{said}: mend the environment; skillsd.testing.check_text_env finds the rest.") from e
        log.warning("%s; rollout.max_failed is 1, so the run begins.", said)
    except _Failed:
        return


class _Breach(Exception):
    """What an environment does against the contract, in one line."""


class _Failed(Exception):
    """It says that the episode failed, which it may."""


def _ask(alarm: Alarm, call: str, work: Callable[[], T]) -> T:
    found = alarm(work)
    if isinstance(found, Failure):
        raise _Failed if found.kind == "environment" else _Breach(f"{call}: {found.what}")
    return cast(T, found)


def tasks_of(env: Any, split: str) -> list[Mapping[str, Any]]:
    """`tasks(split)`: dicts with a task_id (str) of its own each; `difficulty` and `scenario`, if given, are text or numbers.

    Raises:
        TypeError: It gives something else.
    """
    listed = list(env.unwrapped.tasks(split))
    known = set()
    for task in listed:
        if not isinstance(task, Mapping) or not isinstance(task.get("task_id"), str) or not task["task_id"]:
            raise TypeError(f"tasks() must give dicts with a task_id as str, not {task!r:.80}")
        for key in ("difficulty", "scenario"):
            if not isinstance(task.get(key), str | int | float | None):
                raise TypeError(f"tasks() must give a {key} as str, or none, not {task[key]!r:.80}")
        if task["task_id"] in known:
            raise TypeError(f"tasks() lists the task_id {task['task_id']!r:.80} twice: its episodes would be copies")
        known.add(task["task_id"])
    return listed


def label(value: Any) -> str:
    """A task's difficulty or scenario as text; "" without one."""
    return "" if value is None else str(value)


def _name(env: Any) -> str:
    spec = getattr(env.unwrapped, "spec", None)
    return str(spec.id) if spec is not None else type(env.unwrapped).__name__


def plan_of(env: Any) -> list[str]:
    """`solution()`: the actions to success from here; empty where there are none.

    Raises:
        ConfigError: it raises, or gives something else.
    """

    def plan() -> list[str]:
        found = env.unwrapped.solution()
        if found is not None and not (isinstance(found, list | tuple) and all(isinstance(action, str) for action in found)):
            raise TypeError(f"solution() must give a list of actions as str, or None, not {found!r:.80}")
        return list(found or ())

    return ask(env, "solution()", plan)
