"""Intervals for shares and for paired differences; tests over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, inf, isnan, nan, sqrt
from typing import Any

import numpy as np
import scipy  # its stats are loaded at first use

Z95 = 1.959963984540054
TIE = 1e-9
"""Numbers this close, relative to the largest, are equal but for rounding."""
EXACT_FLIPS = 20
"""Most differences whose sign flips are all counted."""


def wilson_interval(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), 95% by default. n = 0 gives (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre, spread = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n the bounds are exactly 0 and 1; rounding would leave them a hair inside.
    low = 0.0 if successes == 0 else (centre - spread) / (1 + z * z / n)
    high = 1.0 if successes == n else (centre + spread) / (1 + z * z / n)
    return low, high


def bootstrap_mean(
    values: Sequence[float], seed: int = 0, draws: int = 10_000, level: float = 0.95, bounds: tuple[float, float] | None = None
) -> tuple[float, float, float]:
    """Mean of `values` and its percentile bootstrap interval over the items.

    Items that are all equal have only resamples that are equal too, and an interval of no width would claim that no other item exists.
    With `bounds` it is as wide as if the share of other items that Wilson's interval still allows were all at a bound.

    Args:
        values: One number an item (a level's paired difference, say), at least one.
        seed: Seed of the resampling.
        draws: Number of resamples.
        level: Coverage.
        bounds: What a single item can be at least and at most: 0 and 1 for a share.

    Returns:
        mean, low, high.
    """
    x = np.asarray(values, dtype=np.float64)
    if bounds is not None and np.ptp(x) == 0:
        value, others = float(x[0]), wilson_interval(0, len(x), float(scipy.special.ndtri((1 + level) / 2)))[1]
        return value, value + others * (bounds[0] - value), value + others * (bounds[1] - value)
    rng = np.random.default_rng(seed)
    means = np.concatenate([x[rng.integers(0, len(x), (100, len(x)))].mean(1) for _ in range(max(1, draws // 100))])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(x.mean()), float(low), float(high)


# -- over seeds: the unit is the seed; an interval over levels describes one run only ------------------------------------------


def paired_difference(before: Mapping[str, Any], after: Mapping[str, Any], key: str = "success") -> tuple[float, float, float]:
    """Mean of after - before over the same episodes, with its 95% bootstrap interval over tasks.

    Args:
        before: A panel's result: `levels`, each with task_id, member, seed and `key`.
        after: Another of the same panel.
        key: `success` or `completion`.

    Raises:
        ValueError: the two were not played on the same tasks.
    """
    names = [[(x["task_id"], x["member"], x["seed"]) for x in result["levels"]] for result in (before, after)]
    if names[0] != names[1]:
        raise ValueError("before and after were played on different panels: start a new run folder.")
    by_task: dict[str, list[float]] = {}
    for b, a in zip(before["levels"], after["levels"], strict=True):
        by_task.setdefault(b["task_id"], []).append(float(a[key]) - float(b[key]))
    return bootstrap_mean([sum(v) / len(v) for v in by_task.values()], bounds=(-1.0, 1.0))


def t_interval(values: Sequence[float], level: float = 0.95, bounds: tuple[float, float] = (-inf, inf)) -> tuple[float, float, float]:
    """Mean over seeds and its t interval.

    Args:
        values: One number a seed.
        level: Coverage.
        bounds: What the true mean can be at least and at most: 0 and 1 for a share. The interval ends there. It covers the true mean as
            often as before, since what is cut off holds no possible one.

    Returns:
        mean, low, high; one seed has no interval (NaN), none has no mean either.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return (float(x[0]) if len(x) else nan), nan, nan
    half = scipy.stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / sqrt(len(x))
    return float(x.mean()), max(float(x.mean() - half), bounds[0]), min(float(x.mean() + half), bounds[1])


def paired_t(
    a: Sequence[float], b: Sequence[float], level: float = 0.95, bounds: tuple[float, float] = (-inf, inf)
) -> tuple[float, float, float, float]:
    """Student's t for a - b, paired over seeds.

    Where all differences are equal (to rounding) their t is infinite or undefined: scipy gives p = 0, or NaN if they are 0. A spread of 0
    is then an accident of few seeds and coarse shares, so p is `sign_flip`'s, which needs no spread: 2 / 2^n, or 1 if they are 0.

    Args:
        a: One number a seed.
        b: The same seeds' other number.
        level: Coverage of the interval.
        bounds: What the true mean difference can be at least and at most, as for `t_interval`: -1 and 1 for shares.

    Returns:
        mean of a - b, low, high, two-sided p; with one seed all but the mean are NaN.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    scale = max(np.abs(a).max(initial=0), np.abs(b).max(initial=0))
    mean, low, high = t_interval(d.tolist(), level, bounds)
    if len(d) < 2:
        return mean, low, high, nan
    if np.ptp(d) <= TIE * scale:
        return mean, low, high, sign_flip(np.where(np.abs(d) <= TIE * scale, 0.0, d).tolist())
    d = np.ldexp(d, -np.frexp(np.abs(d).max())[1])  # squares of very small differences would be 0
    return mean, low, high, float(scipy.stats.ttest_1samp(d, 0.0).pvalue)


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the mean difference among all sign flips of the differences (Fisher 1935): no shape is assumed but symmetry.

    Exact up to EXACT_FLIPS differences: the share of the 2^n flips whose mean is at least as far from 0, so never below 2 / 2^n. Beyond,
    scipy's permutation_test draws 99,999 flips from a generator with a fixed seed.

    Args:
        differences: One number a seed.

    Returns:
        p; NaN with fewer than two seeds.
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2:
        return nan
    if len(d) > EXACT_FLIPS:
        flips = scipy.stats.permutation_test(
            (d,), np.mean, permutation_type="samples", n_resamples=99_999, batch=1000, rng=np.random.default_rng(0)
        )
        return float(flips.pvalue)
    sums = d[:1]  # the first sign stays: the other half mirrors this one
    for x in d[1:]:
        sums = np.concatenate([sums + x, sums - x])
    return float(np.mean(np.abs(sums) >= np.abs(d.sum()) - TIE * np.abs(d).sum()))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979) for a family of tests.

    Args:
        p: Their p-values; NaN is a test that was not made: it stays NaN and does not count.

    Returns:
        Adjusted p-values in the same order, at most 1.
    """
    x = np.asarray(p, dtype=np.float64)
    order = np.argsort(x)[: int(np.sum(~np.isnan(x)))]  # NaN sorts last
    adjusted = np.full_like(x, nan)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(x[order] * np.arange(len(order), 0, -1)))
    return [float(v) for v in adjusted]


def power_n(effect: float, sd: float, power: float = 0.9, alpha: float = 0.05) -> float:
    """Seeds that a two-sided paired t test needs (noncentral t).

    Args:
        effect: True mean of the paired differences.
        sd: Their standard deviation.
        power: Wanted chance of p <= alpha.
        alpha: Level of the test.

    Returns:
        The smallest number of seeds, at least 2; infinite for an effect of 0, NaN where effect or sd is not known.
    """
    if isnan(effect) or isnan(sd):
        return nan
    if effect == 0:
        return inf
    if sd == 0:
        return 2
    size = abs(effect) / sd

    def reached(n: int) -> float:  # scipy's noncentral t is nan at some arguments, so over the quantiles of the sample's spread
        shift, critical = size * sqrt(n), scipy.stats.t.isf(alpha / 2, n - 1)

        def given(quantile: float) -> float:
            bound = critical * sqrt(2 * scipy.special.gammaincinv((n - 1) / 2, quantile) / (n - 1))
            return float(scipy.special.ndtr(shift - bound) + scipy.special.ndtr(-shift - bound))

        return float(scipy.integrate.quad(given, 0, 1, epsabs=1e-10)[0])

    n = ((scipy.stats.norm.isf(alpha / 2) + scipy.stats.norm.ppf(power)) / size) ** 2  # of a z test: always fewer
    if n > 1e5:  # the t test needs two or three more
        return ceil(n)
    n = max(2, int(n) - 1)
    while reached(n) < power:
        n += 1
    return n
