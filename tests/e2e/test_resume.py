"""A run that is killed with SIGKILL at any moment and resumed gives the same numbers, to the bit, as one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.runs import ROOT, STEPS, VARIANTS, Run, Server, assert_equal, overlay

from skillsd.files.durable import temporary


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Server, Server]]:
    """One for uninterrupted runs and one for killed ones, as they hash strings differently."""
    both = Server(), Server()
    yield both
    for server in both:
        server.close()


@pytest.fixture
def two_runs(servers: tuple[Server, Server], tmp_path: Path) -> Callable[..., list[Run]]:
    """Settings of `overlay` -> two runs of them, one by each of the servers."""

    def make(names: str = "whole killed", **settings: Any) -> list[Run]:
        file = overlay(tmp_path / "overlay.yaml", **settings)
        return [Run(tmp_path / name, server, file) for name, server in zip(names.split(), servers, strict=True)]

    return make


MOMENTS: list[tuple[str, int, bool]] = [
    ("skillsd.engines.in_process:InProcessSession.step", 3, False),  # in the `before` panel
    ("skillsd.callbacks.log:RunLog._append", 3, False),  # the first row stands, its trajectories do not; no checkpoint yet
    ("skillsd.callbacks.resume:CheckpointFiles.save_checkpoint", 1, False),  # all is written, but not the first checkpoint
    ("skillsd.callbacks.resume:note_checkpoint", 1, True),  # it is on record, and has no name yet
    ("skillsd.callbacks.resume:CheckpointFiles.save_checkpoint", 1, True),  # and just after it
    ("skillsd.engines.in_process:InProcessSession.step", 4, True),  # in a rollout
    ("skillsd.policy.policy:Policy._score", 3, True),  # in a training step
    ("skillsd.learner:Learner._step", 1, True),  # the optimizer has stepped, nothing is written
    ("skillsd.skills.bank:SkillBank.insert", 2, True),  # the bank is ahead of the log
    ("skillsd.callbacks.log:RunLog.on_train_batch_end", 1, True),  # the log is ahead of the checkpoint
    ("skillsd.callbacks.resume:CheckpointFiles.save_checkpoint", 1, True),
    ("torch:save", 2, True),  # the checkpoint is made, not written
    ("skillsd.rollout.collector:Collector.collect", 2, False),
]
FEW: list[tuple[str, int, bool]] = [
    ("skillsd.skills.selection:SkillSelection.texts", 2, True),  # the summaries are made, the update is not
    ("skillsd.learner:Learner._step", 1, True),
    ("skillsd.callbacks.log:RunLog.on_train_batch_end", 2, True),
    ("skillsd.rollout.collector:Collector.collect", 1, False),
]
"""For what differs from the others in few places."""
CURVE: list[tuple[str, int, bool]] = [
    ("skillsd.callbacks.panel:write_panel", 2, True),  # a point of the learning curve is ahead of the checkpoint
    ("skillsd.callbacks.panel:write_panel", 2, False),  # it is played, not written
]
END: list[tuple[str, int, bool]] = [
    ("skillsd.callbacks.panel:summarise", 1, False),  # the `after` panel is played, not written
    ("skillsd.callbacks.panel:write_panel", 1, True),
    ("skillsd.callbacks.export:export_adapter", 1, False),
    ("skillsd.callbacks.export:export_adapter", 1, True),
]


class EndedError(Exception):
    """Ends a run within the process."""


def tear(run: Run) -> None:
    """What a kill in the middle of a write leaves."""
    for name in ("metrics.csv", "trajectories.jsonl"):
        with (run.folder / name).open("a") as f:
            f.write('7,2,"torn')
    temporary(run.folder / "checkpoints" / "last.ckpt").write_bytes(b"PK")


def test_a_killed_run_ends_as_one_that_was_not(two_runs: Callable[..., list[Run]]) -> None:
    """The short version; also: running again, and what is refused."""
    whole, killed = two_runs(**VARIANTS["rules"])
    whole.fit()
    killed.kill("skillsd.callbacks.log:RunLog.on_train_batch_end", 4, True)
    tear(killed)
    killed.resume()
    record = whole.record()
    assert_equal(killed.record(), record)

    assert len(record["metrics"]) == STEPS == len({row["iteration"] for row in record["metrics"]})
    assert [row["epoch"] for row in record["metrics"]] == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    assert len({row["loss/total"] for row in record["metrics"]}) > 5  # something was learnt from
    state = {k: v for k, v in record["checkpoint"]["state_dict"].items() if k != "teacher_is_student"}
    assert {k.split(".")[0] for k in state} == {"student", "teacher"} and all("lora_" in k for k in state)
    size = sum(t.numel() * t.element_size() for t in state.values())
    assert (whole.folder / "checkpoints" / "last.ckpt").stat().st_size < 2.5 * size + 200_000  # two moments of the student, no base
    assert [p.name for p in sorted((killed.folder / "checkpoints").iterdir())] == ["last.ckpt", "previous.ckpt"]

    text = killed.resume()  # a finished run: nothing is played, the table is printed
    assert "after - before" in text and "panel after:" not in text
    assert_equal(killed.record(), record)
    assert "--overwrite=true" in killed.fit(code=2)
    assert "other episodes" in killed.resume("--data.panel_attempts=2", code=2)
    assert_equal(killed.record(), record)


def test_imported_skills_are_there_after_every_kill(two_runs: Callable[..., list[Run]], tmp_path: Path) -> None:
    """They are there in the first iteration, and again after every kill, also one before the first checkpoint."""
    from skillsd.analysis.skills import skills
    from skillsd.skills.exchange import FORMAT

    whole, killed = two_runs(**VARIANTS["rules"] | {"trainer": {"max_epochs": 1}})  # 3 iterations
    texts = {"success_analysis": "solved", "mistake_analysis": "none", "golden_workflow": "up"}
    lines = [json.dumps({"format": FORMAT, "task_id": f"train-{i:04d}", "source_iteration": 5} | texts) for i in (*range(8), 99)]
    (tmp_path / "skills.jsonl").write_text("\n".join(lines))
    for run in (whole, killed):
        skills(["import", str(run.folder), str(tmp_path / "skills.jsonl")])
    whole.fit()
    killed.kill("skillsd.callbacks.resume:CheckpointFiles.save_checkpoint", 1, False)  # events, and no checkpoint yet
    assert len(killed.rows()) == 1 and "--overwrite=true" in killed.fit(code=2)
    killed.kill("skillsd.callbacks.log:RunLog.on_train_batch_end", 2, True)
    killed.resume()
    record = whole.record()
    assert_equal(killed.record(), record)
    assert [event[:3] for event in record["event"][:10]] == [*((i, -1, "insert") for i in range(1, 10)), (10, 0, "use")]
    assert {float(row["teacher/skill_share"]) for row in record["metrics"]} == {1.0}


def test_a_second_fit_beside_a_running_one_is_refused(servers: tuple[Server, Server], tmp_path: Path) -> None:
    """It is refused with the first one's process, which goes on; what is killed owns nothing any more."""
    file = overlay(tmp_path / "overlay.yaml", **VARIANTS["rules"])
    first, second = (Run(tmp_path / "run", s, file) for s in servers)
    second.log = tmp_path / "second.log"
    pid = servers[0].start(first.args(), first.log)
    while not first.has_rows(1):
        os.kill(pid, 0)
        time.sleep(0.002)
    os.kill(pid, signal.SIGSTOP)  # it would have ended before the others have begun
    said = [second.fit(*flags, code=2) for flags in ((), ("--ckpt_path", "last"), ("--overwrite=true",))]
    os.kill(pid, signal.SIGCONT)
    assert all(f"process {pid} on" in text for text in said)
    assert servers[0].wait() == 0, first.log.read_text()[-5000:]
    assert [row["iteration"] for row in first.rows()] == [str(i) for i in range(STEPS)]
    record = first.record()
    assert second.kill_when(lambda: (second.folder / "run.lock").exists(), 0.0) and (second.folder / "run.lock").exists()
    second.resume()
    assert_equal(second.record(), record)


def test_a_new_learning_rate_holds(two_runs: Callable[..., list[Run]]) -> None:
    """Lightning alone would go on with the checkpoint's."""
    run, other = two_runs("run other", **VARIANTS["rules"])
    run.kill("skillsd.callbacks.log:RunLog.on_train_batch_end", 4, True)
    shutil.copytree(run.folder, other.folder)
    run.resume()
    other.resume("--model.optimizer.lr=1e-3", "--model.optimizer.weight_decay=0.1")
    before, after = ([float(row["optimizer/lr"]) for row in r.rows()] for r in (run, other))
    kept = next(i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y)
    assert kept in (3, 4) and after[kept:] == [x / 2 for x in before[kept:]]
    assert other.checkpoint()["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["hindsight", "off_policy_dynamic"])
def test_killed_runs_of_other_methods_end_as_ones_that_were_not(two_runs: Callable[..., list[Run]], variant: str) -> None:
    """Where the teacher's prompts are made of the rollout, or the teacher's weights make it."""
    whole, killed = two_runs(**VARIANTS[variant])
    whole.fit()
    killed.kill("skillsd.learner:Learner._step", 5, True)
    killed.resume()
    record = whole.record()
    assert_equal(killed.record(), record)
    if variant == "hindsight":
        assert list(record["panel"]["during"]) == ["2", "4", "6", "8"] and len(record["skill"]) > 20
        assert all(float(row["teacher/skill_share"]) == 1 for row in record["metrics"])  # from the first iteration on
    else:
        assert all(float(row["policy/logp_drift"]) == 0 for row in record["metrics"])
        assert [float(row["teacher/skill_share"]) for row in record["metrics"]] == [0] * 3 + [1] * 6


def test_a_resumed_run_asks_for_the_same_summaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nano model never writes JSON; a stand-in does, from what names the noise. In process, ended by an exception."""
    from skillsd import cli
    from skillsd.callbacks import RunLog
    from skillsd.data import RolloutData

    asked: list[Any] = []

    def generate(self: RolloutData, conversations: list[Any], max_new_tokens: int, seed_keys: list[Any], adapter: Any = None) -> list[str]:
        asked.extend(seed_keys)
        texts = [f"key {seed} {iteration} {task_id} {member}" for seed, iteration, task_id, member in seed_keys]
        return [json.dumps({"success_analysis": t, "mistake_analysis": "none", "golden_workflow": "up"}) for t in texts]

    monkeypatch.setattr(RolloutData, "generate", generate)
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    file = overlay(tmp_path / "overlay.yaml", **VARIANTS["base"])
    whole, ended = (Run(tmp_path / n, None, file) for n in ("whole", "ended"))  # type: ignore[arg-type]
    try:
        assert cli.main(whole.args()) == 0
        keys, log = list(asked), RunLog.on_train_batch_end
        asked.clear()

        def end(self: RunLog, trainer: Any, *args: Any) -> None:
            log(self, trainer, *args)
            if trainer.global_step == 5:
                raise EndedError

        monkeypatch.setattr(RunLog, "on_train_batch_end", end)
        assert cli.main(ended.args()) == 2  # an error in code that is not ours is one line
        monkeypatch.setattr(RunLog, "on_train_batch_end", log)
        assert cli.main(ended.args("--ckpt_path", "last")) == 0
    finally:
        torch.set_num_threads(threads)
    record = whole.record()
    assert_equal(ended.record(), record)
    assert len(keys) == len(set(keys)) == 48 == len(record["skill"])
    assert set(asked) == set(keys)
    assert record["metrics"][-1]["skills/failed"] == "0.0"


def test_a_checkpoint_keeps_whether_both_adapters_are_scored() -> None:
    """After a step without a gradient the tensors are equal, and yet both adapters are scored: a checkpoint keeps that."""
    from skillsd.module import SkillSD
    from skillsd.policy import PolicySettings

    one, other = SkillSD(PolicySettings("nano")), SkillSD(PolicySettings("nano"))
    checkpoint: dict[str, Any] = {}
    one.configure_model()
    other.configure_model()
    for changed in (False, True):
        if changed:
            one.policy.student_changed()
        one.on_save_checkpoint(checkpoint)
        other.on_load_checkpoint(checkpoint)
        other.load_state_dict(one.state_dict())
        assert other.policy.teacher_is_student is not changed


@pytest.mark.slow
@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.torture] if v not in ("ema", "base") else []) for v in VARIANTS])
def test_a_run_killed_at_every_kind_of_moment_ends_as_one_that_was_not(two_runs: Callable[..., list[Run]], variant: str) -> None:
    """Killed at every kind of moment, one after the other, in one run; in the other variants at a few. `make torture` does more."""
    whole, killed = two_runs(**VARIANTS[variant])
    whole.fit()
    moments = {"ema": MOMENTS, "hindsight": FEW + CURVE, "off_policy_dynamic": FEW[1:]}.get(variant, FEW)
    for i, bomb in enumerate(moments):
        killed.kill(*bomb)
        if i == 4:
            tear(killed)
    for bomb in END if variant == "ema" else END[:1]:
        killed.kill(*bomb)
    killed.resume()
    record = whole.record()
    assert_equal(killed.record(), record)
    failed = [float(row["skills/failed"]) for row in record["metrics"]]
    assert failed[-1] == (48.0 if variant == "base" else 0.0)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(two_runs: Callable[..., list[Run]]) -> None:
    """Killed from outside, whatever it is doing."""
    whole, killed = two_runs(**VARIANTS["ema"])
    whole.fit()
    draw, kills = random.Random(1), 0
    for goal in (0, 1, 3, 4, 6, 8, 9):
        kills += killed.kill_when(partial(killed.has_rows, goal), draw.uniform(0, 0.3))
    killed.resume()
    assert kills >= 4
    assert_equal(killed.record(), whole.record())


@pytest.mark.torture
def test_a_run_goes_on_from_every_checkpoint(servers: tuple[Server, Server], tmp_path: Path) -> None:
    """A finished run, continued from each of its checkpoints, ends as it did; so does one that is stopped after every iteration."""
    constant = {"optimizer": {"lr": 2e-3, "schedule": "constant"}}  # a cosine's length is the run's, which max_steps changes
    file = overlay(tmp_path / "overlay.yaml", **VARIANTS["rules"], **constant)
    whole = Run(tmp_path / "whole", servers[0], file)
    again, steps = (Run(tmp_path / n, servers[1], file) for n in ("again", "steps"))
    keep = tmp_path / "keep.yaml"
    overlay(keep, VARIANTS["rules"]["bank"], VARIANTS["rules"]["teacher"], {"save_top_k": -1}, **constant)
    whole.overlay = keep
    whole.fit()
    record = whole.record()
    checkpoints = sorted((whole.folder / "checkpoints").glob("epoch*.ckpt"))
    assert len(checkpoints) == STEPS
    for path in checkpoints:
        shutil.rmtree(again.folder, ignore_errors=True)
        shutil.copytree(whole.folder, again.folder)
        again.fit(f"--ckpt_path={again.folder / 'checkpoints' / path.name}")
        assert_equal(again.record(), record)

    steps.kill("skillsd.callbacks.panel:summarise", 2, False, "--trainer.max_steps=1")
    assert "panel after:" in steps.resume("--trainer.max_steps=1")  # no step is left, but the last panel is
    for k in range(1, STEPS):
        steps.resume(f"--trainer.max_steps={k}")
        assert len(steps.rows()) == k
    steps.resume()
    assert_equal(steps.record(), record)


@pytest.mark.slow
def test_the_command_killed_during_its_first_checkpoints_goes_on(two_runs: Callable[..., list[Run]]) -> None:
    """The command itself, killed during its first checkpoints."""
    whole, killed = two_runs(**VARIANTS["rules"])
    whole.fit()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'envs'}"}
    command = [sys.executable, "-m", "skillsd", *killed.args("--ckpt_path", "last")]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(killed.rows()) < 4 and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    assert_equal(killed.record(), whole.record())
