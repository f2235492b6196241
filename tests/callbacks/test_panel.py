"""The panel's summary, its file, and what is printed of a run folder."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skillsd.callbacks import Panel
from skillsd.callbacks.panel import paired_difference, read_panel, summarise, write_panel
from skillsd.callbacks.report import print_report
from skillsd.errors import ConfigError
from skillsd.skills import Skill, SkillBank
from skillsd.statistics import bootstrap_mean, wilson_interval
from skillsd.trajectory import Task, Trajectory, Turn


def played(task: str, member: int, completion: float, seed: int = 0) -> Trajectory:
    return Trajectory(
        0, task, member, seed, "", (1,), (2,), (True,), (-0.1,), (Turn("o", "up", completion),) * 2,
        completion, completion, completion == 1.0, "done",
    )  # fmt: skip


def panel(*completions: float, tasks: str = "abcdefgh", attempts: int = 1) -> list[Trajectory]:
    return [played(tasks[i // attempts], i % attempts, c) for i, c in enumerate(completions)]


def test_shares_and_intervals():
    result = summarise(panel(1.0, 0.5, 0.0, 1.0))
    assert (result["n"], result["success"], result["completion"]) == (4, 0.5, 0.625)
    assert result["success_interval"] == list(wilson_interval(2, 4))
    assert result["pass_at"] == {"1": 0.5}
    assert result["levels"][1] == {
        "task_id": "b", "member": 0, "seed": 0, "success": False, "completion": 0.5, "turns": 2, "finish_reason": "done"
    }  # fmt: skip
    assert json.loads(json.dumps(result)) == result
    empty = summarise([])
    assert (empty["n"], empty["success"], empty["success_interval"], empty["pass_at"]) == (0, 0.0, [0.0, 1.0], {})


def test_pass_at_k_against_brute_force():
    """The chance that k of a task's attempts, drawn without replacement, hold a success; averaged over tasks."""
    rng = random.Random(0)
    for attempts in (2, 3, 4, 6):
        rows = [[float(rng.random() < p) for _ in range(attempts)] for p in (0.0, 0.2, 0.5, 0.9)]
        got = summarise(panel(*itertools.chain(*rows), attempts=attempts))["pass_at"]
        assert list(got) == [str(k) for k in (1, 2, 4) if k <= attempts]
        for k, share in got.items():
            draws = [[any(d) for d in itertools.combinations(row, int(k))] for row in rows]
            assert share == pytest.approx(sum(sum(d) / len(d) for d in draws) / len(rows))


def test_the_difference_is_paired_by_task():
    before = summarise(panel(0.0, 0.0, 1.0, 0.5, attempts=2))
    after = summarise(panel(1.0, 0.0, 1.0, 1.0, attempts=2))
    assert paired_difference(before, after) == bootstrap_mean([0.5, 0.5])
    assert paired_difference(before, after, "completion") == bootstrap_mean([0.5, 0.25])
    reseeded = [played(x["task_id"], x["member"], 1.0, seed=1) for x in before["levels"]]
    for other in (panel(1.0, 0.0, 1.0, attempts=2), panel(1.0, 0.0, 1.0, 1.0), reseeded):
        with pytest.raises(ValueError, match="different panels"):
            paired_difference(before, summarise(other))


def test_the_file_is_completed_and_replaced_whole(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert read_panel(folder) == {}
    before, after = summarise(panel(0.0, 0.5)), summarise(panel(1.0, 0.5))
    write_panel(folder, {"before": before})
    assert read_panel(folder) == {"before": before}
    write_panel(folder, {"after": after})
    assert read_panel(folder) == {
        "before": before, "after": after, "difference": {k: list(paired_difference(before, after, k)) for k in ("success", "completion")}
    }  # fmt: skip
    assert [p.name for p in folder.iterdir()] == ["panel.json"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    stood = (folder / "panel.json").read_bytes()
    with monkeypatch.context() as m:
        m.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_panel(folder, {"validate": after})
    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            write_panel(folder, {"validate": after})
    assert (folder / "panel.json").read_bytes() == stood

    write_panel(folder, {}, drop=("after", "difference"))
    assert list(read_panel(folder)) == ["before"]


def stand_in(folder: Path, batches: list[list[Trajectory]], step: int = 0) -> Any:
    """A trainer as far as the panel looks at it, with episodes that are played already."""

    class Loader(list):
        rows = [(t.seed, SimpleNamespace(task=Task(t.task_id), member=t.member)) for b in batches for t in b]

    trainer = SimpleNamespace(default_root_dir=str(folder), global_step=step, loggers=[], progress_bar_callback=None)
    trainer.datamodule = SimpleNamespace(val_dataloader=lambda: Loader(batches), panel_attempts=1)
    return trainer


def test_before_and_after(tmp_path, capsys):
    worse, better = panel(0.0, 0.5, 0.0), panel(1.0, 0.5, 0.0)
    callback = Panel()
    callback.on_train_start(stand_in(tmp_path, [worse[:2], worse[2:]]), None)
    assert list(read_panel(tmp_path)) == ["before"] and callback.result["n"] == 3
    callback.on_train_batch_start(stand_in(tmp_path, []), None, None, 0)
    callback.on_train_end(stand_in(tmp_path, [better], 5), None)
    stored = read_panel(tmp_path)
    assert stored["difference"]["success"][0] == pytest.approx(1 / 3) and callback.result == stored["after"]

    again = Panel()  # a finished run: nothing is played, whatever would come out now
    again.on_train_start(stand_in(tmp_path, [better], 5), None)
    again.on_train_end(stand_in(tmp_path, [worse], 5), None)
    assert read_panel(tmp_path) == stored and again.result == stored["after"]
    again.on_train_start(stand_in(tmp_path, [better], 5), None)
    again.on_train_batch_start(stand_in(tmp_path, []), None, None, 0)  # it goes on: what stood as its end is not
    assert list(read_panel(tmp_path)) == ["before"]
    with pytest.raises(ConfigError, match=r"data\.init_args: the panel of .* other episodes"):
        again.on_train_start(stand_in(tmp_path, [panel(1.0, 1.0)]), None)
    assert capsys.readouterr().out.count("panel ") == 2


def test_switched_off(tmp_path):
    callback = Panel(before=False, after=False)
    callback.on_train_start(stand_in(tmp_path, [panel(1.0)]), None)
    callback.on_train_end(stand_in(tmp_path, [panel(1.0)]), None)
    assert read_panel(tmp_path) == {} and callback.result == {}


def test_the_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    print_report(tmp_path)
    assert capsys.readouterr().out == ""
    before, after = summarise(panel(0.0, 0.5, 1.0, 0.0)), summarise(panel(1.0, 0.5, 1.0, 0.0))
    write_panel(tmp_path, {"before": before})
    write_panel(tmp_path, {"after": after})
    with SkillBank(tmp_path / "bank.sqlite") as bank:
        bank.insert([Skill("a", "b", "c", "t1"), Skill("a", "b", "d", "t1"), Skill("a", "b", "c", "t2")], 0)
    (tmp_path / "adapter" / "student").mkdir(parents=True)
    (tmp_path / "metrics.csv").touch()
    print_report(tmp_path)
    out = capsys.readouterr().out
    low, high = wilson_interval(1, 4)
    assert "panel of 4 held-out episodes" in out and f"0.250 [{low:.3f}, {high:.3f}]" in out
    assert "after - before, paired" in out and "+0.250 [+0.000, +0.750]" in out
    assert "skill bank: 3 skills of 2 tasks" in out and "pass@" not in out
    assert f"adapter: {tmp_path}/adapter/student\n" in out and f"log: {tmp_path}/metrics.csv\n" in out and "trajectories:" not in out

    write_panel(tmp_path, {"validate": summarise(panel(1.0, 0.0, 0.0, 0.0, attempts=2))})
    print_report(tmp_path)
    out = capsys.readouterr().out
    assert "validate: pass@1 0.250, pass@2 0.500" in out
