"""TextEnv: what it asks, what it makes of the answers, and the line that names environment and call where one breaks the contract."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest

from skillsd import cli
from skillsd.demonstration import demonstrate, play
from skillsd.environment import TextEnv, TimeStep, make_env
from skillsd.errors import ConfigError
from skillsd.testing import check_before_run
from skillsd.timeouts import Failure
from skillsd.trajectory import Task, Turn

ENV = "test/Rude-v0"


def boom(*_: Any) -> Any:
    raise RuntimeError("the host\nis gone")


class Rude(gymnasium.Env):
    """Two turns; what is in `says` replaces a method."""

    observation_space = action_space = gymnasium.spaces.Text(1)
    actions = ("up",)
    agents: dict[str, Any] = {}
    says: dict[str, Callable[..., Any]] = {}

    def tasks(self, split):
        return self.says.get("tasks", lambda split: [{"task_id": f"{split}-0"}])(split)

    def solution(self):
        return self.says.get("solution", lambda: ["up"])()

    def reset(self, *, seed=None, options=None):
        return self.says.get("reset", lambda: ("start", {}))()

    def step(self, action):
        return self.says.get("step", lambda: ("end", 1.0, True, False, {"success": True, "completion": 1.0}))()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Rude, "says", {})
    gymnasium.register(ENV, Rude, disable_env_checker=True, order_enforce=False)
    yield
    del gymnasium.registry[ENV]


RUBBISH: dict[str, tuple[str, Callable[..., Any], str]] = {
    "tasks raises": ("tasks", boom, "RuntimeError: the host is gone"),
    "tasks is nothing": ("tasks", lambda split: None, "TypeError: 'NoneType' object is not iterable"),
    "tasks are texts": ("tasks", lambda split: ["a"], "tasks() must give dicts with a task_id as str, not 'a'"),
    "a task has no name": ("tasks", lambda split: [{"split": "x"}], "tasks() must give dicts with a task_id as str"),
    "solution raises": ("solution", boom, "RuntimeError: the host is gone"),
    "solution is a text": ("solution", lambda: "up", "it must give a list of actions as str, or None, not 'up'"),
    "solution holds numbers": ("solution", lambda: [1], "it must give a list of actions as str, or None, not [1]"),
    "reset raises": ("reset", boom, "RuntimeError: the host is gone"),
    "reset is nothing": ("reset", lambda: None, "reset returned a NoneType, not (observation, info)"),
    "reset gives bytes": ("reset", lambda: (b"start", {}), "the observation is a bytes, not a str"),
    "step raises": ("step", boom, "RuntimeError: the host is gone"),
    "step is too little": ("step", lambda: ("end", 1.0), "step returned a tuple of 2, not (observation, reward, "),
    "the reward is no number": ("step", lambda: ("end", "much", True, False, {}), "the reward is a str, not a number"),
}


@pytest.mark.parametrize("name", RUBBISH)
def test_play_says_so_in_one_line(name, tmp_path, monkeypatch, capsys):
    call, does, finding = RUBBISH[name]
    monkeypatch.setattr(Rude, "says", {call: does})
    monkeypatch.chdir(tmp_path)
    env = [f"--data.env={ENV}", "--data.env_kwargs={}"]
    assert cli.main(["play", "-c", "sokoban", *env, "--policy=oracle"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: data\.env: {ENV}: {call}\(.*\n", said), said
    assert finding in said


@pytest.mark.parametrize("name", [name for name in RUBBISH if not name.startswith(("tasks", "a task"))])
def test_a_demonstration_says_so(name, monkeypatch):
    call, does, finding = RUBBISH[name]
    monkeypatch.setattr(Rude, "says", {call: does})
    with pytest.raises(ConfigError, match=rf"data\.env: {ENV}: {call}\(") as error:
        demonstrate(make_env(ENV, {}), Task("a"))
    assert finding in str(error.value) and error.value.__cause__ is not None


# -- before a run ----------------------------------------------------------------------------------------------------------------------

END = {"success": True, "completion": 1.0}
BREACHES: dict[str, tuple[str, Callable[..., Any], str]] = {
    "no instruction": (
        "reset",
        lambda: ("start", {"instruction": None}),
        "info['instruction'] is a NoneType, not a str",
    ),
    "a conversation": ("reset", lambda: ("start", {"instruction": [{"role": "user"}]}), "info['instruction'] is a list, not a str"),
    "bytes": ("reset", lambda: ("start", {"instruction": b"go"}), "info['instruction'] is a bytes, not a str"),
    "a number": ("reset", lambda: ("start", {"instruction": 7}), "info['instruction'] is a int, not a str"),
    "an observation in bytes": ("reset", lambda: (b"start", {}), "the observation is a bytes, not a str"),
    "another task": ("reset", lambda: ("start", {"task_id": "b"}), "info['task_id'] is 'b', so it plays another task"),
    "reset raises": ("reset", boom, "reset() to task a failed (raised: RuntimeError: the host is gone)"),
    "step raises": ("step", boom, "step('') failed (raised: RuntimeError: the host is gone)"),
    "no observation": ("step", lambda: (None, 0.0, False, False, {}), "the observation is a NoneType, not a str"),
    "nan": ("step", lambda: ("end", float("nan"), False, False, {}), "the reward is nan"),
    "beyond float32": ("step", lambda: ("end", 1e39, True, False, END), "the reward is 1e+39, not between -1e+37 and 1e+37"),
    "a text for success": ("step", lambda: ("end", 1.0, True, False, {"success": "False"}), "info['success'] is 'False', not a bool"),
    "a count for success": ("step", lambda: ("end", 1.0, True, False, {"success": 3}), "info['success'] is 3, not a bool"),
    "a text for terminated": ("step", lambda: ("end", 1.0, "no", False, {}), "terminated is 'no', not a bool"),
    "too complete": ("step", lambda: ("end", 1.0, True, False, {"completion": 1.5}), "the completion is 1.5, not between 0 and 1"),
    "finish": ("finish", lambda: {"completion": 50}, "the completion is 50, not between 0 and 1"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_what_breaks_the_contract_is_found_before_a_run(name, monkeypatch, caplog):
    call, does, finding = BREACHES[name]
    goes_on = {"step": lambda: ("go on", 0.0, False, False, {})}
    monkeypatch.setattr(Rude, "says", {**goes_on, call: does})
    monkeypatch.setattr(Rude, "finish", lambda self: self.says["finish"](), raising=False)
    with pytest.raises(ConfigError) as error:
        check_before_run(make_env(ENV, {}), [Task("a")], 9.0)
    line = str(error.value)
    assert line.startswith(f"data.env: {ENV}: {call}(") and finding in line and "\n" not in line
    check_before_run(make_env(ENV, {}), [Task("a")], 9.0, may_fail=True)
    assert finding in caplog.text


def test_what_hangs_is_found_before_a_run(monkeypatch):
    monkeypatch.setattr(Rude, "says", {"reset": lambda: time.sleep(60)})
    with pytest.raises(Failure) as error:
        check_before_run(make_env(ENV, {}), [Task("a")], 0.2)
    assert error.value.kind == "hung" and "rollout.env_timeout" in str(error.value)


def test_numpy_values_are_taken(monkeypatch):
    """NumPy's scalars and texts are what they say, to the type; an episode may end as failed on actions that cannot be read."""
    said = {"success": np.bool_(True), "completion": np.float32(0.5), "instruction": np.str_("Löse es"), "valid": np.bool_(True)}
    monkeypatch.setattr(Rude, "says", {"reset": lambda: (np.str_("a"), said), "step": lambda: ("b", np.int64(1), np.bool_(True), 0, said)})
    env = make_env(ENV, {})
    check_before_run(env, [Task("a")], 9.0)
    first, last = env.reset(Task("a")), env.step("up")
    assert first == TimeStep("a", "Löse es") and {type(x) for x in first[:2]} == {str}
    assert last == TimeStep("b", "", 1.0, "done", 0.5, True, True) and type(last.success) is type(last.valid) is bool
    monkeypatch.setattr(Rude, "says", {"step": lambda: ("b", 0.0, True, False, {"failed": "it crashed"})})
    check_before_run(env, [Task("a")], 9.0)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_run_asks_before_it_begins(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Rude, "says", {"reset": lambda: ("start", {"instruction": None})})
    monkeypatch.chdir(tmp_path)
    env = [f"--data.env={ENV}", "--data.env_kwargs={}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    assert cli.main([stage, "-c", "sokoban", *env]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "data.env: test/Rude-v0: reset() to task " in said
    assert not (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.parametrize("twice", [["a", "a"], ["a", "b", "a"]])
def test_a_repeated_task_id_is_refused(twice, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Rude, "says", {"tasks": lambda split: [{"task_id": name} for name in twice]})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["play", "-c", "sokoban", f"--data.env={ENV}", "--data.env_kwargs={}", "--policy=oracle"]) == 2
    assert "lists the task_id 'a' twice" in capsys.readouterr().err


def test_labels_of_tasks_are_what_was_given(monkeypatch):
    listed = [{"task_id": "a", "difficulty": 0, "scenario": None}, {"task_id": "b", "difficulty": "hard"}]
    monkeypatch.setattr(Rude, "says", {"tasks": lambda split: listed})
    assert make_env(ENV, {}).tasks("x") == [Task("a", "x", "0"), Task("b", "x", "hard")]
    listed[0]["scenario"] = ["x"]
    with pytest.raises(Failure, match="scenario is"):
        make_env(ENV, {}).tasks("x")


# -- what is asked ---------------------------------------------------------------------------------------------------------------------


class Asked(Rude):
    """It remembers how it was reset, scores an episode that is cut, and draws."""

    def __init__(self) -> None:
        self.resets: list[Any] = []

    def reset(self, *, seed=None, options=None):
        self.resets.append((seed, options))
        return "start", {"task_id": options["task_id"], "instruction": "play"}

    def step(self, action):
        return f"after {action}", 0.0, False, False, {"valid": action == "up", "completion": 0.25}

    def finish(self):
        return {"completion": 0.5, "success": False}

    def picture(self, observation):
        return np.zeros((2, 3, 3), np.uint8) if observation == "start" else None


def test_a_task_is_reset_to_with_its_options():
    """The seed is the same for every member of a group and in every run."""
    env = TextEnv(Asked())
    assert env.reset(Task("a", "train", options={"board": "#"})) == TimeStep("start", "play")
    assert env.unwrapped.resets == [(0, {"task_id": "a", "board": "#"})]


def test_an_episode_that_is_cut():
    """The environment's own finish() says what was reached, or else its last info."""
    env = TextEnv(Asked())
    env.reset(Task("a"))
    assert env.step("up") == TimeStep("after up", valid=True) and env.step("?").valid is False
    assert env.finish() == TimeStep("after ?", "", 0.5, "length", 0.5, False, False)
    env.unwrapped.finish = None
    env.step("up")
    assert env.finish() == TimeStep("after up", "", 0.25, "length", 0.25, False, True)


def test_optional_methods_are_found():
    env, plain = TextEnv(Asked()), make_env(ENV, {})
    assert env.offers("picture") and not plain.offers("picture") and not env.offers("stream")
    assert env.picture("start").shape == (2, 3, 3) and env.picture("x") is None and plain.picture("start") is None
    assert plain.solution() == ["up"] and plain.agents() == {}


# -- episodes without a model ----------------------------------------------------------------------------------------------------------


def test_a_demonstration_plays_the_solution(monkeypatch):
    env = make_env(ENV, {})
    played, labels = demonstrate(env, Task("a"))
    assert played.turns == (Turn("start", "up", 1.0),) and labels == ["up"]
    assert (played.instruction, played.success, played.completion, played.final_observation) == ("", True, 1.0, "end")
    monkeypatch.setattr(Rude, "says", {"solution": lambda: None})
    played, labels = demonstrate(env, Task("a"))
    assert (played.turns, labels, played.success, played.finish_reason) == ((), [], False, "length")


def test_an_agent_s_episode(monkeypatch):
    """It ends where the environment, or the agent, ends it; one that the environment calls failed counts for nothing."""
    env, seen, says = TextEnv(Asked()), list[str](), {"start": "up", "after up": "down"}
    played = play(env, Task("a"), says.get, lambda now, _: seen.append(now.observation))
    assert [t.action for t in played.turns] == ["up", "down"] and [t.valid for t in played.turns] == [True, False]
    assert seen == ["start", "after up", "after down"] and (played.instruction, played.finish_reason) == ("play", "length")
    monkeypatch.setattr(Asked, "step", lambda self, action: ("?", 1.0, True, False, {"failed": "it crashed", "success": True}))
    played = play(env, Task("a"), lambda said: "up")
    assert (played.finish_reason, played.failure, played.reward, played.success) == ("failed", "environment: it crashed", 0.0, False)
    assert played.turns == (Turn("start", "up", 0.0),) and played.final_observation is None
