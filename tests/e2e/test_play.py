"""`skillsd play`: one episode, by the model, the oracle or an agent of the environment, as text and as a GIF."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from PIL import Image
from tests.e2e.commands import TINY, command, panel

from skillsd.skills import SkillBank
from skillsd_sokoban.env import SokobanEnv

NO_MODEL = "--model.policy.model=/no/such/model"


class Hosted(SokobanEnv):
    """Sokoban whose host may lose an episode, with an agent of its own; it counts what was not closed."""

    alive = 0

    def __init__(self, lost_at: int = 0, solvable: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lost_at, self.known = lost_at, solvable
        Hosted.alive += 1

    @property
    def agents(self) -> dict[str, Callable[[], Any]]:
        return {"pusher": Pusher}

    def step(self, action: str) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        if self.lost_at and info["turn"] >= self.lost_at:
            return observation, 0.5, True, False, {**info, "failed": "the host\nis gone", "completion": 1.0}
        return observation, reward, terminated, truncated, info

    def solution(self) -> list[str] | None:
        return super().solution() if self.known else None

    def close(self) -> None:
        Hosted.alive -= 1


class Pusher:
    """Always to the left; it knows what it has seen."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def act(self, observation: str) -> str:
        self.seen.append(observation)
        return "left" if len(self.seen) % 2 else f"go {len(self.seen)}"


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The flag that chooses it."""
    gymnasium.register("skillsd_test/Hosted-v0", Hosted)
    monkeypatch.setattr(Hosted, "alive", 0)
    yield "--data.env=skillsd_test/Hosted-v0"
    del gymnasium.registry["skillsd_test/Hosted-v0"]


def test_play_prints_an_episode_of_the_chosen_weights_and_skill(run, output_of, tmp_path):
    plain = output_of("play", tmp_path / "none", "--level", "1")
    start = "weights: nano, as it starts (no checkpoint); skill: none\n"
    assert plain.startswith(f"{start}task test-0001 short\n--- turn 1\n######") and "--- skill" not in plain
    assert "\n> " in plain and "success " in plain.splitlines()[-1]
    level = panel(run)["before"]["levels"][1]
    assert f"success {level['success']}" in plain and f"{level['turns']} turns" in plain

    shown = output_of("play", tmp_path / "none", "--level", "1", "--skill", "true")
    assert "--- skill\nsolved none : " in shown and "skill: made from the environment's own solution" in shown.splitlines()[0]
    trained = output_of("play", run, "--level", "1", "--ckpt_path", "last")
    assert f"success {panel(run)['after']['levels'][1]['success']}" in trained
    assert not (tmp_path / "none").exists()

    flags = ["--task", "test-0001", "--ckpt_path", "last"]
    assert output_of("play", run, *flags) == trained == output_of("play", run, "--level", "1")  # the last checkpoint is the default
    assert trained.startswith(f"weights: {run / 'checkpoints' / 'last.ckpt'}, iteration 4; skill: none\n")
    assert output_of("play", run, "--level", "1", "--ckpt_path", "null") == plain
    assert output_of("play", tmp_path / "none", "--task", "train-0002").startswith(f"{start}task train-0002 short\n--- turn 1\n######")
    with SkillBank(run / "bank.sqlite", read_only=True) as bank:
        task = next(iter(bank.tasks()))
        known = {s.skill_id for s in bank.skills(task)}
    skill = re.search(r"skill: (\d+) of .*bank.sqlite", output_of("play", run, "--task", task, "--skill"))
    assert skill is not None and int(skill[1]) in known


def test_play_the_oracle(output_of, tmp_path, hosted):
    """It needs no model, not even a tokenizer."""
    env = SokobanEnv(**TINY["data"]["env_kwargs"])
    for flags, task_id in ((["--level", "3"], "test-0003"), ([], "test-0000"), (["--task", "train-0004"], "train-0004")):
        observation, info = env.reset(options={"task_id": task_id})
        plan = env.solution()
        assert plan and len(plan) == info["optimal_length"]
        text = output_of("play", tmp_path / "none", NO_MODEL, "--policy", "oracle", *flags)
        assert text.startswith(f"weights: none, oracle plays; skill: none\ntask {task_id} short\n--- turn 1\n{observation}\n> {plan[0]}\n")
        for action in plan:
            observation = env.step(action)[0]
        last = f"--- at the end\n{observation}\n--- done: success True, completion 1.00, reward 1.00, {len(plan)} turns\n"
        assert text.endswith(f"\n> {plan[-1]}\n{last}")
        assert text == output_of("play", tmp_path / "none", NO_MODEL, hosted, "--policy=oracle", *flags)
        assert Hosted.alive == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("policy", ["oracle", "model"])
def test_play_as_a_gif(output_of, tmp_path, hosted, policy):
    """A frame a turn and one of how it ends, each what the environment draws; nothing else is printed or left than without."""
    flags = [hosted, "--policy", policy, "--level", "2"]
    plain = output_of("play", tmp_path / "none", *flags)
    text = output_of("play", tmp_path / "none", *flags, f"--gif={tmp_path / 'new' / 'a.gif'}")
    assert text == f"{plain}gif: {tmp_path / 'new' / 'a.gif'}\n" and Hosted.alive == 0 and not (tmp_path / "none").exists()
    env = SokobanEnv(**TINY["data"]["env_kwargs"])
    boards = [env.reset(options={"task_id": "test-0002"})[0]]
    boards += [env.step(line[2:])[0] for line in plain.splitlines() if line.startswith("> ")]
    with Image.open(tmp_path / "new" / "a.gif") as gif:
        assert gif.n_frames == len(boards) > 3
        for i, board in enumerate(boards):
            gif.seek(i)
            drawn = env.picture(board)
            off = np.abs(np.asarray(gif.convert("RGB"))[: len(drawn)] - drawn.astype(int))
            assert off.mean() < 4 and (off.max(2) > 60).mean() < 0.01  # the palette rounds


def test_play_an_agent_of_the_environment(output_of, tmp_path, hosted):
    text = output_of("play", tmp_path / "none", NO_MODEL, hosted, "--policy", "pusher", "--level", "1")
    answers = [line for line in text.splitlines() if line.startswith("> ")]
    assert answers == ["> left", "> go 2", "> left", "> go 4", "> left", "> go 6"]  # a new agent an episode
    assert text.count("could not be read") == 3
    assert text.splitlines()[-1].startswith("--- horizon: success False, completion 0.00") and text.endswith(" 6 turns\n")
    assert Hosted.alive == 0


@pytest.mark.parametrize("flags", [["--policy", "model"], ["--policy", "pusher"], ["--skill"]])
def test_play_an_episode_that_fails(output_of, tmp_path, hosted, flags):
    text = output_of("play", tmp_path / "none", hosted, "--data.env_kwargs.lost_at=2", *flags)
    assert text.splitlines()[-1] == "--- failed (environment: the host is gone): success False, completion 0.00, reward 0.00, 2 turns"
    assert Hosted.alive == 0


def test_play_where_no_solution_is_known(output_of, tmp_path, hosted):
    text = output_of("play", tmp_path / "none", NO_MODEL, hosted, "--data.env_kwargs.solvable=false", "--policy", "oracle")
    assert text.splitlines()[-1] == "--- no solution from here: success False, completion 0.00, reward 0.00, 0 turns"


BAD_PLAY: dict[str, tuple[list[str], str]] = {
    "level": (["--level", "4"], "level is 4: the panel has levels 0 to 3."),
    "level of the oracle": (["--policy", "oracle", "--level", "-1"], "level is -1: the panel has levels 0 to 3."),
    "task": (
        ["--task", "1_1"],
        "task is 1_1: it is no task of the split test (test-0000, ...) nor of train (train-0000, ...): name one of them.",
    ),
    "both": (["--level", "0", "--task", "test-0000"], "level and task are both given: name the task to play with one of them."),
    "policy": (["--policy", "nosuch"], "policy is nosuch: with this environment choose one of model, oracle, pusher."),
    "skill": (
        ["--policy", "oracle", "--skill"],
        "skill: --policy oracle reads no prompt, so a skill would change nothing: leave out --skill.",
    ),
    "gif": (["--gif", "a.mp4"], "gif is a.mp4: give the name of a file that ends in .gif."),
    "checkpoint": (["--policy", "pusher", "--ckpt_path", "last"], "ckpt_path: --policy pusher loads no model: leave out --ckpt_path."),
}


@pytest.mark.parametrize("name", BAD_PLAY)
def test_play_refuses_what_is_not_there(tmp_path, capsys, hosted, name):
    flags, message = BAD_PLAY[name]
    assert command("play", tmp_path / "none", hosted, *flags) == 2
    out, err = capsys.readouterr()
    assert err == f"error: {message}\n" and out == "" and Hosted.alive == 0
    assert not (tmp_path / "none").exists()


def test_an_environment_without_extras(tmp_path, capsys, hosted, monkeypatch):
    """It draws nothing, knows no agents and no solutions: what needs them is refused."""
    monkeypatch.setattr(Hosted, "agents", None)
    monkeypatch.setattr(SokobanEnv, "solution", property(lambda env: getattr(env, "no solution")))
    monkeypatch.delattr(Hosted, "solution")
    monkeypatch.delattr(SokobanEnv, "picture")
    for flag, message in (
        (f"--gif={tmp_path / 'a.gif'}", "gif: skillsd_test/Hosted-v0 offers no picture(observation) to draw: leave out --gif."),
        ("--policy=oracle", "policy is oracle: the environment offers no solution() to replay: choose one of model."),
        ("--policy=pusher", "policy is pusher: with this environment choose one of model."),
    ):
        assert command("play", tmp_path / "none", hosted, NO_MODEL, flag) == 2
        assert capsys.readouterr() == ("", f"error: {message}\n") and Hosted.alive == 0
    assert not (tmp_path / "a.gif").exists()
    assert command("fit", tmp_path / "run", hosted, "--skills.context=skillsd.skills.GroundTruthContext") == 2
    assert "skills.context: skillsd_test/Hosted-v0 offers no solution(): choose another context" in capsys.readouterr().err
    assert Hosted.alive == 0


def test_a_solution_that_fails(tmp_path, capsys, hosted, monkeypatch):
    def fails(env: Any) -> None:
        raise RuntimeError("too large")

    monkeypatch.setattr(Hosted, "solution", fails)
    assert command("play", tmp_path / "none", hosted, "--policy", "oracle") == 2
    text = capsys.readouterr().err
    assert text.startswith("error: data.env: ") and text.count("\n") == 1 and Hosted.alive == 0
    assert text.endswith(": solution() failed (raised: RuntimeError: too large): mend the environment.\n")


def test_a_reader_that_stops_reading():
    """`skillsd play | head`, with the pipe closed before anything is written."""
    command, environ = [sys.executable, "-m", "skillsd", "play", "--policy=oracle"], {**os.environ, "PYTHONUNBUFFERED": ""}
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environ)
    os.close(write)
    assert result.returncode == 1 and "importing PyTorch" in result.stderr and result.stderr.count("\n") == 1
