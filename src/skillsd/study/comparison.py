"""Methods against the baseline and against their controls, paired by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan

import pandas as pd

from skillsd.statistics import holm, paired_t, power_n, sign_flip
from skillsd.study.settings import BASE, StudySettings


@dataclass(frozen=True)
class Comparison:
    """method - other over the seeds that both have; NaN where there are too few.

    Attributes:
        method: Name.
        other: What it is compared with.
        seeds: The seeds of both.
        differences: One a seed, as shares.
        mean, low, high: Mean of the differences and its 95% t interval over seeds.
        p_t: Paired t test, two-sided.
        p_flip: Exact sign-flip test, two-sided.
        p_holm: p_t adjusted over the family; NaN outside of one.
        needed: Seeds for 90% power, were the differences' mean and spread the true ones.
    """

    method: str
    other: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    p_t: float
    p_flip: float
    needed: float
    p_holm: float = nan

    @property
    def n(self) -> int:
        return len(self.seeds)


def after(results: pd.DataFrame, method: str, metric: str) -> pd.Series:
    """The panel after training, seed -> share; of BASE before training: the mean over methods, which all start from one agent."""
    if method == BASE:
        return results.groupby("seed")[f"before_{metric}"].mean().dropna()
    return results[results["method"] == method].set_index("seed")[f"after_{metric}"].sort_index()


def compare(results: pd.DataFrame, method: str, other: str, metric: str) -> Comparison:
    """Compare two methods on the seeds that both finished."""
    a, b = after(results, method, metric), after(results, other, metric)
    seeds = sorted(set(a.index) & set(b.index))
    a, b = a.loc[seeds], b.loc[seeds]
    mean, low, high, p = paired_t(a.tolist(), b.tolist(), bounds=(-1.0, 1.0))
    d = (a - b).where((a - b).abs() > 1e-12, 0.0)  # rounding is no difference
    needed = power_n(mean, float(d.std(ddof=1)) if len(d) > 1 else nan)
    return Comparison(method, other, tuple(seeds), tuple(d), mean, low, high, p, sign_flip(d.tolist()), needed)


def family(made: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons, their p adjusted for being many."""
    return [replace(c, p_holm=p) for c, p in zip(made, holm([c.p_t for c in made]), strict=True)]


def against_baseline(results: pd.DataFrame, study: StudySettings) -> list[Comparison]:
    """Every method but the baseline, in the study's order; one family."""
    return family([compare(results, m, study.baseline, study.metric) for m in study.methods if m != study.baseline])


def against_controls(results: pd.DataFrame, study: StudySettings) -> list[Comparison]:
    """Every controlled method - its control; a second family."""
    return family([compare(results, method, control, study.metric) for control, method in study.controls.items()])
