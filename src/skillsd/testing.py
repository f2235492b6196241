"""Does an environment keep the contract (`skillsd.environment.TextEnvironment`)? `check_text_env` asks for everybody's environments, as
Gymnasium's `check_env` does, and `check_before_run` in short before a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium as gym

from skillsd.environment import TextEnv, TimeStep
from skillsd.errors import ConfigError
from skillsd.timeouts import Alarm, Failure
from skillsd.trajectory import Task

log = logging.getLogger(__name__)

UNREADABLE = ("", "\x00 \u2603 no such action")
"""Actions that no environment can read."""
Played = tuple[TimeStep, Mapping[str, Any]]
"""An answer and the info that came with it."""


def check_text_env(env: gym.Env, *, split: str = "train", actions: Sequence[str] | None = None, max_turns: int = 1000) -> None:
    """Play a few episodes on the first two tasks of a split, and more than once.

    Shaping breaks the contract: check with it turned off. An episode on actions that cannot be read may end as failed; one on a solution
    or on the given actions may not. The environment is not closed.

    Args:
        env: The environment.
        split: A split that it has.
        actions: Texts to play, again from the start when used up. Default: the plan of `solution()`, or else texts that cannot be read.
        max_turns: An episode that takes longer counts as endless.

    Raises:
        AssertionError: The first breach found, and what to do.
    """
    try:
        _check(TextEnv(env), split, actions, max_turns)
    except Failure as e:
        raise AssertionError(str(e).removeprefix("data.env: ")) from e


def check_before_run(env: TextEnv, tasks: Sequence[Task], seconds: float, may_fail: bool = False, tasks_file: str | None = None) -> None:
    """Reset to the first task and play a few actions that cannot be read; reset to each of the tasks if they are of a file.

    Args:
        env: An environment that nobody else plays.
        tasks: The tasks of the run.
        seconds: Time limit of a call; 0 for none.
        may_fail: Only warn of a breach, since every episode may fail (`data.rollout.max_failed` is 1).
        tasks_file: The file that the tasks are from; None where they are the environment's own.

    Raises:
        ConfigError: A call breaks the contract, raises or hangs, or the environment does not know a task of the file. That an episode on
            these actions ends as failed breaks nothing.
    """
    for task in tasks if tasks_file is not None else ():
        try:
            env.reset(task)
        except Failure as e:
            if isinstance(e.__cause__, Failure):  # its answer: the first task's is looked at below
                continue
            if isinstance(e.__cause__, ValueError | KeyError | TypeError):
                raise ConfigError(f"data.tasks_file: {tasks_file}, task {task.task_id}: {e.__cause__}") from e
            raise
    calls: dict[str, Callable[[], TimeStep]] = {f"reset() to task {tasks[0].task_id}": partial(env.reset, tasks[0])}
    calls |= {f"step({action!r})": partial(env.step, action) for action in UNREADABLE}
    calls |= {"finish()": env.finish} if env.offers("finish") else {}
    error: Failure | None = None
    with Alarm(seconds) as alarm:
        for call, work in calls.items():
            answer = alarm(work)
            error = env.failure(call, answer) if isinstance(answer, Failure) else None
            if error is not None or answer.finish is not None:
                break
    if error is None or error.kind == "environment":  # an episode may fail
        return
    if not may_fail:
        raise error
    log.warning("%s data.rollout.max_failed is 1, so the run begins.", error)


def _check(env: TextEnv, split: str, actions: Sequence[str] | None, max_turns: int) -> None:
    tasks = _check_tasks(env, split)
    _check_spaces(env)
    for task in tasks[:2]:
        _check_reset(env, task, other=tasks[-1])
        _check_replay(env, task, actions, max_turns)
        _check_unreadable(env, task, max_turns)
        _check_finish(env, task)
    none = Task("no such task")
    _refuses(lambda: env.reset(none), f"reset() to task {none.task_id}", ", not play another task")


def _require(kept: Any, finding: str) -> None:
    """As `assert`, which `python -O` leaves out."""
    if not kept:
        raise AssertionError(finding)


def _refuses(call: Callable[[], Any], name: str, instead: str) -> None:
    try:
        call()
    except Exception as e:
        error = e.__cause__ if isinstance(e, Failure) else e
        if isinstance(error, KeyError | ValueError) and not isinstance(error, Failure):
            return
        raise AssertionError(f"{name} must raise KeyError or ValueError{instead}; it raised {error!r}") from e
    raise AssertionError(f"{name} must raise KeyError or ValueError{instead}")


def _check_tasks(env: TextEnv, split: str) -> list[Task]:
    _require(env.offers("tasks"), "env.unwrapped.tasks(split) is missing: return a list of dicts with task_id, split and difficulty")
    try:
        tasks = env.tasks(split)
    except Failure:
        raise
    except ConfigError as e:
        raise AssertionError(f"tasks({split!r}): {e} Offer that split, or call check_text_env(env, split=...)") from e
    listed = env.unwrapped.tasks(split)
    for raw in listed:
        _require({"task_id", "split", "difficulty"} <= set(raw), f"a task is a dict with task_id, split, difficulty: {raw!r}")
        _require(isinstance(raw.get("scenario", ""), str), f"scenario must be a str, or be left out: {raw!r}")
        _require(raw["split"] == split, f"tasks({split!r}) lists a task of another split: {raw!r}")
    same = [raw["task_id"] for raw in listed] == [task.task_id for task in tasks]
    _require(same, f"tasks({split!r}) changes from call to call: return the same tasks in the same order")
    _refuses(lambda: env.unwrapped.tasks("no such split"), 'tasks("no such split")', " that names the known splits")
    return tasks


def _check_spaces(env: TextEnv) -> None:
    for name in ("observation_space", "action_space"):
        space: Any = getattr(env.env, name, None)
        _require(isinstance(space, gym.Space), f"env.{name} is missing: set it to a subclass of spaces.Text that accepts any str")
        for text in UNREADABLE:
            _require(space.contains(text), f"env.{name} refuses {text!r}: use a subclass of spaces.Text whose contains accepts any str")


def _reset(env: TextEnv, task: Task) -> Played:
    now = env.reset(task)
    for key in ("task_id", "instruction"):
        _require(isinstance(env.info.get(key), str), f"reset's info[{key!r}] must be a str; it is {env.info.get(key)!r}")
    return now, dict(env.info)


def _check_reset(env: TextEnv, task: Task, other: Task) -> None:
    first = _reset(env, task)
    _require(
        _reset(env, task) == first,
        f"two resets to task {task.task_id!r} with the same seed differ: derive all randomness from seed and task_id",
    )
    _reset(env, other)
    _require(_reset(env, task) == first, f"reset to {task.task_id!r} differs after another task was played: clear all state in reset")


def _play(env: TextEnv, task: Task, actions: Sequence[str], max_turns: int) -> list[Played]:
    """One episode, each step checked."""
    _reset(env, task)
    steps: list[Played] = []
    while len(steps) < max_turns:
        action = actions[len(steps) % len(actions)]
        try:
            now = env.step(action)
        except Failure as e:
            if e.kind == "raised":
                raise AssertionError(f"step({action!r}) raised {e.__cause__!r}: answer with a message instead, whatever the action") from e
            if e.kind != "environment":
                raise
            now = TimeStep("it failed", finish="failed")
        steps.append((now, dict(env.info)))
        failed, valid = env.info.get("failed"), env.info.get("valid", True)
        _require(isinstance(valid, bool), f"info['valid'] must be a bool (could the action be read?), or be left out; it is {valid!r}")
        if now.finish is None:
            _require(not failed, f"info['failed'] must come with terminated or truncated: {failed!r} at turn {len(steps)}")
            _require(
                now.reward == 0,
                f"the reward before the end must be 0; it was {now.reward} at turn {len(steps)}: pay the completion at the end, "
                "without shaping",
            )
            continue
        if failed is None:
            _check_end(now, env.info)
        else:
            said = isinstance(failed, str) and failed
            _require(said, f"info['failed'] must be a str that says why, and be left out otherwise; it is {failed!r}")
            _require(actions is UNREADABLE, f"the episode failed, on actions that should play: {failed}")
        return steps
    raise AssertionError(f"the episode had not ended after {max_turns} turns: every action, also one that cannot be read, must cost a turn")


def _check_end(now: TimeStep, info: Mapping[str, Any]) -> None:
    _require("success" in info, "info['success'] must be a bool at the end; it is missing")
    _require("completion" in info, "info['completion'] must be a float from 0 to 1 at the end; it is missing")
    _require(
        math.isclose(now.reward, now.completion, abs_tol=1e-9),
        f"the reward at the end must be the completion: {now.reward} against {now.completion}",
    )
    _require(
        not now.success or now.completion == 1,
        f"info['success'] is True while info['completion'] is {now.completion}: a success completes everything",
    )


def _check_replay(env: TextEnv, task: Task, actions: Sequence[str] | None, max_turns: int) -> None:
    plan: Sequence[str] = ()
    if env.offers("solution"):
        _reset(env, task)
        plan = env.solution()
    if plan:
        now, _ = _play(env, task, plan, max_turns)[-1]
        _require(now.success, f"solution() of task {task.task_id!r} does not lead to success")
    actions = actions or plan or UNREADABLE
    first = _play(env, task, actions, max_turns)
    again = _play(env, task, actions, max_turns)
    _require(again == first, f"the same actions on task {task.task_id!r} gave another episode: step must be deterministic")


def _check_finish(env: TextEnv, task: Task) -> None:
    if env.offers("finish"):
        _reset(env, task)
        _check_end(env.finish(), env.info)


def _check_unreadable(env: TextEnv, task: Task, max_turns: int) -> None:
    steps = _play(env, task, UNREADABLE, max_turns)
    answered = all(now.observation for now, _ in steps)
    _require(answered, "an action that cannot be read was answered with an empty observation: say what is accepted")
