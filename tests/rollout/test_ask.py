"""Environments that misbehave outside of a rollout: one line that names environment and call, no traceback."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import pytest

from skillsd import cli
from skillsd.errors import ConfigError
from skillsd.rollout import demonstrate, make_env
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


def test_one_that_behaves(monkeypatch):
    env = make_env(ENV, {})
    turns, labels, instruction, success, final = demonstrate(env, Task("a"), 0.0, random.Random(0))
    assert turns == [Turn("start", "up", 1.0)] and labels == ["up"]
    assert instruction == "" and success
    monkeypatch.setattr(Rude, "says", {"solution": lambda: None})
    assert demonstrate(env, Task("a"), 0.0, random.Random(0))[:4] == ([], [], "", False)
