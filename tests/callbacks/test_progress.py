"""What a log says while a run goes on: what is said, how often, and where a progress bar says it instead."""

from __future__ import annotations

from io import StringIO
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar, Timer, TQDMProgressBar
from rich.console import Console

from skillsd.callbacks import EnvStepBudget, ProgressLog, RunLog
from skillsd.callbacks.progress import draws_bar, numbers, position, time_left
from skillsd.errors import ConfigError
from skillsd.metrics import Metrics
from skillsd.module import SkillSD
from skillsd.objective import Objective
from skillsd.policy import PolicySettings


def at(step: int, total: float = 48, *callbacks: Any, **more: Any) -> Any:
    trainer = SimpleNamespace(global_step=step, estimated_stepping_batches=total, callbacks=list(callbacks), should_stop=False)
    vars(trainer).update({"progress_bar_callback": None, "default_root_dir": "runs/a b"} | more)
    return trainer


def budget(steps: int, used: int) -> EnvStepBudget:
    made = EnvStepBudget(steps)
    made.used = used
    return made


def module() -> SkillSD:
    return SkillSD(PolicySettings(model="nano"), Objective())


def outputs(success: float = 0.5, failed: float = 0.0, loss: float = 0.25) -> dict[str, Any]:
    return {"metrics": Metrics({"reward/success": success, "rollout/failed": failed, "loss/total": loss})}


def test_the_time_left_is_of_what_ends_first():
    """What ends first counts: the iterations, a budget of environment steps at the mean so far, or a time limit."""
    assert time_left(at(12), 2.0) == 72.0
    assert time_left(at(12, 48, budget(1000, 600)), 2.0) == 2.0 * 400 / 50
    assert time_left(at(12, 48, budget(100_000, 600)), 2.0) == 72.0
    assert time_left(at(12, inf), 2.0) is None and time_left(at(12, inf, budget(1000, 600)), 2.0) == 16.0
    timer = Timer(duration={"seconds": 30})
    assert time_left(at(12, inf, timer), 2.0) == 30.0
    assert [position(12, at(12)), position(12, at(12, 48, timer)), position(12, at(12, inf))] == [
        "12 of 48",
        "12 of at most 48",
        "12",
    ]


def test_an_iteration_is_summed_up_in_a_few_numbers():
    assert numbers(outputs()) == ["solved 0.500", "loss 0.25"]
    assert numbers(outputs(failed=0.25)) == ["solved 0.500", "25% of the episodes failed", "loss 0.25"]
    assert numbers(outputs(success=0.0, failed=1.0)) == ["100% of the episodes failed", "loss 0.25"]  # none was counted
    assert numbers({"loss": 1.5}) == numbers(1.5) == ["loss 1.5"] and numbers(None) == []


def test_a_bar_is_drawn_where_it_can_be_seen():
    def seen(bar: Any, **console: Any) -> bool:
        return draws_bar(at(0, progress_bar_callback=bar), lambda: Console(file=StringIO(), **console))

    off = RichProgressBar()
    off.disable()
    assert seen(RichProgressBar(), force_terminal=True) and seen(RichProgressBar(), force_jupyter=True) and seen(TQDMProgressBar())
    assert not any((seen(RichProgressBar()), seen(off, force_terminal=True), seen(None, force_terminal=True)))


def run(log: ProgressLog, ends: list[float], total: int, *, start: int = 0) -> None:
    """A training in which iteration k ends at so many seconds."""
    now = 0.0
    log.clock = lambda: now
    log.setup(at(start, total), module(), "fit")
    log.on_train_start(at(start, total, RunLog()), module())
    log.on_train_epoch_start(at(start, total), module())
    for k, end in enumerate(ends, start + 1):
        now = end
        log.on_train_batch_end(at(k, total), None, outputs(), None, 0)
    log.on_train_end(at(start + len(ends), total), module())


def test_the_first_the_last_and_one_in_ten_seconds(capsys: pytest.CaptureFixture[str]):
    run(ProgressLog(), [float(k) for k in range(1, 26)], 25)
    _, where, *lines = capsys.readouterr().out.splitlines()
    assert "skillsd view 'runs/a b'" in where
    assert [line.partition(":")[0] for line in lines] == [f"iteration {k} of 25" for k in (1, 11, 21, 25)]
    assert lines[1].endswith("solved 0.500, loss 0.25, 1 s each, about 14 s left") and "left" not in lines[-1]
    run(ProgressLog(), [60.0], 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iteration")]
    assert lines == ["iteration 1 of 1: solved 0.500, loss 0.25, 60 s each"]
    run(ProgressLog(every=None), [1.0, 2.0], 2)
    assert "iteration" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"ProgressLog\.every is -1"):
        ProgressLog(every=-1.0)


def test_a_resumed_run_says_from_where(capsys: pytest.CaptureFixture[str]):
    run(ProgressLog(), [5.0], 48, start=24)
    out = capsys.readouterr().out
    assert "continuing from iteration 24 of 48\n" in out and "iteration 25 of 48: " in out
    ProgressLog().on_train_start(at(48), module())
    ProgressLog().on_train_start(at(30, 48, budget(100, 100)), module())
    assert capsys.readouterr().out == "all 48 iterations are done already\nall 30 iterations are done already\n"


def test_an_early_end_has_a_reason(capsys: pytest.CaptureFixture[str]):
    """What a callback does to a run is seen nowhere else: Lightning's own words are for its loggers."""
    timer, patient = Timer(duration={"seconds": 30}), EarlyStopping("loss/total", patience=2)
    timer.time_remaining = lambda stage=None: -0.1  # type: ignore[method-assign]
    patient.wait_count = 2
    for who, reason in ((budget(100, 104), "104 environment steps"), (timer, "max_time"), (patient, "loss/total"), (None, "a callback")):
        log = ProgressLog(every=None)
        log.ends.extend((0.0, 1.0))
        log.on_train_end(at(7, 48, *filter(None, [who]), should_stop=True), module())
        said = capsys.readouterr().out
        assert said.startswith("training ends after iteration 7 of ") and reason in said and said.count("\n") == 1
        log.on_train_end(at(48, 48, *filter(None, [who]), should_stop=True), module())
    assert capsys.readouterr().out == ""


def test_a_long_rollout_is_not_silent(capsys: pytest.CaptureFixture[str]):
    log, now = ProgressLog(), [0.0]
    log.clock, log.latest = lambda: now[0], 0.0
    for now[0] in (5.0, 59.0, 61.0, 90.0, 130.0):
        log.playing("iteration 3", int(now[0]), 200)
    now[0] = 900.0
    log.playing("iteration 3", 200, 200)
    assert capsys.readouterr().out == "iteration 3: 61 of 200 episodes played\niteration 3: 130 of 200 episodes played\n"
