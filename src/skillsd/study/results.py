"""Run folders as tables: a row a cell (results.csv) and a row an iteration (curves.csv)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from skillsd.analysis.metrics import read_metrics as read_table
from skillsd.errors import ConfigError
from skillsd.files.durable import write
from skillsd.files.run_folder import METRICS_FILE, check_format, read_panel
from skillsd.study.cells import Cell

WINDOW = 10
"""Iterations at a run's end over which its health is averaged."""
PARTS = ("rollout_s", "teacher_s", "update_s", "summary_s")
"""What an iteration's seconds are spent on: playing, scoring, updating, summarising. The panel is not among them."""
REQUIRED = ("iteration", "reward/success", "reward/completion")
OPTIONAL = {
    "env_steps": "rollout/env_steps",
    "rollout_tokens": "rollout/tokens",
    "learner_tokens": "learner/tokens",
    **{part: f"time/{part}" for part in PARTS},
}
"""Column of results.csv -> column of metrics.csv; a run of an older version lacks them: NaN."""
HEALTH = {"entropy": "policy/entropy", "gap_mean": "teacher/gap_mean", "gap_std": "teacher/gap_std", "teacher_health": "teacher/health"}
GRADIENTS = ("grad_norm/distillation", "grad_norm/policy")


class CellResult(NamedTuple):
    """What a finished cell gave.

    Attributes:
        row: Its line of results.csv.
        curve: Its lines of curves.csv.
    """

    row: dict[str, Any]
    curve: pd.DataFrame


def read_metrics(folder: Path) -> pd.DataFrame:
    """metrics.csv with every column that a study reads; what was not measured is NaN.

    Raises:
        ConfigError: there is none, a column that every version wrote is missing, the iterations are not 0, 1, 2, ..., or a value is no
            number.
    """
    path = folder / METRICS_FILE
    fix = f"delete the folder {folder}, and the cell is run again."
    try:
        metrics = read_table(path)
    except ConfigError as e:
        raise ConfigError(f"folder: {e}: {fix}") from e
    if lacking := [c for c in REQUIRED if c not in metrics]:
        raise ConfigError(f"folder: {path} has no column {', '.join(lacking)}: {fix}")
    return metrics.reindex(columns=[*REQUIRED, *OPTIONAL.values(), *HEALTH.values(), *GRADIENTS, "teacher/k3"])


def read_cell(cell: Cell) -> CellResult:
    """Read a finished cell's run folder.

    Raises:
        ConfigError: its files are damaged, or of another format.
    """
    check_format(cell.folder)
    metrics, panel = read_metrics(cell.folder), read_panel(cell.folder)
    before, after = panel.get("before", {}), panel["after"]
    norms = metrics[list(GRADIENTS)].dropna()
    norms = norms[norms[GRADIENTS[0]] > 0]
    row = {
        "method": cell.method,
        "seed": cell.seed,
        "before_success": before.get("success", nan),
        "after_success": after["success"],
        "before_completion": before.get("completion", nan),
        "after_completion": after["completion"],
        **{name: metrics[column].sum(min_count=1) for name, column in OPTIONAL.items()},
        "iterations": len(metrics),
        "wall_s": cell.record().get("wall_s", nan),
        **{name: metrics[column].tail(WINDOW).mean() for name, column in HEALTH.items()},
        "grad_ratio": _ratio(*norms.mean()),  # over the whole run, where a teacher spoke: gradients are measured now and then
        "device": after.get("device", ""),
        "panel_n": after["n"],
        "panel": _digest(after["levels"]),
    }
    return CellResult(row, _curve(cell, metrics, panel))


def _ratio(distillation: float, policy: float) -> float:
    """NaN where there is no policy gradient but for the rounding of a difference."""
    return distillation / policy if policy > 1e-5 * distillation else nan


def _digest(levels: Sequence[dict[str, Any]]) -> str:
    """A panel's fingerprint: which episodes were played."""
    return hashlib.sha256(json.dumps([(x["task_id"], x["member"], x["seed"]) for x in levels]).encode()).hexdigest()[:8]


def _curve(cell: Cell, metrics: pd.DataFrame, panel: dict[str, Any]) -> pd.DataFrame:
    """Line k is the state after k iterations; line 0 is the untrained agent."""
    tokens = [OPTIONAL["rollout_tokens"], OPTIONAL["learner_tokens"]]
    curve = pd.DataFrame({
        "method": cell.method,
        "seed": cell.seed,
        "iteration": metrics["iteration"].astype(int) + 1,
        "env_steps": metrics[OPTIONAL["env_steps"]].cumsum(),
        "tokens": metrics[tokens].sum(axis=1, min_count=1).cumsum(),
        "seconds": metrics[[OPTIONAL[p] for p in PARTS]].sum(axis=1, min_count=1).cumsum(),
        "train_success": metrics["reward/success"],
        "train_completion": metrics["reward/completion"],
    })  # fmt: skip
    start = pd.DataFrame([{"method": cell.method, "seed": cell.seed, "iteration": 0, "env_steps": 0.0, "tokens": 0.0, "seconds": 0.0}])
    curve = pd.concat([start, curve], ignore_index=True)
    played = {int(k): v for k, v in panel.get("during", {}).items()} | {len(metrics): panel["after"]}
    played |= {0: panel["before"]} if "before" in panel else {}
    for key in ("success", "completion"):
        curve[f"panel_{key}"] = curve["iteration"].map({k: v[key] for k, v in played.items()}).astype(float)
    return curve


def tables(finished: Iterable[CellResult]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All rows and all curves, in the order given."""
    found = list(finished)
    return pd.DataFrame([f.row for f in found]), pd.concat([f.curve for f in found], ignore_index=True)


def write_results(folder: Path, finished: Iterable[CellResult]) -> None:
    """Write results.csv and curves.csv, each at once."""
    for name, table in zip(("results.csv", "curves.csv"), tables(finished), strict=True):
        write(folder / name, table.to_csv(index=False, lineterminator="\n"))
