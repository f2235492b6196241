"""check_text_env accepts a sound environment and names each breach of a broken one."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
from gymnasium import spaces

from skillsd.testing import check_text_env


class AnyText(spaces.Text):
    def __init__(self):
        super().__init__(max_length=8, min_length=0)

    def contains(self, x):
        return isinstance(x, str)


class Guess(gym.Env):
    """Say the word of the task within three turns."""

    observation_space = action_space = AnyText()
    answer = "I do not understand, say a or b"

    def tasks(self, split):
        if split != "train":
            raise KeyError(f"unknown split {split!r}; the only one is 'train'")
        return [{"task_id": word, "split": "train", "difficulty": "easy"} for word in ("a", "b")]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        word = (options or {}).get("task_id", "a")
        if word not in ("a", "b"):
            raise ValueError(f"unknown task {word!r}")
        self.word, self.turn = word, 0
        return "say a or b", {"task_id": word, "instruction": "guess"}

    def step(self, action):
        self.turn += 1
        over = action == self.word
        return self.answer, float(over), over, not over and self.turn == 3, {"success": over, "completion": float(over)}


def test_sound_environment_passes():
    check_text_env(Guess())
    check_text_env(Guess(), actions=["b", "a"])


@pytest.mark.parametrize(
    ("final", "finding"),
    [({"success": False, "completion": 0.5}, None), ({"success": True, "completion": 0.5}, "completes everything"),
     (None, r"finish\(\) .*info is a NoneType"), ({"success": False}, "float from 0 to 1")],
)  # fmt: skip
def test_finish_returns_the_final_info(final, finding):
    env = type("Finishing", (Guess,), {"finish": lambda self: final})()
    if finding is None:
        check_text_env(env)
    else:
        with pytest.raises(AssertionError, match=finding):
            check_text_env(env)


def failing(change=lambda info: info):
    """Guess, but an answer that it cannot read ends the episode as failed."""

    def step(self, action):
        obs, reward, over, truncated, info = Guess.step(self, action)
        if action in ("a", "b"):
            return obs, reward, over, truncated, info
        return obs, 0.0, True, False, change({"failed": f"crashed on {action!r}"})

    return type("Failing", (Guess,), {"step": step})


def test_an_episode_may_fail_on_what_cannot_be_read():
    check_text_env(failing()())
    check_text_env(failing()(), actions=["b", "a"])
    check_text_env(failing(lambda info: {"failed": None, "success": False, "completion": 0.0})())  # it did not


def test_it_checks_under_python_O():
    """`python -O` leaves assert statements out."""
    code = "import tests.test_testing as t; t.check_text_env(type('B', (t.Guess,), {'answer': None})())"
    result = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 1 and "the observation is a NoneType, not a str" in result.stderr


@pytest.mark.parametrize(
    ("method", "name", "only"),
    [("tasks", "tasks('train')", None), ("tasks", 'tasks("no such split")', "no such split"), ("reset", "reset", None),
     ("reset", "no such task", {"task_id": "no such task"}), ("solution", "solution()", None), ("finish", "finish()", None)],
)  # fmt: skip
def test_what_an_environment_raises_is_a_breach(method, name, only):
    """No traceback out of the environment, which would say nothing of the contract; `only`: for this argument alone."""

    def fails(self, *args, **kwargs):
        if only in (None, *args, *kwargs.values()):
            raise IndexError("list index out of range")
        return getattr(Guess, method)(self, *args, **kwargs)

    with pytest.raises(AssertionError) as e:
        check_text_env(type("Failing", (Guess,), {method: fails})())
    assert name in str(e.value) and "list index out of range" in str(e.value)


def test_scenarios_pass():
    listed = type("Some", (Guess,), {"tasks": lambda self, split: [t | {"scenario": "x"} for t in Guess.tasks(self, split)]})
    check_text_env(listed())


def test_own_actions_and_wrappers_pass():
    check_text_env(gym.wrappers.TimeLimit(Guess(), 2), actions=["x"])


def alter(method, change):
    """A class like Guess whose `method` has its result passed through `change(env, result)`."""

    def altered(self, *args, **kwargs):
        return change(self, getattr(Guess, method)(self, *args, **kwargs))

    return type("Broken", (Guess,), {method: altered})


def at(index, value):
    return lambda env, result: tuple(value(env) if i == index else item for i, item in enumerate(result))


def info(**changes):
    return lambda env, result: (*result[:-1], {**result[-1], **changes})


def count(env):
    env.calls = getattr(env, "calls", 0) + 1
    return env.calls


def raises(self, action):
    raise RuntimeError("cannot parse")


def free_turn(self, action):
    result = Guess.step(self, action)
    if action not in ("a", "b"):
        self.turn -= 1
        return (*result[:3], False, result[4])
    return result


def lenient_reset(self, *, seed=None, options=None):
    known = options["task_id"] in ("a", "b")
    return Guess.reset(self, seed=seed, options=options if known else {"task_id": "a"})


def lenient_tasks(self, split):
    return Guess.tasks(self, "train")


BROKEN = {
    "no tasks": (type("Broken", (Guess,), {"tasks": None}), "tasks.* is missing"),
    "empty split": (alter("tasks", lambda env, tasks: []), "has no tasks"),
    "task without difficulty": (alter("tasks", lambda env, tasks: [{"task_id": "a", "split": "train"}]), "difficulty"),
    "task id is a number": (alter("tasks", lambda env, tasks: [{**task, "task_id": 1} for task in tasks]), "a task_id as str"),
    "task of another split": (alter("tasks", lambda env, tasks: [{**task, "split": "test"} for task in tasks]), "another split"),
    "same task twice": (alter("tasks", lambda env, tasks: tasks + tasks), "twice"),
    "tasks change": (alter("tasks", lambda env, tasks: tasks[:: (-1) ** count(env)]), "same order"),
    "any split": (type("Broken", (Guess,), {"tasks": lenient_tasks}), "no such split"),
    "any task": (type("Broken", (Guess,), {"reset": lenient_reset}), "no such task"),
    "strict action space": (type("Broken", (Guess,), {"action_space": spaces.Text(8)}), "env.action_space refuses"),
    "strict observation space": (type("Broken", (Guess,), {"observation_space": spaces.Text(8)}), "env.observation_space refuses"),
    "no action space": (type("Broken", (Guess,), {"action_space": None}), "env.action_space is missing"),
    "reset without info": (alter("reset", lambda env, result: result[0]), r"\(observation, info\)"),
    "reset's observation": (alter("reset", at(0, lambda env: 1)), "the observation is a int, not a str"),
    "no instruction": (alter("reset", info(instruction=None)), "instruction"),
    "wrong task id": (alter("reset", info(task_id="z")), "plays another task"),
    "random reset": (alter("reset", at(0, lambda env: str(count(env)))), "same seed differ"),
    "state left over": (
        alter("reset", at(0, lambda env: str(env.__dict__.setdefault("first", set()).add(env.word) or len(env.first)))),
        "clear all state",
    ),
    "step raises": (type("Broken", (Guess,), {"step": raises}), "answer with a message instead"),
    "step's length": (alter("step", lambda env, result: result[:4]), "step returned a tuple of 4"),
    "step's observation": (alter("step", at(0, lambda env: b"map")), "the observation is a bytes, not a str"),
    "flag": (alter("step", at(2, lambda env: "no")), "terminated is 'no', not a bool"),
    "nan": (alter("step", at(1, lambda env: float("nan"))), "the reward is nan"),
    "early reward": (alter("step", at(1, lambda env: 0.1)), "before the end must be 0"),
    "reward is not completion": (alter("step", at(1, lambda env: 0.5 if env.turn == 3 else 0.0)), "must be the completion"),
    "no success": (alter("step", info(success=None)), r"info\['success'\]"),
    "completion above 1": (alter("step", info(completion=2.0)), "not between 0 and 1"),
    "success without completion": (alter("step", info(success=True)), "a success completes everything"),
    "random step": (alter("step", at(0, lambda env: str(count(env)))), "step must be deterministic"),
    "free turn": (type("Broken", (Guess,), {"step": free_turn}), "must cost a turn"),
    "empty answer": (type("Broken", (Guess,), {"answer": ""}), "say what is accepted"),
    "scenario is a number": (alter("tasks", lambda env, tasks: [{**task, "scenario": 1} for task in tasks]), "scenario must be a str"),
    "failed, as a flag": (failing(lambda info: {"failed": True}), r"info\['failed'\] must be a str that says why.* it is True"),
    "failed, without a word": (failing(lambda info: {"failed": ""}), r"info\['failed'\] must be a str that says why.* it is ''"),
    "failed, and goes on": (alter("step", info(failed="lost")), r"info\['failed'\] must come with terminated or truncated: 'lost'"),
    "plan that fails": (type("Broken", (failing(),), {"solution": lambda self: ["x"]}), "should play: crashed on 'x'"),
    "bad plan": (type("Broken", (Guess,), {"solution": lambda self: ["x"]}), "does not lead to success"),
    "plan of numbers": (type("Broken", (Guess,), {"solution": lambda self: [1]}), "as str"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_breach_is_named(name):
    broken, message = BROKEN[name]
    with pytest.raises(AssertionError, match=message):
        check_text_env(broken())


def test_given_actions_must_not_fail():
    with pytest.raises(AssertionError, match="should play: crashed on 'x'"):
        check_text_env(failing()(), actions=["x"])


def test_missing_split_is_named():
    with pytest.raises(AssertionError, match="Offer that split"):
        check_text_env(Guess(), split="test")
