"""Environments that misbehave outside of a rollout: one line that names environment and call, no traceback."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest

from skillsd import cli
from skillsd.errors import ConfigError
from skillsd.rollout import RolloutSettings, answers, check_env, demonstrate, label, make_env, tasks_of
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
    "solution is a text": ("solution", lambda: "up", "solution() must give a list of actions as str, or None, not 'up'"),
    "solution holds numbers": ("solution", lambda: [1], "solution() must give a list of actions as str, or None, not [1]"),
    "reset raises": ("reset", boom, "RuntimeError: the host is gone"),
    "reset is nothing": ("reset", lambda: None, "TypeError"),
    "reset gives bytes": ("reset", lambda: (b"start", {}), "TypeError"),
    "step raises": ("step", boom, "RuntimeError: the host is gone"),
    "step is too little": ("step", lambda: ("end", 1.0), ""),
    "the reward is no number": ("step", lambda: ("end", "much", True, False, {}), "ValueError: could not convert"),
}


@pytest.mark.parametrize("name", RUBBISH)
def test_play_says_so_in_one_line(name, tmp_path, monkeypatch, capsys):
    call, does, told = RUBBISH[name]
    monkeypatch.setattr(Rude, "says", {call: does})
    monkeypatch.chdir(tmp_path)
    env = [f"--data.init_args.env={ENV}", "--data.init_args.env_kwargs={}"]
    assert cli.main(["play", "-c", "sokoban", *env, "--policy=oracle"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: data\.init_args\.env: {ENV}: {call}\(.* failed \(raised: .*\): mend the environment\.\n", said), said
    assert told in said


@pytest.mark.parametrize("name", [name for name in RUBBISH if not name.startswith(("tasks", "a task"))])
def test_a_demonstration_says_so(name, monkeypatch):
    call, does, told = RUBBISH[name]
    monkeypatch.setattr(Rude, "says", {call: does})
    with pytest.raises(ConfigError, match=rf"data\.init_args\.env: {ENV}: {call}\(\) failed \(raised: ") as error:
        demonstrate(make_env(ENV, {}), Task("a"), 0.0, random.Random(0))
    assert told in str(error.value) and error.value.__cause__ is not None


# -- before a run ----------------------------------------------------------------------------------------------------------------------

END = {"success": True, "completion": 1.0}
BREACHES: dict[str, tuple[str, Callable[..., Any], str]] = {
    "no instruction": (
        "reset",
        lambda: ("start", {"instruction": None}),
        "reset() to task a: info['instruction'] is a NoneType, not a str",
    ),
    "a conversation": ("reset", lambda: ("start", {"instruction": [{"role": "user"}]}), "info['instruction'] is a list, not a str"),
    "bytes": ("reset", lambda: ("start", {"instruction": b"go"}), "info['instruction'] is a bytes, not a str"),
    "a number": ("reset", lambda: ("start", {"instruction": 7}), "info['instruction'] is a int, not a str"),
    "an observation in bytes": ("reset", lambda: (b"start", {}), "the observation is a bytes, not a str"),
    "another task": ("reset", lambda: ("start", {"task_id": "b"}), "info['task_id'] is 'b', so it plays another task"),
    "reset raises": ("reset", boom, "reset() to task a: RuntimeError: the host is gone"),
    "step raises": ("step", boom, "step(''): RuntimeError: the host is gone"),
    "no observation": ("step", lambda: (None, 0.0, False, False, {}), "step(''): the observation is a NoneType, not a str"),
    "nan": ("step", lambda: ("end", float("nan"), False, False, {}), "the reward is nan"),
    "beyond float32": ("step", lambda: ("end", 1e39, True, False, END), "the reward is 1e+39, not between -1e+37 and 1e+37"),
    "a text for success": ("step", lambda: ("end", 1.0, True, False, {"success": "False"}), "info['success'] is 'False', not a bool"),
    "a count for success": ("step", lambda: ("end", 1.0, True, False, {"success": 3}), "info['success'] is 3, not a bool"),
    "a text for terminated": ("step", lambda: ("end", 1.0, "no", False, {}), "terminated is 'no', not a bool"),
    "too complete": ("step", lambda: ("end", 1.0, True, False, {"completion": 1.5}), "the completion is 1.5, not between 0 and 1"),
    "finish": ("finish", lambda: {"completion": 50}, "finish(): the completion is 50, not between 0 and 1"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_what_breaks_the_contract_is_found_before_a_run(name, monkeypatch, caplog):
    call, does, told = BREACHES[name]
    goes_on = {"step": lambda: ("go on", 0.0, False, False, {})}
    monkeypatch.setattr(Rude, "says", {**goes_on, call: does})
    monkeypatch.setattr(Rude, "finish", lambda self: self.says["finish"](), raising=False)
    with pytest.raises(ConfigError) as error:
        check_env(make_env(ENV, {}), Task("a"), RolloutSettings())
    line = str(error.value)
    assert line.startswith(f"data.init_args.env: {ENV}: {call}(") and told in line and "\n" not in line and "check_text_env" in line
    check_env(make_env(ENV, {}), Task("a"), RolloutSettings(max_failed=1.0))
    assert told in caplog.text


def test_what_is_no_breach(monkeypatch):
    """NumPy's scalars and texts are what they say, to the type; an episode may end as failed on actions that cannot be read."""
    said: dict[str, Any] = {"success": np.bool_(True), "completion": np.float32(0.5), "instruction": np.str_("Löse es")}
    monkeypatch.setattr(Rude, "says", {"reset": lambda: (np.str_("a"), said), "step": lambda: ("b", np.int64(1), np.bool_(True), 0, said)})
    env = make_env(ENV, {})
    check_env(env, Task("a"), RolloutSettings())
    start, reply = answers.reset(env, Task("a"), 99), answers.step(env, "up", 99)
    assert (start.observation, start.instruction) == ("a", "Löse es") and {type(x) for x in start[:2]} == {str}
    assert reply[:4] == ("b", 1.0, "done", (0.5, True)) and type(reply.end.success) is bool
    monkeypatch.setattr(Rude, "says", {"step": lambda: ("b", 0.0, True, False, {"failed": "it crashed"})})
    check_env(env, Task("a"), RolloutSettings())


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_run_asks_before_it_begins(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Rude, "says", {"reset": lambda: ("start", {"instruction": None})})
    monkeypatch.chdir(tmp_path)
    env = [f"--data.init_args.env={ENV}", "--data.init_args.env_kwargs={}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    assert cli.main([stage, "-c", "sokoban", *env]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "data.init_args.env: test/Rude-v0: reset() to task " in said
    assert not (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.parametrize("twice", [["a", "a"], ["a", "b", "a"]])
def test_a_task_id_of_two_tasks(twice, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Rude, "says", {"tasks": lambda split: [{"task_id": name} for name in twice]})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["play", "-c", "sokoban", f"--data.init_args.env={ENV}", "--data.init_args.env_kwargs={}", "--policy=oracle"]) == 2
    assert "lists the task_id 'a' twice" in capsys.readouterr().err


def test_labels_of_tasks_are_what_was_given(monkeypatch):
    listed = [{"task_id": "a", "difficulty": 0, "scenario": None}, {"task_id": "b", "difficulty": "hard"}]
    monkeypatch.setattr(Rude, "says", {"tasks": lambda split: listed})
    assert [(label(t.get("difficulty")), label(t.get("scenario"))) for t in tasks_of(make_env(ENV, {}), "x")] == [("0", ""), ("hard", "")]
    listed[0]["scenario"] = ["x"]
    with pytest.raises(TypeError, match="scenario as str"):
        tasks_of(make_env(ENV, {}), "x")


def test_one_that_behaves(monkeypatch):
    env = make_env(ENV, {})
    turns, labels, instruction, success, final = demonstrate(env, Task("a"), 0.0, random.Random(0))
    assert turns == [Turn("start", "up", 1.0)] and labels == ["up"]
    assert instruction == "" and success
    monkeypatch.setattr(Rude, "says", {"solution": lambda: None})
    assert demonstrate(env, Task("a"), 0.0, random.Random(0))[:4] == ([], [], "", False)
