"""Intervals against published values and brute force."""

import itertools
from math import sqrt

import numpy as np
import pytest

from skillsd.statistics import bootstrap_mean, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (50, 100, 0.4038, 0.5962),
        (20, 20, 0.8389, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_against_known_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_the_inverted_score_test():
    """Its ends are the shares p0 at which |p - p0| = z sqrt(p0 (1 - p0) / n)."""
    for successes, n in itertools.product(range(1, 12), (12, 40)):
        p = successes / n
        for end in wilson_interval(successes, n):
            assert abs(p - end) == pytest.approx(1.959963984540054 * sqrt(end * (1 - end) / n))
        low, high = wilson_interval(successes, n)
        assert (1 - high, 1 - low) == pytest.approx(wilson_interval(n - successes, n))
        assert wilson_interval(successes, n, z=1.0)[0] > low


def test_bootstrap_is_deterministic():
    x = [0.0, 1.0, 1.0, -1.0, 0.0, 1.0, 0.5]
    assert bootstrap_mean(x) == bootstrap_mean(x) != bootstrap_mean(x, seed=1)
    assert all(type(v) is float for v in bootstrap_mean(x))


def test_bootstrap_is_sane():
    assert bootstrap_mean([0.25] * 9) == (0.25, 0.25, 0.25)
    assert bootstrap_mean([3.0]) == (3.0, 3.0, 3.0)
    x = np.random.default_rng(3).normal(2.0, 1.0, 400)
    mean, low, high = bootstrap_mean(x)
    assert mean == pytest.approx(x.mean()) and low < mean < high
    assert (mean - low, high - mean) == pytest.approx([1.96 * x.std() / 20] * 2, rel=0.06)  # the central limit theorem's
    _, low50, high50 = bootstrap_mean(x, level=0.5)
    assert low < low50 < mean < high50 < high


def test_bootstrap_against_all_resamples():
    x = [0.0, 0.0, 1.0, 3.0]
    means = [sum(draw) / 4 for draw in itertools.product(x, repeat=4)]
    low, high = np.quantile(means, [0.1, 0.9])
    assert bootstrap_mean(x, level=0.8)[1:] == pytest.approx((low, high), abs=0.26)  # a grid of quarters
