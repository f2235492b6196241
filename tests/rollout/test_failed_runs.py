"""Whole runs with failed episodes and updates that are not finite: they go on and count, or stop with a checkpoint to go on from."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.rollout.hostile import Hostile, registered

from skillsd import cli
from skillsd.callbacks import resume
from skillsd.learner import Learner
from skillsd.objective import Objective
from skillsd.trajectory import Trajectory

__all__ = ["registered"]


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
