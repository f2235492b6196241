"""report.md and report.html: the same blocks, written twice. Everything in them is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from skillsd.analysis.document import Block, Heading, Picture, html, markdown
from skillsd.study import plots, tables
from skillsd.study.cells import Cell, replace
from skillsd.study.comparison import against_baseline, against_controls
from skillsd.study.results import WINDOW, Finished
from skillsd.study.results import tables as as_tables
from skillsd.study.settings import StudySettings
from skillsd.study.verdict import verdict
from skillsd.words import count


def facts(results: pd.DataFrame, study: StudySettings, cells: Sequence[Cell], finished: Mapping[Cell, Finished]) -> list[str]:
    """What was run, and what a reader must know before believing a number."""
    n, steps = sorted(set(results["panel_n"])), results["env_steps"]
    records = {c: c.record() for c in cells}
    commits = sorted({x for c in finished for x in records[c].get("commits", [])})
    versions = sorted({records[c].get("version", "unknown") for c in finished})
    missing: dict[str, list[str]] = {}
    for c in (c for c in cells if c not in finished):
        missing.setdefault(records[c].get("state", "not started"), []).append(f"{c.method} {c.seed}")
    seeds = ", ".join(map(str, study.seeds))
    told = [
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
        told.append("WARNING: not all cells were played on the same panel: differences between methods are not only the methods'.")
    if (results.groupby("seed")[f"before_{study.metric}"].agg(lambda s: s.max() - s.min()) > 0).any():
        told.append("WARNING: before training, not all methods scored the same: other agents, or rounding on a GPU; base is their mean.")
    if len(commits) > 1:
        told.append("WARNING: cells were made by different commits.")
    return told


def blocks(study: StudySettings, cells: Sequence[Cell], finished: Mapping[Cell, Finished]) -> list[Block]:
    """The report."""
    results, curves = as_tables(finished[c] for c in cells if c in finished)
    methods, controls = against_baseline(results, study), against_controls(results, study)
    costs = tables.costs(results, study)
    metric, pictures = (
        study.metric,
        [
            (f"curves-{x}.png", f"{study.metric} against {label}", plots.learning_curves(curves, study, x))
            for x, label in plots.AXES.items()
        ],
    )
    pictures.append(("seeds.png", "every seed", plots.by_seed(curves, study)))
    out: list[Block] = [
        Heading(f"Study: {', '.join(study.methods)}" if len(study.methods) < 4 else f"Study of {len(study.methods)} methods", 1),
        facts(results, study, cells, finished),
        Heading("Verdict"),
        verdict(methods, controls),
        Heading(f"{metric.capitalize()} after training"),
        tables.outcome(results, study, methods),
        f"base is the untrained agent. Holm's p is the paired t's, adjusted for {count(len(methods), 'comparison')} with {study.baseline}.",
    ]
    if any(c.n for c in methods):
        out.append(Picture("differences.png", f"differences to {study.baseline}", plots.forest(methods, study)))
    if controls:
        out += [Heading("Methods and their controls"), tables.controls(controls)]
    out += [Heading("Learning curves"), *(Picture(name, alt, png) for name, alt, png in pictures if png)]
    note = "Seconds are those of the machine that ran a cell, with whatever else it was doing; tokens are not."
    out += [Heading("Cost per iteration"), tables.cost(costs, study), note]
    if bars := plots.seconds(costs):
        out.append(Picture("seconds.png", "seconds per iteration", bars))
    out += [
        Heading("Health"),
        tables.health(results, study),
        f"Means of the last {WINDOW} iterations; the ratio of gradient norms is over the whole run. n/a: not measured.",
        Heading("What was run"),
        tables.methods(study),
        tables.settings(study),
    ]
    return out


def write_report(study: StudySettings, cells: Sequence[Cell], finished: Mapping[Cell, Finished]) -> None:
    """Write report.md, report.html and the figures to the study folder, and say where they are.

    Args:
        study: The settings.
        cells: All cells, in the study's order.
        finished: What the finished ones gave; at least one.
    """
    folder, made = Path(study.folder), blocks(study, cells, finished)
    for b in made:
        if isinstance(b, Picture):
            replace(folder / b.name, b.png)
    replace(folder / "report.md", markdown(made))
    replace(folder / "report.html", html(made))
    print(f"report: {folder / 'report.html'}, {folder / 'report.md'}")
