"""`check_text_env`: does an environment keep the contract that skillsd trains on? For everybody's environments, as Gymnasium's `check_env`.

The contract: observations and actions are str, any str is in both spaces (a subclass of `spaces.Text` whose `contains` says so);
`reset(seed=, options={"task_id": ...})` is deterministic, and raises KeyError or ValueError for a task that does not exist; info carries
task_id and instruction from the start, success (bool) and completion (0..1) at the end, 1 with a success; the reward is the completion at
the end and 0 before; an action that cannot be read costs a turn, is answered (not with "") and never raises; `env.unwrapped.tasks(split)`
lists the tasks, each with a task_id of its own, split, difficulty and, where several count together, scenario (str), and raises KeyError
or ValueError, naming the splits, for another split. An episode that the environment cannot carry on ends with info["failed"], a str that
says why; the rest of that info does not count. Optional: info["valid"] of a step (bool), whether the action could be read: a run warns
when none ever could; `solution()` lists the actions that lead from the present state to success; `finish()` ends the episode early and
returns the final info, for an environment that knows its completion at the end only; `agents` maps the names of scripted agents to
callables that make one with `act(observation) -> action`; `picture(observation)` draws what an observation shows, as [H, W, 3] of uint8,
or returns None, whatever the text; `metadata["action_language"]` names the language of actions that are code, "python".
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import gymnasium as gym

_UNREADABLE = ("", "\x00 \u2603 no such action")


def check_text_env(env: gym.Env, *, split: str = "train", actions: Sequence[str] | None = None, max_turns: int = 1000) -> None:
    """Plays a few episodes on the first two tasks of `split`; AssertionError, saying what to fix, for the first breach found.

    actions: texts to play when replaying an episode, again from the start when used up. Default: the plan of `env.unwrapped.solution()` if
        there is such a method, else texts that no environment can read.
    max_turns: an episode that takes longer counts as endless.
    Reward shaping breaks the contract, so check with it turned off. An episode on actions that cannot be read may end as failed
    (info["failed"]); one that fails on a plan or on the given actions is a breach. The environment is not closed.
    """
    tasks = _check_tasks(env, split)
    _check_spaces(env)
    for task in tasks[:2]:
        _check_reset(env, task["task_id"], other=tasks[-1]["task_id"])
        _check_replay(env, task["task_id"], actions, max_turns)
        _check_unreadable(env, task["task_id"], max_turns)
        _check_finish(env, task["task_id"])
    no_task = {"task_id": "no such task"}
    _refuses(lambda: env.reset(seed=0, options=no_task), f"reset(options={no_task})", ", not play another task")


def _require(kept: Any, finding: str) -> None:
    """As `assert`, which `python -O` leaves out."""
    if not kept:
        raise AssertionError(finding)


def _called(call: Callable[[], Any], name: str) -> Any:
    """The answer of an environment's method; what it raises is a breach."""
    try:
        return call()
    except Exception as error:
        raise AssertionError(f"{name} raised {error!r}") from error


def _refuses(call: Callable[[], Any], name: str, instead: str) -> None:
    try:
        call()
    except (KeyError, ValueError):
        return
    except Exception as error:
        raise AssertionError(f"{name} must raise KeyError or ValueError, and raised {error!r}") from error
    raise AssertionError(f"{name} must raise KeyError or ValueError{instead}")


def _check_tasks(env: gym.Env, split: str) -> list[dict[str, Any]]:
    listing: Any = getattr(env.unwrapped, "tasks", None)
    _require(callable(listing), "env.unwrapped.tasks(split) is missing: return a list of dicts with task_id, split and difficulty")
    try:
        tasks = listing(split)
    except Exception as error:
        raise AssertionError(f"tasks({split!r}) raised {error!r}: offer that split, or call check_text_env(env, split=...)") from error
    _require(isinstance(tasks, list) and tasks, f"tasks({split!r}) must return a list with at least one task, not {tasks!r:.80}")
    for task in tasks:
        _require(
            isinstance(task, dict) and {"task_id", "split", "difficulty"} <= set(task),
            f"a task is a dict with task_id, split, difficulty: {task!r}",
        )
        _require(isinstance(task["task_id"], str) and task["task_id"], f"task_id must be a str that is not empty: {task!r}")
        _require(isinstance(task.get("scenario", ""), str), f"scenario must be a str, or be left out: {task!r}")
        _require(task["split"] == split, f"tasks({split!r}) lists a task of another split: {task!r}")
    ids = [task["task_id"] for task in tasks]
    _require(len(set(ids)) == len(ids), f"tasks({split!r}) lists a task_id twice: give every task its own")
    _require(listing(split) == tasks, f"tasks({split!r}) changes from call to call: return the same tasks in the same order")
    _refuses(lambda: listing("no such split"), 'tasks("no such split")', " that names the known splits")
    return tasks


def _check_spaces(env: gym.Env) -> None:
    for name in ("observation_space", "action_space"):
        space: Any = getattr(env, name, None)
        _require(isinstance(space, gym.Space), f"env.{name} is missing: set it to a subclass of spaces.Text that accepts any str")
        for text in _UNREADABLE:
            _require(space.contains(text), f"env.{name} refuses {text!r}: use a subclass of spaces.Text whose contains accepts any str")


def _reset(env: gym.Env, task_id: str) -> tuple[str, dict[str, Any]]:
    result = _called(lambda: env.reset(seed=0, options={"task_id": task_id}), f"reset(options={{'task_id': {task_id!r}}})")
    _require(isinstance(result, tuple) and len(result) == 2, "reset must return (observation, info)")
    obs, info = result
    _require(isinstance(obs, str), f"reset's observation must be a str, not {type(obs).__name__}")
    _require(isinstance(info, dict), f"reset's info must be a dict, not {type(info).__name__}")
    for key in ("task_id", "instruction"):
        _require(isinstance(info.get(key), str), f"reset's info[{key!r}] must be a str; it is {info.get(key)!r}")
    _require(info["task_id"] == task_id, f"reset was asked for task {task_id!r} and info['task_id'] is {info['task_id']!r}")
    return obs, info


def _check_reset(env: gym.Env, task_id: str, other: str) -> None:
    first = _reset(env, task_id)
    _require(
        _reset(env, task_id) == first,
        f"two resets to task {task_id!r} with the same seed differ: derive all randomness from seed and task_id",
    )
    _reset(env, other)
    _require(_reset(env, task_id) == first, f"reset to {task_id!r} differs after another task was played: clear all state in reset")


def _play(env: gym.Env, task_id: str, actions: Sequence[str], max_turns: int) -> list[tuple]:
    """One episode as a list of (observation, reward, terminated, truncated, info), each checked."""
    _reset(env, task_id)
    steps: list[tuple] = []
    while len(steps) < max_turns:
        action = actions[len(steps) % len(actions)]
        try:
            result: Any = env.step(action)
        except Exception as error:
            raise AssertionError(f"step({action!r}) raised {error!r}: answer with a message instead, whatever the action") from error
        _require(isinstance(result, tuple) and len(result) == 5, "step must return (observation, reward, terminated, truncated, info)")
        obs, reward, terminated, truncated, info = result
        over = terminated or truncated
        _require(isinstance(obs, str), f"step's observation must be a str, not {type(obs).__name__}")
        _require(isinstance(info, dict), f"step's info must be a dict, not {type(info).__name__}")
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            _require(isinstance(flag, bool), f"step's {name} must be a bool, not {type(flag).__name__}")
        _require(isinstance(reward, int | float) and math.isfinite(reward), f"the reward must be a finite float; it is {reward!r}")
        valid = info.get("valid", True)
        _require(isinstance(valid, bool), f"info['valid'] must be a bool (could the action be read?), or be left out; it is {valid!r}")
        steps.append((obs, float(reward), terminated, truncated, dict(info)))
        if over:
            if info.get("failed") is None:
                _check_end(reward, info)
            else:
                _check_failed(info["failed"], actions)
            return steps
        _require(
            not info.get("failed"), f"info['failed'] must come with terminated or truncated: {info.get('failed')!r} at turn {len(steps)}"
        )
        _require(
            reward == 0,
            f"the reward before the end must be 0; it was {reward} at turn {len(steps)}: pay the completion at the end, without shaping",
        )
    raise AssertionError(f"the episode had not ended after {max_turns} turns: every action, also one that cannot be read, must cost a turn")


def _check_end(reward: float, info: dict[str, Any]) -> None:
    success, completion = info.get("success"), cast(float, info.get("completion"))
    _require(isinstance(success, bool), f"info['success'] must be a bool at the end; it is {success!r}")
    number = isinstance(completion, int | float) and not isinstance(completion, bool)
    _require(
        completion is not None and number and 0 <= completion <= 1,
        f"info['completion'] must be a float from 0 to 1 at the end; it is {completion!r}",
    )
    _require(math.isclose(reward, completion, abs_tol=1e-9), f"the reward at the end must be the completion: {reward} against {completion}")
    _require(
        not success or completion == 1, f"info['success'] is True while info['completion'] is {completion}: a success completes everything"
    )


def _check_failed(reason: Any, actions: Sequence[str]) -> None:
    _require(isinstance(reason, str) and reason, f"info['failed'] must be a str that says why, and be left out otherwise; it is {reason!r}")
    _require(actions is _UNREADABLE, f"the episode failed, on actions that should play: {reason}")


def _check_replay(env: gym.Env, task_id: str, actions: Sequence[str] | None, max_turns: int) -> None:
    plan = None
    if hasattr(env.unwrapped, "solution"):
        _reset(env, task_id)
        plan = _called(env.unwrapped.solution, "solution()")
    if plan:
        _require(all(isinstance(action, str) for action in plan), "solution() must return a list of actions as str, or None")
        info = _play(env, task_id, plan, max_turns)[-1][4]
        _require(info["success"], f"solution() of task {task_id!r} does not lead to success")
    actions = actions or plan or _UNREADABLE
    first = _play(env, task_id, actions, max_turns)
    again = _play(env, task_id, actions, max_turns)
    _require(again == first, f"the same actions on task {task_id!r} gave another episode: step must be deterministic")


def _check_finish(env: gym.Env, task_id: str) -> None:
    if not hasattr(env.unwrapped, "finish"):
        return
    _reset(env, task_id)
    info = _called(env.unwrapped.finish, "finish()")
    _require(isinstance(info, dict), f"finish() must return the final info, a dict, not {type(info).__name__}")
    completion = info.get("completion")
    _check_end(completion if isinstance(completion, int | float) else math.nan, info)


def _check_unreadable(env: gym.Env, task_id: str, max_turns: int) -> None:
    steps = _play(env, task_id, _UNREADABLE, max_turns)
    _require(all(obs for obs, *_ in steps), "an action that cannot be read was answered with an empty observation: say what is accepted")
