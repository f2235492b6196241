"""Environments and models that misbehave: their episodes end as failed, by kind, and everybody else's are what they would have been."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from tests.rollout.test_collector import Scripted

from skillsd import cli
from skillsd.bounded import visible
from skillsd.callbacks import resume
from skillsd.learner import Learner
from skillsd.objective import Objective
from skillsd.policy.nano import build_tokenizer
from skillsd.rollout import Chat, Collector, Episode, RolloutSettings
from skillsd.timeouts import MAX_CHARS
from skillsd.trajectory import FAILURES, Task, Trajectory

CONTROL = "".join(map(chr, [*range(32), 127, 0x9B, 0x202E])) + "\x1b[2J\u2028"


class RudeError(Exception):
    """It cannot say what it is."""

    def __str__(self) -> str:
        raise ValueError


def boom(error: BaseException) -> Any:
    raise error


def spin() -> None:
    """A loop that catches whatever is raised into it, once."""
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)


INFO = {"completion": 0.5, "success": False}
MISDEEDS: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (lambda: boom(OSError("the host\nis gone")), "raised: OSError: the host is gone"),
    "raises what cannot be said": (lambda: boom(RudeError()), "raised: RudeError"),
    "raises a book": (lambda: boom(ValueError("x" * 10_000_000)), "raised: ValueError: xxx"),
    "raises escapes": (lambda: boom(ValueError("\x1b[2J\ud800")), "raised: ValueError: \\x1b[2J\\ud800"),
    "out of memory": (lambda: boom(MemoryError()), "raised: MemoryError"),
    "sleeps": (lambda: time.sleep(60), "hung: no answer in 1 s (data.rollout.env_timeout)"),
    "sleeps on": (spin, "hung: no answer in 1 s"),
    "bytes": (lambda: (b"up", 0.0, False, False, INFO), "observation: the observation is a bytes, not a str"),
    "nothing": (lambda: None, "observation: step returned a NoneType, not (observation, reward, terminated, truncated, info)"),
    "too little": (lambda: ("up", 0.0), "observation: step returned a tuple of 2, not (observation, reward"),
    "no info": (lambda: ("up", 0.0, False, False, None), "observation: info is a NoneType, not a dict"),
    "10 MB": (
        lambda: ("up " * 3_495_254, 0.0, False, False, INFO),
        "observation: the observation has 10,485,762 characters, more than 1,000,000 (data.rollout.max_observation_chars)",
    ),
    "surrogate": (
        lambda: ("up \ud83d", 0.0, False, False, INFO),
        "observation: the observation is no text: a lone surrogate at character 3",
    ),
    "nan": (lambda: ("up", math.nan, False, False, INFO), "reward: the reward is nan"),
    "numpy's inf": (lambda: ("up", np.float32("inf"), True, False, INFO), "reward: the reward is inf"),
    "a huge int": (lambda: ("up", 10**400, False, False, INFO), "reward: the reward is inf"),
    "a text": (lambda: ("up", "1.0", False, False, INFO), "reward: the reward is a str, not a number"),
    "nan completion": (lambda: ("up", 0.0, True, False, {"completion": math.nan}), "reward: the completion is nan"),
    "too complete": (lambda: ("up", 0.0, False, True, {"completion": 1.5}), "reward: the completion is 1.5, not between 0 and 1"),
    "gives up": (lambda: ("up", 1.0, True, False, INFO | {"failed": "the\nhost"}), "environment: the host"),
}  # fmt: skip


class Hostile(gymnasium.Env):
    """Three turns. A task `name:turn` does the misdeed at that turn (0 is the reset); others play on."""

    observation_space = action_space = gymnasium.spaces.Text(1)
    made: list[Hostile] = []

    def __init__(self, says: str = "up ", closing: Callable[[], None] = lambda: None) -> None:
        self.says, self.closing, self.actions, self.closed = says, closing, [], threading.Event()
        self.made.append(self)

    def tasks(self, split: str) -> list[dict[str, Any]]:
        return [{"task_id": t} for t in (self.splits[split] if isinstance(self.splits, Mapping) else [])]

    splits: Any = None

    def reset(self, *, seed=None, options=None):
        self.misdeed, _, when = options["task_id"].partition(":")
        self.when, self.turn = int(when) if when else -1, 0
        if self.when == 0:
            answer = MISDEEDS[self.misdeed][0]()
            return answer if answer is None else (answer[0], answer[-1])
        return self.says * 3, {"task_id": options["task_id"], "instruction": ""}

    def step(self, action):
        self.turn += 1
        self.actions.append(action)
        if self.turn == self.when:
            return MISDEEDS[self.misdeed][0]()
        over = self.turn == 3
        return self.says * self.turn, 0.25, over, False, {"completion": float(over), "success": over}

    def close(self):
        self.closed.set()
        self.closing()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gymnasium.register("test/Hostile-v0", Hostile, disable_env_checker=True, order_enforce=False)
    Hostile.made = []
    yield
    del gymnasium.registry["test/Hostile-v0"]


@pytest.fixture
def collector() -> Iterator[Callable[..., Collector]]:
    t, made = build_tokenizer(), []

    def make(kwargs: Mapping[str, Any] | None = None, answer: tuple[str, ...] = ("left", "<|end|>"), **limits: Any) -> Collector:
        engine = Scripted(t.convert_tokens_to_ids(list(answer)), t.eos_token_id)
        settings = RolloutSettings(**{"env_timeout": 1.0, **limits})
        made.append(Collector("test/Hostile-v0", kwargs or {}, Chat(t, [t.eos_token_id]), engine, settings, 2048))
        return made[-1]

    yield make
    for c in made:
        c.close()


def play(collector: Collector, *names: str) -> list[Trajectory]:
    return collector.collect([Episode(Task(n)) for n in names], seed=0, iteration=0)


# -- the collector ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", MISDEEDS)
def test_a_misdeed_ends_its_episode_alone(collector, name, workers):
    """In a step and, where it is one there too, in the reset; the others' episodes are those of well-behaved environments."""
    want = play(collector(), "a", "b", "c", "d")
    c = collector(env_workers=workers)
    failure = MISDEEDS[name][1]
    in_reset = failure.startswith(("raised", "hung", "observation: the", "observation: info"))
    names = [f"{name}:2", "a", "b", f"{name}:0", "c", "d"] if in_reset else [f"{name}:2", "a", "b", "c", "d"]
    first, a, b, *rest = play(c, *names)
    assert [a, b, *rest[-2:]] == want
    failed = [first, rest[0]] if in_reset else [first]
    for t in failed:
        assert t.failed and t.failure.startswith(failure) and t.failure_kind == failure.partition(":")[0] in FAILURES
        assert (t.reward, t.completion, t.success) == (0.0, 0.0, False)
        assert len(t.failure) <= MAX_CHARS and t.failure.isprintable()
        assert Trajectory.from_json(t.to_json()) == t and t.to_json().encode()
    assert len(first.turns) == 2 and first.n_actions == 4 and len(first.token_ids) == len(first.logprobs) == len(first.action_mask)
    # What misbehaved is thrown away; what said itself that it had failed is not.
    assert len(Hostile.made) == 4 + len(names) and len(c.envs) == len(names) - (0 if name == "gives up" else len(failed))
    thrown = [env for env in Hostile.made[4:] if env not in [e.unwrapped for e in c.envs]]
    assert all(env.closed.wait(5) for env in thrown)
    assert play(c, "a", "b", "c", "d") == want  # and with new ones in their place


@pytest.mark.parametrize("workers", [0, 2])
def test_one_environment_after_another_is_lost(collector, workers):
    """More episodes than rows: each that is lost is replaced at once, and every thread too."""
    c = collector(env_workers=workers, max_rows=2)
    played = play(c, "sleeps:1", "raises:0", "sleeps:0", "nan:3", "a", "sleeps:2", "b")
    assert [t.failure_kind for t in played] == ["hung", "raised", "hung", "reward", "", "hung", ""]
    assert played[4].reward == 0.75 and len(c.envs) <= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_environment_that_does_not_close_is_left_behind(collector, workers, caplog):
    c = collector({"closing": lambda: time.sleep(60)}, env_workers=workers)
    assert [t.failure_kind for t in play(c, "raises:1", "a")] == ["raised", ""]
    c.close()
    assert "did not close in 1 s" in caplog.text


def test_threads_that_hang_do_not_keep_the_process():
    """Not at the end of a program either."""
    code = """
import time
from skillsd.timeouts import Threads
threads = Threads(1, 0.1)
calls = [threads.submit(lambda: time.sleep(600)), threads.submit(lambda: 7)]
threads.wait(calls)
print(calls[0].result().kind, calls[1].result())
threads.close()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "hung 7\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_control_characters_are_text(collector, workers):
    """They reach the tokenizer, the record and whoever reads it as they are; only what is printed is escaped."""
    asked, c = [], collector({"says": CONTROL}, env_workers=workers)
    many = c.chat.turn_ids_many
    c.chat.turn_ids_many = lambda texts, stopped: asked.append(texts) or many(texts, stopped)
    (t,) = play(c, "a")
    assert [turn.observation for turn in t.turns] == [CONTROL * 3, CONTROL, CONTROL * 2] and [x for x in asked if x] == [
        [CONTROL],
        [CONTROL * 2],
    ]
    assert Trajectory.from_json(t.to_json()) == t and len(t.to_json().splitlines()) == 1
    shown = visible(CONTROL + "a\nb\tc \ud800")
    assert shown.replace("\n", "").replace("\t", "").isprintable() and "\\x1b[2J" in shown and shown.endswith("a\nb\tc \\ud800")
    assert visible("plain") == "plain" and visible("é 漢字 🙂\n") == "é 漢字 🙂\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_that_gives_nan(collector, workers):
    """Its answer is not played and not recorded; the environment is kept."""
    c, calls = collector(env_workers=workers), []
    step = c.engine.step

    def broken() -> Any:
        calls.append(0)
        return [(row, x._replace(logprobs=[-0.5, math.nan]) if row == 1 and len(calls) == 2 else x) for row, x in step()]

    c.engine.step = broken
    a, lost, b = play(c, "a", "b", "c")
    assert lost.failure == "model: a sampled token's log-prob is not finite" and lost.failure_kind == "model"
    assert len(lost.turns) == 1 and lost.n_actions == 2 and all(map(math.isfinite, lost.logprobs))
    assert a.reward == b.reward == 0.75 and len(Hostile.made) == len(c.envs) == 3
    assert sorted(len(env.actions) for env in Hostile.made) == [1, 3, 3]


def test_a_model_that_never_ends(collector):
    """The limits end its answers and its episodes."""
    c = collector(answer=("left",) * 50, max_turn_tokens=7)
    (t,) = play(c, "a")
    assert t.finish_reason == "done" and t.n_actions == 21 and {len(turn.action.split()) for turn in t.turns} == {7}
    c = collector(answer=("left",) * 50, max_turn_tokens=7, max_trajectory_tokens=12)
    (t,) = play(c, "a")
    assert t.finish_reason == "length" and len(t.token_ids) <= 12


def test_a_model_that_says_nothing(collector):
    """An empty action is an action."""
    c = collector(answer=("<|end|>",))
    (t,) = play(c, "a")
    assert t.finish_reason == "done" and t.n_actions == 3 and Hostile.made[0].actions == ["", "", ""]


@pytest.mark.parametrize("said", ["up <|end|> <|assistant|> down", "<|system|>"])
def test_special_tokens_in_an_observation(collector, said):
    special = set(build_tokenizer().all_special_ids) - {build_tokenizer().unk_token_id}
    tokens = {}
    for says in ("up ", said):
        (t,) = play(collector({"says": says}), "a")
        tokens[says] = [[i for i in ids if i in special] for ids in (t.prompt_ids, t.token_ids)]
    assert tokens[said] == tokens["up "] and tokens[said][1]


def test_old_records_can_be_read(collector):
    (t,) = play(collector(), "gives up:1")
    old = json.loads(t.to_json()) | {"failure": "killed: by the host"}
    assert Trajectory.from_json(json.dumps(old)).failure_kind == "environment"


def test_the_alarm_gives_its_signal_back(collector):
    before = signal.getsignal(signal.SIGALRM)
    c = collector(env_timeout=100)
    play(c, "a")
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


# -- whole runs ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """`skillsd fit` on tasks of Hostile, 4 iterations of 2 tasks, G = 3; the exit code and what went to stderr."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(train: list[str], *flags: str, folder: str = "run", **model: Any) -> tuple[int, str]:
        monkeypatch.setattr(Hostile, "splits", {"train": train, "test": ["held out", "raises:1", "held out too"]})
        config = {
            "trainer": {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu"},
            "adapter": {"enabled": False},
            "model": {"policy": {"model": "nano", "lora": {"r": 4, "alpha": 8, "init": None}}, "optimizer": {"lr": 5e-3}, **model},
            "data": {
                    "env": "test/Hostile-v0", "env_kwargs": {}, "batch_tasks": 2, "group_size": 3,
                    "rollout": {"max_turn_tokens": 2, "env_timeout": 1.0},
                },
        }  # fmt: skip
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(yaml.safe_dump(config))
        args = ["-c", "sokoban", "-c", "method/skillsd", "-c", str(overlay), f"--trainer.default_root_dir={tmp_path / folder}", *flags]
        code = cli.main(["fit", *args])
        return code, capsys.readouterr().err

    return run


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


def checkpoint(folder: Path) -> dict[str, Any]:
    return dict(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True))


TASKS = ["fine", "good", "nan:2", "well"]


def test_a_run_goes_on_and_counts(fit, tmp_path):
    code, _ = fit(TASKS)
    assert code == 0
    rows = table(tmp_path / "run")
    assert len(rows) == 4 and checkpoint(tmp_path / "run")["global_step"] == 4
    played = [Trajectory.from_json(line) for line in (tmp_path / "run" / "trajectories.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        own = [t for t in played if t.iteration == i]
        left, lost = [t for t in own if not t.failed], [t for t in own if t.failed]
        assert float(row["rollout/failed"]) == len(lost) / 6 and float(row["rollout/failed_reward"]) == len(lost)
        assert float(row["rollout/failed_raised"]) == 0 == float(row["policy/skipped_steps"])
        assert float(row["reward/mean"]) == pytest.approx(sum(t.reward for t in left) / len(left))
    assert sum(t.failed for t in played) == 6
    panel = json.loads((tmp_path / "run" / "panel.json").read_text())["after"]
    assert (panel["n"], panel["failed"]) == (3, 1) and panel["success"] == pytest.approx(2 / 3)


def test_a_run_whose_episodes_all_fail_ends_where_it_would(fit, tmp_path):
    """With max_failed 1: no update moves anything, and the loop and the stream stay in step."""
    code, _ = fit(["raises:0", "nan:1", "bytes:2"], "--data.rollout.max_failed=1")
    rows, state = table(tmp_path / "run"), checkpoint(tmp_path / "run")
    assert code == 0 and len(rows) == 4 and state["global_step"] == 4
    assert [float(r["rollout/failed"]) for r in rows] == [1.0] * 4 and {r["grad_norm/total"] for r in rows} == {"0.0"}
    assert not state["optimizer_states"][0]["state"]
    assert all(v.eq(0).all() for k, v in state["state_dict"].items() if k.startswith("student") and "lora_B" in k)


def test_too_many_failures_stop_the_run(fit, tmp_path):
    """In one line, with a checkpoint to go on from; with the share raised it does. The last iteration is the one with that task alone."""
    code, said = fit(["fine", "good", "raises:0"])
    folder = tmp_path / "run"
    assert code == 2
    line = said.strip().splitlines()[-1]
    n = len(table(folder))
    assert line.startswith(f"error: data.rollout.max_failed is 0.5, and in iteration {n} 3 of 3 episodes failed (3 raised, first on task ")
    assert "task raises:0: raised: OSError: the host is gone)" in line
    assert n == 3 and f"The last good checkpoint is {folder / 'checkpoints' / 'last.ckpt'}" in line
    assert checkpoint(folder)["global_step"] == 3
    code, _ = fit(["fine", "good", "raises:0"], "--data.rollout.max_failed=1", "--ckpt_path=last")
    assert code == 0 and len(table(folder)) == 4 and checkpoint(folder)["global_step"] == 4


def nan_in(monkeypatch: pytest.MonkeyPatch, *iterations: int) -> None:
    """The loss of these iterations is nan."""
    total, steps = Objective.total, []

    def broken(self: Any, terms: Any, n: int) -> Any:
        steps.append(0)
        return total(self, terms, n) * (math.nan if len(steps) - 1 in iterations else 1.0)

    monkeypatch.setattr(Objective, "total", broken)


@pytest.mark.parametrize("mode", ["sync", "ema"])
def test_updates_that_are_not_finite_are_skipped(fit, tmp_path, monkeypatch, mode):
    """Parameters, optimizer and teacher stay as they were; the schedule and the loop go on; the count is in the checkpoint."""
    saved: list[dict[str, Any]] = []
    save = resume.CheckpointFiles.save_checkpoint

    def keep(self: Any, state: dict[str, Any], path: Any, **options: Any) -> None:
        save(self, state, path, **options)
        saved.append(torch.load(path, weights_only=True))

    monkeypatch.setattr(resume.CheckpointFiles, "save_checkpoint", keep)
    nan_in(monkeypatch, 1, 3)
    code, _ = fit(["fine", "good", "well", "nice"], f"--teacher.mode={mode}")
    assert code == 0
    rows = table(tmp_path / "run")
    assert [r["policy/skipped_steps"] for r in rows] == ["0.0", "1.0", "1.0", "2.0"]
    assert [c["global_step"] for c in saved[:4]] == [1, 2, 3, 4] and saved[3]["skillsd"]["skipped"] == 2
    for before, after, same in zip(saved, saved[1:4], (True, False, True), strict=False):
        assert all(torch.equal(v, after["state_dict"][k]) for k, v in before["state_dict"].items()) == same
        step = [next(iter(c["optimizer_states"][0]["state"].values()))["step"].item() for c in (before, after)]
        assert (step[0] == step[1]) == same
        assert after["lr_schedulers"][0]["last_epoch"] == before["lr_schedulers"][0]["last_epoch"] + 1


def test_three_in_a_row_stop_the_run(fit, tmp_path, monkeypatch):
    """Wherever it was interrupted between them."""
    nan_in(monkeypatch, 1, 2, 3)
    code, said = fit(["fine", "good", "well", "nice"])
    folder = tmp_path / "run"
    line = said.strip().splitlines()[-1]
    assert code == 2 and "3 updates in a row were not finite" in line and f"checkpoint is {folder / 'checkpoints' / 'last.ckpt'}" in line
    state = checkpoint(folder)
    assert state["global_step"] == 3 and state["skillsd"]["skipped_in_a_row"] == 2
    assert all(v.isfinite().all() for v in state["state_dict"].values())
    monkeypatch.undo()
    code, _ = fit(["fine", "good", "well", "nice"], "--ckpt_path=last")
    assert code == 0 and [r["policy/skipped_steps"] for r in table(folder)] == ["0.0", "1.0", "2.0", "2.0"]


@pytest.mark.parametrize("when", [0, 2])
def test_weights_that_overflow_are_not_saved(fit, tmp_path, monkeypatch, when):
    """The gradient is finite, the step is beyond float32: the run stops, and goes on from the iteration before."""
    step = Learner._step

    def enormous(self: Any, update: Any, params: Any) -> None:
        if self.module.global_step == when:
            self.module.optimizers().param_groups[0] |= {"lr": 1e20, "weight_decay": 1e25}
        step(self, update, params)

    monkeypatch.setattr(Learner, "_step", enormous)
    code, said = fit(["fine", "good", "well", "nice"])
    folder = tmp_path / "run"
    line = said.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: model.optimizer: the weights are not finite after") and "lr 1e+20" in line
    if when == 0:
        assert "There is no checkpoint yet" in line and not list(folder.rglob("*.ckpt"))
        return
    assert f"checkpoint is {folder / 'checkpoints' / 'last.ckpt'}" in line
    state = checkpoint(folder)
    assert state["global_step"] == when == len(table(folder))
    assert all(v.isfinite().all() for v in state["state_dict"].values())
    monkeypatch.undo()
    code, _ = fit(["fine", "good", "well", "nice"], "--ckpt_path=last")
    assert code == 0 and checkpoint(folder)["global_step"] == 4
