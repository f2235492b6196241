"""Run folders as tables, against the same numbers added up by hand."""

from __future__ import annotations

import csv
import json
from math import isnan, nan
from pathlib import Path

import pytest

from skillsd.errors import ConfigError
from skillsd.files.run_folder import write_record
from skillsd.study.cells import Cell
from skillsd.study.results import WINDOW, read_cell, read_metrics, tables

COLUMNS = """iteration reward/success reward/completion teacher/gap_mean policy/entropy grad_norm/policy grad_norm/distillation
rollout/env_steps rollout/tokens learner/tokens time/rollout_s time/teacher_s time/update_s time/summary_s""".split()


def cell(folder: Path, rows: list[list[float | str]], columns: list[str] = COLUMNS, during: dict | None = None) -> Cell:
    """A finished run folder."""
    folder.mkdir(exist_ok=True)
    write_record(folder)
    lines = [[columns[0], "epoch", *columns[1:]], *([row[0], 0, *row[1:]] for row in rows)]
    with (folder / "metrics.csv").open("w") as f:
        csv.writer(f).writerows(lines)
    result = {"n": 2, "success": 0.5, "completion": 0.75, "levels": [{"task_id": "a", "member": 0, "seed": 0}] * 2}
    panel = {"before": {**result, "success": 0.25}, "after": result, "during": during or {}}
    (folder / "panel.json").write_text(json.dumps(panel))
    made = Cell("m", 3, folder, (), (), {})
    made.write(wall_s=12.5, state="finished")
    return made


def full(n: int) -> list[list[float | str]]:
    return [
        [i, 0.1 * i, 0.2, 0.01 * i, 2.0 - i, 0.5 if i % 10 == 0 else "", 0.1 if i % 10 == 0 else "", 7 + i, 100, 30, 1.5, "", 0.5, 0.25]
        for i in range(n)
    ]


def test_a_row_is_the_run_s_sums_and_means(tmp_path):
    row = read_cell(cell(tmp_path, full(24))).row
    assert (row["method"], row["seed"], row["iterations"], row["wall_s"], row["panel_n"]) == ("m", 3, 24, 12.5, 2)
    assert (row["before_success"], row["after_success"], row["before_completion"], row["after_completion"]) == (0.25, 0.5, 0.75, 0.75)
    assert (row["env_steps"], row["rollout_tokens"], row["learner_tokens"]) == (sum(7 + i for i in range(24)), 2400, 720)
    assert (row["rollout_s"], row["update_s"], row["summary_s"]) == (36.0, 12.0, 6.0) and isnan(row["teacher_s"])
    last = range(24 - WINDOW, 24)
    assert row["entropy"] == pytest.approx(sum(2.0 - i for i in last) / WINDOW)
    assert row["gap_mean"] == pytest.approx(sum(0.01 * i for i in last) / WINDOW) and isnan(row["gap_std"])
    assert row["grad_ratio"] == pytest.approx(0.2)


def test_a_curve_counts_steps_tokens_and_seconds(tmp_path):
    curve = read_cell(cell(tmp_path, full(5), during={"2": {"success": 0.3, "completion": 0.4}})).curve
    assert curve["iteration"].tolist() == [0, 1, 2, 3, 4, 5]
    assert curve["env_steps"].tolist() == [0, 7, 15, 24, 34, 45] and curve["tokens"].tolist() == [0, 130, 260, 390, 520, 650]
    assert curve["seconds"].tolist() == [0, 2.25, 4.5, 6.75, 9.0, 11.25]
    assert isnan(curve["train_success"][0]) and curve["train_success"][1:].tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [None if isnan(x) else x for x in curve["panel_success"]] == [0.25, None, 0.3, None, None, 0.5]
    assert [None if isnan(x) else x for x in curve["panel_completion"]] == [0.75, None, 0.4, None, None, 0.75]


def test_columns_of_an_older_version_may_be_missing(tmp_path):
    found = read_cell(cell(tmp_path, [r[:7] for r in full(4)], COLUMNS[:7]))
    assert all(isnan(found.row[k]) for k in ("env_steps", "rollout_tokens", "learner_tokens", "rollout_s", "summary_s"))
    assert found.row["entropy"] == pytest.approx(0.5) and found.curve["seconds"][1:].isna().all()


BROKEN = {
    "no success": (["iteration", "reward/completion"], [[0, 0.5]], "has no column reward/success"),
    "a hole": (COLUMNS[:3], [[0, 0, 0], [2, 0, 0]], "are not 0, 1, 2"),
    "twice": (COLUMNS[:3], [[0, 0, 0], [0, 0, 0]], "are not 0, 1, 2"),
    "garbage": (COLUMNS[:3], [[0, 0, 0], [1, 0, 0, 1]], "cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_file_is_named_with_its_fix(tmp_path, case):
    columns, rows, message = BROKEN[case]
    made = cell(tmp_path, rows, columns)
    with pytest.raises(ConfigError, match=f"{message}.*delete the folder"):
        read_cell(made)


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.csv cannot be read \(FileNotFoundError\)"):
        read_metrics(tmp_path)


def test_an_unplayed_panel_before_is_not_a_number(tmp_path):
    made = cell(tmp_path, full(2))
    panel = json.loads((tmp_path / "panel.json").read_text())
    del panel["before"]
    (tmp_path / "panel.json").write_text(json.dumps(panel))
    results, curves = tables([read_cell(made)])
    assert isnan(results["before_success"][0]) and isnan(curves["panel_success"][0]) and curves["panel_success"][2] == 0.5 != nan


def test_a_cell_of_an_older_format(tmp_path):
    made = cell(tmp_path, full(2))
    (tmp_path / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"run\.json"):
        read_cell(made)
