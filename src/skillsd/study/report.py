"""report.md and report.html of a study, from one template. Every number in them is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from skillsd.analysis.render import Picture, html, markdown
from skillsd.files.durable import write
from skillsd.study import plots, tables
from skillsd.study.cells import Cell
from skillsd.study.comparison import against_baseline, against_controls
from skillsd.study.results import WINDOW, CellResult
from skillsd.study.results import tables as as_tables
from skillsd.study.settings import StudySettings
from skillsd.study.verdict import verdict
from skillsd.words import count


def facts(results: pd.DataFrame, study: StudySettings, cells: Sequence[Cell], finished: Mapping[Cell, CellResult]) -> list[str]:
    """What was run, and what a reader must know before believing a number."""
    n, steps = sorted(set(results["panel_n"])), results["env_steps"]
    records = {c: c.record() for c in cells}
    commits = sorted({x for c in finished for x in records[c].get("commits", [])})
    versions = sorted({records[c].get("version", "unknown") for c in finished})
    missing: dict[str, list[str]] = {}
    for c in (c for c in cells if c not in finished):
        missing.setdefault(records[c].get("state", "not started"), []).append(f"{c.method} {c.seed}")
    seeds = ", ".join(map(str, study.seeds))
    lines = [
        f"{count(len(study.methods), 'method')} x {count(len(study.seeds), 'seed')} ({seeds}); how they are made stands at the end.",
        f"The panel: {', '.join(map(str, n))} held-out episodes a run, played before and after training.",
        "Environment steps of a run: " + ("not measured" if steps.isna().all() else f"{steps.min():,.0f} to {steps.max():,.0f}") + ".",
        f"skillsd {', '.join(versions)}, " + (f"commit {', '.join(commits)}." if commits else "commit unknown."),
        f"Ran on: {', '.join(sorted({d or 'unknown' for d in results['device']}))}.",
        "Missing cells: " + ("; ".join(f"{state}: {', '.join(v)}" for state, v in missing.items()) or "none") + ".",
        "The unit is the seed: means, intervals (95%, Student's t) and tests are over seeds, pairs are of the same seed.",
        "Intervals end where a share does, at 0 and 100%, and a difference at -100 and 100 points: nothing possible is cut off.",
    ]
    if results["panel"].nunique() > 1:
        lines.append("WARNING: not all cells were played on the same panel: differences between methods are not only the methods'.")
    if (results.groupby("seed")[f"before_{study.metric}"].agg(lambda s: s.max() - s.min()) > 0).any():
        lines.append("WARNING: before training, not all methods scored the same: other agents, or rounding on a GPU; base is their mean.")
    if len(commits) > 1:
        lines.append("WARNING: cells were made by different commits.")
    return lines


def contents(study: StudySettings, cells: Sequence[Cell], finished: Mapping[Cell, CellResult]) -> dict[str, Any]:
    """What the template `study.jinja` shows."""
    results, curves = as_tables(finished[c] for c in cells if c in finished)
    methods, controls = against_baseline(results, study), against_controls(results, study)
    costs, metric = tables.costs(results, study), study.metric
    forest = plots.forest(methods, study) if any(c.n for c in methods) else None
    axes = {f"curves-{x}.png": (f"{metric} against {label}", plots.learning_curves(curves, study, x)) for x, label in plots.AXES.items()}
    drawn = [_picture(name, alt, png) for name, (alt, png) in axes.items()]
    drawn.append(_picture("seeds.png", "every seed", plots.by_seed(curves, study)))
    return {
        "title": f"Study: {', '.join(study.methods)}" if len(study.methods) < 4 else f"Study of {len(study.methods)} methods",
        "facts": facts(results, study, cells, finished), "verdict": verdict(methods, controls), "metric": metric,
        "outcome": tables.outcome(results, study, methods), "comparisons": count(len(methods), "comparison"), "baseline": study.baseline,
        "differences": _picture("differences.png", f"differences to {study.baseline}", forest),
        "controls": tables.controls(controls) if controls else None, "curves": [picture for picture in drawn if picture],
        "cost": tables.cost(costs, study), "seconds": _picture("seconds.png", "seconds per iteration", plots.seconds(costs)),
        "health": tables.health(results, study), "window": WINDOW, "methods": tables.methods(study), "settings": tables.settings(study),
    }  # fmt: skip


def _picture(name: str, alt: str, png: bytes | None) -> Picture | None:
    return Picture(name, alt, png) if png else None


def write_report(study: StudySettings, cells: Sequence[Cell], finished: Mapping[Cell, CellResult]) -> None:
    """Write report.md, report.html and the figures to the study folder, and say where they are.

    Args:
        study: The settings.
        cells: All cells, in the study's order.
        finished: What the finished ones gave; at least one.
    """
    folder, made = Path(study.folder), contents(study, cells, finished)
    for picture in filter(None, (made["differences"], *made["curves"], made["seconds"])):
        write(folder / picture.name, picture.png)
    write(folder / "report.md", markdown("study.jinja", **made))
    write(folder / "report.html", html("study.jinja", **made))
    print(f"report: {folder / 'report.html'}, {folder / 'report.md'}")
