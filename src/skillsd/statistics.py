"""Intervals for shares and for paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

Z95 = 1.959963984540054


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


def bootstrap_mean(values: Sequence[float], seed: int = 0, draws: int = 10_000, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of `values` and its percentile bootstrap interval over the items.

    Args:
        values: One number an item (a level's paired difference, say), at least one.
        seed: Of the resampling.
        draws: Number of resamples.
        level: Coverage.

    Returns:
        mean, low, high.
    """
    x = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.concatenate([x[rng.integers(0, len(x), (100, len(x)))].mean(1) for _ in range(max(1, draws // 100))])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(x.mean()), float(low), float(high)
