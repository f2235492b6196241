"""The report's tables, as text."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from pathlib import Path

import pandas as pd

from skillsd.analysis.render import Table
from skillsd.statistics import t_interval
from skillsd.study.comparison import Comparison, after, compare
from skillsd.study.plots import PART_NAMES
from skillsd.study.results import HEALTH, PARTS
from skillsd.study.settings import BASE, StudySettings
from skillsd.study.verdict import p_value, points


def share(mean: float, low: float, high: float) -> str:
    """61.3 [60.1, 62.5], percent."""
    return f"{number(100 * mean, '.1f')} [{number(100 * low, '.1f')}, {number(100 * high, '.1f')}]"


def number(x: float, form: str) -> str:
    return "n/a" if isnan(x) else format(x, form)


def digits(x: float) -> str:
    """Three of them."""
    return number(x, ",.0f" if abs(x) >= 100 else "#.3g")


def outcome(results: pd.DataFrame, study: StudySettings, made: Sequence[Comparison]) -> Table:
    """The untrained agent and every method: the panel after training, and the difference to the baseline."""
    by_name = {c.method: c for c in made} | {BASE: compare(results, BASE, study.baseline, study.metric)}
    rows = []
    for name in (BASE, *study.methods):
        values, c = after(results, name, study.metric), by_name.get(name)
        tests = (points(c.mean, c.low, c.high), p_value(c.p_t), p_value(c.p_flip), p_value(c.p_holm)) if c else ("", "", "", "")
        tests = (*tests[:3], "") if name == BASE else tests
        steps = 0.0 if name == BASE else results.loc[results["method"] == name, "env_steps"].mean()
        rows.append((name, str(len(values)), share(*t_interval(values.tolist(), bounds=(0.0, 1.0))), *tests, number(steps, ",.0f")))
    minus = f"- {study.baseline}, points"
    return Table(("method", "seeds", f"{study.metric} after, %", minus, "paired t, p", "sign flip, p", "Holm, p", "env. steps"), rows)


def controls(made: Sequence[Comparison]) -> Table:
    """Every controlled method - its control."""
    rows = [
        (c.method, c.other, str(c.n), points(c.mean, c.low, c.high), p_value(c.p_t), p_value(c.p_flip), p_value(c.p_holm)) for c in made
    ]
    return Table(("method", "control", "seeds", "method - control, points", "paired t, p", "sign flip, p", "Holm, p"), rows, 2)


def costs(results: pd.DataFrame, study: StudySettings) -> pd.DataFrame:
    """Per iteration, mean over seeds: seconds by part and together, tokens. Index: the methods that have results, in the study's order."""
    columns = [*PARTS, "rollout_tokens", "learner_tokens"]
    per = results[columns].astype(float).div(results["iterations"], axis=0)
    per.insert(len(PARTS), "total_s", per[list(PARTS)].sum(axis=1, min_count=1))
    per["wall_s"] = results["wall_s"].astype(float)
    means = per.groupby(results["method"]).mean()
    return means.loc[[m for m in study.methods if m in means.index]]


def cost(table: pd.DataFrame, study: StudySettings) -> Table:
    """`costs` as text, with ratios to the baseline."""
    rows = []
    for name, c in table.iterrows():
        base = table.loc[study.baseline] if study.baseline in table.index else c * float("nan")
        tokens = c["rollout_tokens"] + c["learner_tokens"]
        ratios = (c["total_s"] / base["total_s"], tokens / (base["rollout_tokens"] + base["learner_tokens"]))
        parts = [digits(c[p]) for p in (*PARTS, "total_s")]
        counts = [number(c[t], ",.0f") for t in ("rollout_tokens", "learner_tokens")]
        rows.append((str(name), *parts, number(ratios[0], ".2f"), *counts, number(ratios[1], ".2f"), number(c["wall_s"] / 60, ".1f")))
    header = ("method", *(f"{PART_NAMES[p]}, s" for p in PARTS), "together, s", f"/ {study.baseline}")
    return Table((*header, "rollout tokens", "learner tokens", f"/ {study.baseline}", "a run, min"), rows)


def health(results: pd.DataFrame, study: StudySettings) -> Table:
    """The end of training, mean over seeds."""
    columns = [*HEALTH, "grad_ratio"]
    means = results.groupby("method")[columns].mean()
    rows = [(m, *(digits(means.loc[m, c]) for c in columns)) for m in study.methods if m in means.index]
    return Table(("method", "entropy", "gap, mean", "gap, sd", "teacher health", "gradient: distillation / policy"), rows)


def methods(study: StudySettings) -> Table:
    """What each method is made of."""
    rows = [(m, _names(v), study.controls.get(m, "")) for m, v in study.methods.items()]
    return Table(("method", "overlays", "control of"), rows, 3)


def settings(study: StudySettings) -> Table:
    """What all cells have in common."""
    rows = [("configs", _names(study.configs)), ("overlays, after the method's", _names(study.overlays)), *study.flags().items()]
    return Table(("every cell", ""), rows, 2)


def _names(files: Sequence[str]) -> str:
    return ", ".join(Path(name).name if Path(name).is_absolute() else name for name in files) or "none"
