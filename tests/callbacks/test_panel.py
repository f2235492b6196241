"""The panel's summary, its file, and what is printed of a run folder."""

from __future__ import annotations

import itertools
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skillsd.analysis.panel import table, title
from skillsd.callbacks import Panel
from skillsd.callbacks.panel import add_validation, summarise, write_panel
from skillsd.errors import ConfigError
from skillsd.files.run_folder import read_panel, read_results, read_validations
from skillsd.statistics import bootstrap_mean, paired_difference, wilson_interval
from skillsd.trajectory import Task, Trajectory, Turn


def played(task: str, member: int, completion: float, seed: int = 0) -> Trajectory:
    return Trajectory(
        0, task, member, seed, "", (1,), (2,), (True,), (-0.1,), (Turn("o", "up", completion),) * 2,
        completion, completion, completion == 1.0, "done",
    )  # fmt: skip


def scored(successes: dict[str, str], member: int = 0, seed: int = 0) -> list[Trajectory]:
    """Tasks named scenario_1, scenario_2, ...: "10" are two, the first of them solved."""
    return [
        played(f"{name}_{i}", member, float(x == "1"), seed) for name, marks in successes.items() for i, x in enumerate(marks, 1)
    ]  # fmt: skip


def scenarios_of(episodes: list[Trajectory]) -> dict[str, str]:
    return {t.task_id: t.task_id.partition("_")[0] for t in episodes}


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


def test_episodes_of_a_task_are_one_item_of_an_interval():
    """Copies of an episode make no interval narrower."""
    once, copies = (summarise(panel(*[x for x in (1.0, 0.5, 0.0, 1.0) for _ in range(n)], attempts=n)) for n in (1, 4))
    assert copies["n"] == 16 and copies["success_interval"] == once["success_interval"] == list(wilson_interval(2, 4))
    assert table({"before": copies}).rows == table({"before": once}).rows
    assert title({"before": copies}).endswith("over tasks") and title({"before": once}).endswith("95% intervals")
    mixed = summarise(panel(1.0, 0.0, 1.0, 1.0, 0.0, 0.0, attempts=2))
    assert mixed["success_interval"] == list(bootstrap_mean([0.5, 1.0, 0.0])[1:])


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


def test_failed_episodes_are_counted():
    gone = [replace(t, finish_reason="failed", failure="killed", completion=0.0, success=False) for t in panel(1.0, 0.5)]
    result = summarise([*gone, *panel(1.0, 0.0, tasks="xy")])
    assert (result["n"], result["failed"], result["success"], result["completion"]) == (4, 2, 0.25, 0.25)
    assert [x["finish_reason"] for x in result["levels"]] == ["failed", "failed", "done", "done"]
    assert summarise(panel(1.0))["failed"] == 0


def test_goal_completion():
    """A scenario is completed with all of its tasks, whatever their number and their order; as AppWorld counts."""
    episodes = scored({"a": "111", "b": "110", "c": "000", "d": "1"})
    random.Random(0).shuffle(episodes)
    result = summarise(episodes, scenarios_of(episodes))
    assert result["task_goal_completion"] == result["success"] == 6 / 10 and result["scenario_goal_completion"] == 2 / 4
    assert result["task_goal_completion_interval"] == result["success_interval"] == list(wilson_interval(6, 10))
    assert result["scenario_goal_completion_interval"] == list(wilson_interval(2, 4))
    assert json.loads(json.dumps(result)) == result
    for without in (None, {}, dict.fromkeys(scenarios_of(episodes), "")):
        assert not [k for k in summarise(episodes, without) if "goal" in k]
    alone = scenarios_of(episodes) | {"b_1": "", "b_2": "", "b_3": ""}
    assert summarise(episodes, alone)["scenario_goal_completion"] == 4 / 6  # b's tasks stand alone: a, b_1, b_2 and d of six


def test_goal_completion_of_several_attempts():
    """Each attempt is judged by itself: two that solve one task each do not make a scenario."""
    first, second, other = {"a": "10", "b": "11", "c": "00"}, {"a": "01", "b": "11", "c": "00"}, {"a": "11", "b": "10", "c": "00"}
    episodes = [*scored(first), *scored(second, member=1), *scored(other, seed=7), *scored(other, member=1, seed=7)]
    result = summarise(episodes, scenarios_of(episodes))
    each = [summarise(scored(x), scenarios_of(episodes)) for x in (first, second, other, other)]
    for key in ("task_goal_completion", "scenario_goal_completion"):
        assert result[key] == pytest.approx(sum(x[key] for x in each) / 4)
    assert result["scenario_goal_completion"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 3 + 1 / 3) / 4)
    assert result["scenario_goal_completion_interval"] == list(bootstrap_mean([0.5, 0.5, 0.0])[1:])  # over scenarios, not attempts
    assert result["task_goal_completion_interval"] == list(bootstrap_mean([0.75, 0.75, 1.0, 0.5, 0.0, 0.0])[1:])
    same = [*scored(first), *scored(first, member=1)]  # attempts that agree are no further evidence
    assert summarise(same, scenarios_of(same))["scenario_goal_completion_interval"] == list(wilson_interval(1, 3))


def test_the_difference_is_paired_by_task():
    before = summarise(panel(0.0, 0.0, 1.0, 0.5, attempts=2))
    after = summarise(panel(1.0, 0.0, 1.0, 1.0, attempts=2))
    assert paired_difference(before, after) == bootstrap_mean([0.5, 0.5], bounds=(-1.0, 1.0))
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
            write_panel(folder, {"after": before})
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_panel(folder, {"after": before})
    assert (folder / "panel.json").read_bytes() == stood

    write_panel(folder, {}, drop=("after", "difference"))
    assert list(read_panel(folder)) == ["before"]


def stand_in(folder: Path, batches: list[list[Trajectory]], step: int = 0) -> Any:
    """A trainer as far as the panel looks at it, with episodes that are played already."""

    class Loader(list):
        rows = [(t.seed, SimpleNamespace(task=Task(t.task_id), member=t.member)) for b in batches for t in b]

    trainer = SimpleNamespace(default_root_dir=str(folder), global_step=step, loggers=[], progress_bar_callback=None)
    trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    tasks = [Task(name, scenario=scenario) for name, scenario in scenarios_of([t for b in batches for t in b]).items()]
    tasks = [replace(t, scenario="") if t.scenario == t.task_id else t for t in tasks]
    trainer.datamodule = SimpleNamespace(val_dataloader=lambda: Loader(batches), panel_attempts=1, panel_tasks=tasks)
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
    with pytest.raises(ConfigError, match=r"data\.panel_split: the panel of .* other episodes"):
        again.on_train_start(stand_in(tmp_path, [panel(1.0, 1.0)]), None)
    assert capsys.readouterr().out.count("success") == 2


def test_scenarios_come_from_the_data_module(tmp_path, capsys):
    """Into panel.json, the loggers, and one line on the terminal; from before and after training and from validation."""
    logged: dict[str, Any] = {}
    episodes = scored({"a": "11", "b": "10"})
    want = {"success": 0.75, "completion": 0.75, "task_goal_completion": 0.75, "scenario_goal_completion": 0.5}
    trainer = stand_in(tmp_path, [episodes[:3], episodes[3:]])
    trainer.loggers = [SimpleNamespace(log_metrics=lambda metrics, step: logged.update(metrics))]
    callback = Panel(before=False)
    callback.on_train_start(trainer, None)
    callback.on_train_end(trainer, None)
    assert logged == {f"panel/{k}": v for k, v in want.items()}
    line = capsys.readouterr().out.splitlines()[-1] + "\n"  # after how many episodes there are, as a log file shows no bar
    assert line == "panel after: " + ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in want.items()) + "\n"
    logged.clear()
    trainer.state, trainer.ckpt_path = SimpleNamespace(fn="validate"), None
    settings = {
        "env_id": "e",
        "env_kwargs": {"size": 6},
        "tasks_file": None,
        "train_split": "train",
        "panel_split": "test",
        "panel_seeds": [0],
    }
    vars(trainer.datamodule).update(settings, panel_temperature=0.0, panel_adapter="student")
    callback.on_validation_start(trainer, None)
    for i, batch in enumerate((episodes[:3], episodes[3:])):
        callback.on_validation_batch_end(trainer, None, None, batch, i)
    callback.on_validation_epoch_end(trainer, SimpleNamespace(log=lambda k, v, **_: logged.update({k: v})))
    assert logged == {f"panel/{k}": v for k, v in want.items()} | {"panel/pass@1": 0.75}
    result = summarise(episodes, scenarios_of(episodes)) | {"device": "cpu"}
    (record,) = read_validations(tmp_path)
    assert read_panel(tmp_path) == {"after": result} and result.items() <= record.items()
    assert (record["checkpoint"], record["step"], record["settings"]["env_kwargs"]) == (None, 0, {"size": 6})


def test_a_validation_is_one_more_record(tmp_path):
    """It changes neither the run's own results nor an earlier validation; the panel may be another one, and there may be no run."""
    before, after = summarise(panel(0.0, 0.5)), summarise(panel(1.0, 0.5))
    write_panel(tmp_path, {"before": before})
    write_panel(tmp_path, {"after": after})
    stood = (tmp_path / "panel.json").read_bytes()
    records = [{"checkpoint": "a.ckpt", "step": 3} | after, {"checkpoint": None, "step": 0} | summarise(panel(1.0, 0.0, 0.0))]
    for record in records:
        add_validation(tmp_path, record)
    assert read_validations(tmp_path) == records and (tmp_path / "panel.json").read_bytes() == stood
    assert list(read_results(tmp_path)) == ["before", "after", "difference", "validations"]
    damaged = tmp_path / "validations.jsonl"
    damaged.write_text(damaged.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"validations\.jsonl is damaged"):
        add_validation(tmp_path, records[0])
    add_validation(tmp_path / "none", records[0])
    assert read_results(tmp_path / "none") == {"validations": records[:1]}


def at(folder: Path, step: int, episodes: list[Trajectory], total: int = 9, stop: bool = False) -> Any:
    trainer = stand_in(folder, [episodes], step)
    trainer.estimated_stepping_batches, trainer.should_stop = total, stop
    return trainer


def test_a_learning_curve(tmp_path, capsys):
    """Every so many iterations, but not where the last panel is played anyway; it takes nothing away from before and after."""
    callback = Panel(every=3)
    callback.on_train_start(stand_in(tmp_path, [panel(0.0, 0.0)]), None)
    for step in range(1, 10):
        callback.on_train_batch_start(at(tmp_path, step - 1, []), None, None, 0)
        callback.on_train_batch_end(at(tmp_path, step, panel(1.0 if step > 3 else 0.5, 0.0)), None, None, None, 0)
    during = {"3": {"n": 2, "success": 0.0, "completion": 0.25}, "6": {"n": 2, "success": 0.5, "completion": 0.5}}
    assert read_panel(tmp_path)["during"] == during and list(read_panel(tmp_path)) == ["before", "during"]
    assert callback.result == read_panel(tmp_path)["before"]  # the curve is nobody's last result
    callback.on_train_end(at(tmp_path, 9, panel(1.0, 1.0)), None)
    assert list(read_panel(tmp_path)) == ["before", "during", "after", "difference"] and read_panel(tmp_path)["during"] == during
    lines = [line for line in capsys.readouterr().out.splitlines() if "success" in line]
    assert [line.partition(":")[0] for line in lines] == [
        "panel before", "panel after 3 iterations", "panel after 6 iterations", "panel after"
    ]  # fmt: skip

    # A run that goes on from an earlier checkpoint plays some of it again, with the same result.
    stood = read_panel(tmp_path)
    again = Panel(every=3)
    again.on_train_start(at(tmp_path, 4, panel(0.0, 0.0)), None)
    for step in range(5, 10):
        again.on_train_batch_start(at(tmp_path, step - 1, []), None, None, 0)
        again.on_train_batch_end(at(tmp_path, step, panel(1.0, 0.0)), None, None, None, 0)
    assert read_panel(tmp_path) == {k: stood[k] for k in ("before", "during")}
    again.on_train_end(at(tmp_path, 9, panel(1.0, 1.0)), None)
    assert json.dumps(read_panel(tmp_path)) == json.dumps(stood)


def test_no_entry_where_a_run_ends(tmp_path):
    for callback, trainer in (
        (Panel(every=3), at(tmp_path, 9, panel(1.0))),
        (Panel(every=3), at(tmp_path, 3, panel(1.0), stop=True)),  # another callback has ended it
        (Panel(every=3), at(tmp_path, 4, panel(1.0))),
        (Panel(), at(tmp_path, 3, panel(1.0))),
    ):
        callback.on_train_batch_end(trainer, None, None, None, 0)
    assert read_panel(tmp_path) == {}
    Panel(every=1).on_train_batch_end(at(tmp_path, 8, scored({"a": "11", "b": "10"})), None, None, None, 0)
    shares = {"success": 0.75, "completion": 0.75, "task_goal_completion": 0.75, "scenario_goal_completion": 0.5}
    assert read_panel(tmp_path) == {"during": {"8": {"n": 4, **shares}}}
    with pytest.raises(ConfigError, match=r"panel\.every is -1"):
        Panel(every=-1)


def test_a_panel_that_is_switched_off_plays_nothing(tmp_path):
    callback = Panel(before=False, after=False)
    callback.on_train_start(stand_in(tmp_path, [panel(1.0)]), None)
    callback.on_train_end(stand_in(tmp_path, [panel(1.0)]), None)
    assert read_panel(tmp_path) == {} and callback.result == {}
