"""report.md and report.html: the same blocks, written twice. Everything in them is computed."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd

from skillsd.study import plots, tables
from skillsd.study.cells import Cell, replace
from skillsd.study.comparison import against_baseline, against_controls
from skillsd.study.results import WINDOW, Finished
from skillsd.study.results import tables as as_tables
from skillsd.study.settings import StudySettings
from skillsd.study.tables import Table
from skillsd.study.verdict import verdict

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}th{border-bottom:2px solid #888}
.name{text-align:left}img{max-width:100%}.wide{overflow-x:auto}"""


@dataclass(frozen=True)
class Heading:
    """A title of the report (level 1) or of a part (level 2)."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: Its file in the study folder.
        alt: What it shows.
        png: The file's content.
    """

    name: str
    alt: str
    png: bytes


Block = Heading | Picture | Table | list[str] | str
"""A list is one of bullets; a str is a paragraph."""


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
        f"{len(study.methods)} methods x {len(study.seeds)} seeds ({seeds}); how they are made stands at the end.",
        f"The panel: {', '.join(map(str, n))} held-out episodes a run, played before and after training.",
        "Environment steps of a run: " + ("not measured" if steps.isna().all() else f"{steps.min():,.0f} to {steps.max():,.0f}") + ".",
        f"skillsd {', '.join(versions)}, " + (f"commit {', '.join(commits)}." if commits else "commit unknown."),
        f"Ran on: {', '.join(sorted({d or 'unknown' for d in results['device']}))}.",
        "Missing cells: " + ("; ".join(f"{state}: {', '.join(v)}" for state, v in missing.items()) or "none") + ".",
        "The unit is the seed: means, intervals (95%, Student's t) and tests are over seeds, pairs are of the same seed.",
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
        f"base is the untrained agent. Holm's p is the paired t's, adjusted for {len(methods)} comparisons with {study.baseline}.",
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


def markdown(report: Sequence[Block]) -> str:
    parts = []
    for b in report:
        match b:
            case Heading():
                parts.append(f"{'#' * b.level} {b.text}")
            case Picture():
                parts.append(f"![{b.alt}]({b.name})")
            case Table():
                rule = ["---"] * b.names + ["---:"] * (len(b.header) - b.names)
                parts.append(
                    "\n".join(f"| {' | '.join(x.replace('|', chr(92) + '|') for x in row)} |" for row in (b.header, rule, *b.rows))
                )
            case list():
                parts.append("\n".join(f"- {x}" for x in b))
            case _:
                parts.append(b)
    return "\n\n".join(parts) + "\n"


def html(report: Sequence[Block]) -> str:
    """One file that needs no other: pictures are inside."""
    parts = []
    for b in report:
        match b:
            case Heading():
                parts.append(f"<h{b.level}>{escape(b.text)}</h{b.level}>")
            case Picture():
                parts.append(f'<p><img alt="{escape(b.alt)}" src="data:image/png;base64,{base64.b64encode(b.png).decode()}"></p>')
            case Table():
                rows = [_row(b.header, "th", b.names), *(_row(r, "td", b.names) for r in b.rows)]
                parts.append('<div class="wide"><table>\n' + "\n".join(rows) + "\n</table></div>")
            case list():
                parts.append("<ul>\n" + "\n".join(f"<li>{escape(x)}</li>" for x in b) + "\n</ul>")
            case _:
                parts.append(f"<p>{escape(b)}</p>")
    title = escape(next(b.text for b in report if isinstance(b, Heading)))
    return f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>\n' + (
        "\n".join(parts) + "\n</body></html>\n"
    )


def _row(cells: Sequence[str], tag: str, names: int) -> str:
    return "<tr>" + "".join(f"<{tag}{' class=name' if i < names else ''}>{escape(c)}</{tag}>" for i, c in enumerate(cells)) + "</tr>"


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
