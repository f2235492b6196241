"""Runs on two CPU ranks against the same on one: gradients, bank, retrieval, logs, panel, resuming, launchers."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.e2e.runs import ROOT, RULES, Run, assert_equal, overlay
from tests.ranks import Ranks, bank_rows, meeting, near, torchrun
from tests.tolerance import ROUNDING

from skillsd import cli
from skillsd.files.run_folder import read_validations
from skillsd.learner import Learner
from skillsd.module import SkillSD
from skillsd.policy import micro_batches
from skillsd.rollout import Collector
from skillsd.skills.selection import SkillSelection
from skillsd.trajectory import Trajectory

PAIR = ("--trainer.devices=2", "--trainer.strategy=ddp")
TASKS, STEPS = 17, 4
"""16 an iteration, two epochs: each second iteration has one task, so that one rank plays nothing."""


# -- in a process of its own --------------------------------------------------------------------------------------------------


def watched(args: list[str], recorded: str | None = None, record: str | None = None) -> dict[str, Any]:
    """`skillsd ARGS`, and of each iteration what no log holds. Episodes are played, or taken from those that another call recorded.

    Returns:
        code; of each iteration the gradient before the optimizer (flat), group_gap, skills (what `choose` gave), rows (of which this rank
        made the gradient) and parts (its micro-batches); played, the episodes asked of this rank; adapters, after the last iteration.
    """
    seen: dict[str, Any] = {k: [] for k in ("grads", "group_gap", "skills", "rows", "parts")} | {"played": 0}
    episodes: dict[str, Trajectory] = pickle.loads(Path(recorded).read_bytes()) if recorded else {}
    step, choose, collect, training_step, accumulate = (
        Learner._step, SkillSelection.choose, Collector.collect, SkillSD.training_step, Learner._accumulate,
    )  # fmt: skip

    def _step(self: Any, update: Any, params: Any) -> None:
        seen["grads"].append(torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in params]))
        seen.setdefault("start", {k: v.clone() for k, v in self.policy.adapter_state().items()})
        step(self, update, params)
        seen["adapters"] = {k: v.clone() for k, v in self.policy.adapter_state().items()}

    def _choose(*args: Any, **kwargs: Any) -> Any:
        seen["skills"].append(choose(*args, **kwargs))
        return seen["skills"][-1]

    def _collect(self: Any, rows: Any, **kwargs: Any) -> list[Trajectory]:
        keys = [f"{kwargs['iteration']} {row.task.task_id} {row.member} {row.task.split}" for row in rows]
        seen["played"] += len(keys)
        if not recorded or any(row.task.split != "train" for row in rows):
            episodes.update(zip(keys, collect(self, rows, **kwargs), strict=True))
        return [episodes[k] for k in keys]

    def _training_step(*args: Any) -> Any:
        out = training_step(*args)
        seen["group_gap"].append(out["group_gap"])
        return out

    def _accumulate(self: Any, batch: Any, local_rows: Any, *rest: Any) -> Any:
        seen["rows"].append(local_rows)
        seen["parts"].append(
            len(micro_batches([len(batch.student[i]) for i in local_rows], self.micro_batch_tokens, not self.policy.packs))
        )
        return accumulate(self, batch, local_rows, *rest)

    Learner._step, SkillSelection.choose, Collector.collect = _step, _choose, _collect  # type: ignore[method-assign]
    SkillSD.training_step, Learner._accumulate = _training_step, _accumulate  # type: ignore[method-assign]
    seen["code"] = cli.main(args)
    if record:
        Path(record).write_bytes(pickle.dumps(episodes))
    return seen


# -- the runs -----------------------------------------------------------------------------------------------------------------


class Pair(Run):
    """A run whose commands are started on the ranks of `environments`."""

    def __init__(self, folder: Path, ranks: Ranks, overlay: Path) -> None:
        super().__init__(folder, None, overlay)  # type: ignore[arg-type]
        self.ranks = ranks

    def go(self, *more: str, ranks: list[dict[str, str]] | None = None, **recording: str) -> list[Any]:
        """Fit; what `watched` returns on each rank."""
        args = self.args(*more), recording.get("recorded"), recording.get("record")
        found = self.ranks.run("tests.e2e.test_ranks:watched", *args, environments=ranks or [{}])
        self.printed = self.ranks.logs
        assert all(x["code"] == 0 for x in found), self.printed
        return found

    def new(self, name: str) -> Pair:
        """The same in another folder."""
        return Pair(self.folder.with_name(name), self.ranks, self.overlay)

    def copy(self, name: str) -> Pair:
        """A copy, as it was before its last iteration."""
        run = self.new(name)
        shutil.copytree(self.folder, run.folder)
        (run.folder / "checkpoints" / "last.ckpt").unlink()
        return run

    def left(self) -> dict[str, Any]:
        """What it leaves that is the same on any number of ranks."""
        numbers = [{k: float(v) for k, v in row.items() if v and not k.startswith(("time/", "memory/"))} for row in self.rows()]
        lines = [json.loads(line) for line in (self.folder / "trajectories.jsonl").read_text().splitlines()]
        episodes = [{k: v for k, v in line.items() if k != "crc32"} for line in lines]
        checkpoint = self.checkpoint()
        kept = {k: checkpoint[k] for k in ("state_dict", "global_step", "skillsd", "RolloutData")}
        panel = json.loads((self.folder / "panel.json").read_text())
        return {"metrics": numbers, "episodes": episodes, "panel": panel, "bank": bank_rows(self.folder), "checkpoint": kept}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Pair:
    """Not begun."""
    env = {
        "size": 6, "boxes": 3, "difficulties": {"short": {"lengths": [2, 6]}, "long": {"lengths": [7, 9]}},
        "splits": {"train": {"short": TASKS}, "test": {"long": 5}},
        "max_turns": 8, "action_format": "bare", "prompts": {"instruction": ""},
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("ranks")
    file = overlay(
        folder / "overlay.yaml", bank=RULES | {"value_estimate": "gap"}, teacher={"mode": "sync", "every": 1}, log={"histogram_every": 1},
        trainer={"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 1}, panel={"every": 2},
        data={"env_kwargs": env, "batch_tasks": 16, "group_size": 4, "rollout": {"max_rows": 64}},
        policy={"model": "nano", "lora": {"init": "nano-recover"}}, grad_norm_every=1,
        objective={"distillation_weight": 0.5, "group_filter": "zero_variance"},
        # So small that what rounding does to an update is not seen in the next gradient: AdamW makes a whole step of the smallest gradient.
        optimizer={"lr": 1e-7, "warmup_steps": 0, "schedule": "cosine"},
    )  # fmt: skip
    return Pair(folder / "one", ranks, file)


@pytest.fixture(scope="module")
def one(first: Pair) -> tuple[Pair, dict[str, Any]]:
    """On one rank; its episodes are recorded."""
    (seen,) = first.go(record=str(first.folder.with_name("recorded")))
    return first, seen


@pytest.fixture(scope="module")
def two(one: tuple[Pair, dict[str, Any]]) -> Pair:
    """On two, as torchrun starts them."""
    run = one[0].new("two")
    run.go(*PAIR, ranks=torchrun())
    return run


def test_recorded_episodes_give_the_same_gradient_and_bank(one: tuple[Pair, dict[str, Any]]) -> None:
    """1 x 16 tasks and 2 x 8 tasks, in micro-batches of another size, unequally many on the ranks; on two nodes of one process each."""
    alone, seen = one
    run, meet = alone.new("recorded-two"), meeting()
    flags = (
        "--trainer.num_nodes=2",
        "--trainer.strategy=ddp",
        "--model.micro_batch_tokens=300",
        "--trainer.enable_progress_bar=true",
    )
    pair = run.go(*flags, recorded=str(alone.folder.with_name("recorded")), ranks=[{**meet, "NODE_RANK": str(i)} for i in range(2)])

    assert [x["played"] - seen["played"] for x in pair] != [0, 0] and sum(x["played"] for x in pair) == seen["played"]
    for i in range(STEPS):
        both = [set(x["rows"][i]) for x in pair]
        assert not both[0] & both[1] and both[0] | both[1] == set(seen["rows"][i])  # no row twice, none left out
        for x in pair:
            off, size = (x["grads"][i] - seen["grads"][i]).norm(), seen["grads"][i].norm()
            assert off <= ROUNDING * size, f"iteration {i}: {off / size}"
        assert torch.equal(pair[0]["grads"][i], pair[1]["grads"][i])
    assert any(g.any() for g in seen["grads"][::2]) and any(len(set(x)) > 1 for x in zip(*(x["parts"] for x in pair), strict=True))
    assert any(len(rows) < 64 for rows in seen["rows"][::2])  # groups without variance are left out
    assert pair[0]["skills"] == pair[1]["skills"] == seen["skills"] and any(skill for skill, _ in seen["skills"][2])
    for x in pair:
        near(x["group_gap"], seen["group_gap"])
    assert_equal(pair[1]["adapters"], pair[0]["adapters"])
    assert not torch.equal(*(torch.cat([v.flatten() for v in x.values()]) for x in (seen["adapters"], pair[0]["start"])))
    near(run.left(), alone.left())

    assert run.printed[0].count(f"iteration {STEPS} of {STEPS}") == 1 and run.printed[1] == ""  # one log


def test_two_ranks_leave_what_one_leaves(one: tuple[Pair, dict[str, Any]], two: Pair) -> None:
    """The same episodes, numbers, bank and panel; one log; one TensorBoard, with both ranks' tokens."""
    alone, _ = one
    same(two.left(), alone.left())
    said = [re.sub(r"iteration \d.*\n|.* episodes played\n", "", x) for x in (two.printed[0], alone.printed[0])]  # printed by the clock
    assert said[0] == said[1].replace(str(alone.folder), str(two.folder)) and two.printed[1] == ""
    assert "panel after 2 iterations:" in two.printed[0]

    files = [list((run.folder / "tensorboard").glob("events*")) for run in (alone, two)]
    assert [len(x) for x in files] == [1, 1]
    scalars, histograms = zip(*(tensorboard(run.folder) for run in (alone, two)), strict=True)
    near(scalars[1], scalars[0])
    near(histograms[1], histograms[0])
    assert [len(scalars[1][k]) for k in ("loss/total", "panel/success")] == [STEPS, 2]


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """`left` of two runs that have played: recorded log-probs depend on what was sampled with them in one batch; a gap adds up hundreds."""
    for part, tolerance in (("episodes", ROUNDING), ("bank", 1e-4), ("metrics", ROUNDING), ("panel", 0.0), ("checkpoint", ROUNDING)):
        near(a[part], b[part], tolerance, part)


def tensorboard(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """By tag: (step, value), and (step, how many, sum, least, most)."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    tags = events.Tags()
    timeless = [t for t in tags["scalars"] if not t.startswith(("time/", "memory/"))]
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in timeless}, {
        t: [(e.step, (h := e.histogram_value).num, h.sum, h.min, h.max) for e in events.Histograms(t)] for t in tags["histograms"]
    }


def test_a_run_resumes_on_another_number_of_ranks(one: tuple[Pair, dict[str, Any]], two: Pair) -> None:
    """Before the last iteration, in the middle of an epoch: on two what one began, on one what two began."""
    for began, flags, ranks in ((one[0], PAIR, torchrun()), (two, (), None)):
        run = began.copy(f"{began.folder.name}-resumed")
        run.go("--ckpt_path", "last", *flags, ranks=ranks)
        assert len(run.rows()) == STEPS
        same(run.left(), one[0].left())


def test_two_ranks_validate_as_one(one: tuple[Pair, dict[str, Any]], ranks: Ranks) -> None:
    alone, _ = one
    folder = alone.folder.with_name("validated")
    shutil.copytree(alone.folder, folder)
    args = ["validate", *alone.args()[1:-1], f"--trainer.default_root_dir={folder}", "--ckpt_path", "last", *PAIR]
    assert ranks.run("skillsd.cli:main", args, environments=torchrun()) == [0, 0]
    panel = json.loads((folder / "panel.json").read_text())
    (record,) = read_validations(folder)
    near({k: record[k] for k in panel["after"]}, panel["after"], 0.0)
    assert 0 < panel["after"]["completion"] < 1
    assert ranks.logs[0].count("panel of 5 held-out episodes") == 1 and ranks.logs[1] == "" and "sync_dist" not in ranks.logs[0]


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m"], ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]], ids=["lightning", "torchrun"])
def test_real_launchers_print_each_line_once(one: tuple[Pair, dict[str, Any]], start: list[str]) -> None:
    """Lightning starts the second process itself, torchrun both: the first iteration is that of one rank, and each line is there once."""
    alone, _ = one
    run = alone.new(f"real-{len(start)}")
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    command = [sys.executable, *start, "skillsd", *run.args("--trainer.max_steps=1", *PAIR)]
    result = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    assert result.returncode == 0, result.stdout[-5000:]
    for line in ("panel before: 5 episodes", "panel after: 5 episodes", "panel of 5 held-out episodes", "skill bank: ", "log: "):
        assert result.stdout.count(line) == 1, result.stdout
    assert "Traceback" not in result.stdout and "arning" not in result.stdout, result.stdout
    near(run.left()["metrics"][0], alone.left()["metrics"][0])
