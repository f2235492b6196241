"""Calls of environments outside of a rollout, where there is no episode to end: one that fails ends the command, in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from skillsd.errors import ConfigError
from skillsd.rollout.guard import failure

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
        spec = getattr(env.unwrapped, "spec", None)
        name = spec.id if spec is not None else type(env.unwrapped).__name__
        raise ConfigError(f"data.init_args.env: {name}: {call} failed ({failure(e).text()}): mend the environment.") from e


def tasks_of(env: Any, split: str) -> list[Mapping[str, Any]]:
    """`tasks(split)`, each with a task_id; TypeError if it gives something else."""
    listed = list(env.unwrapped.tasks(split))
    for task in listed:
        if not isinstance(task, Mapping) or not isinstance(task.get("task_id"), str):
            raise TypeError(f"tasks() must give dicts with a task_id as str, not {task!r:.80}")
    return listed


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
