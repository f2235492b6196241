"""Intervals hold their estimate, are ordered, and move with what they are of."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.profile import examples

from skillsd.statistics import bootstrap_mean, holm, paired_t, power_n, sign_flip, t_interval, wilson_interval

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=10)
P = st.floats(0, 1)


@examples(200)
@given(st.integers(0, 5000), st.integers(1, 5000), st.floats(0.1, 5))
def test_a_wilson_interval_holds_its_share_and_widens(successes, n, z):
    successes = min(successes, n)
    low, high = wilson_interval(successes, n, z)
    assert 0 <= low <= successes / n <= high <= 1 and low < high
    if successes < n:  # one success more moves both ends up, and a wider level lies around
        more = wilson_interval(successes + 1, n, z)
        assert (more[0] > low and more[1] > high) or math.isclose(more[1], high)
    wide = wilson_interval(successes, n, 2 * z)
    assert wide[0] <= low and high <= wide[1]
    mirrored = wilson_interval(n - successes, n, z)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@examples(60)
@given(VALUES, st.integers(0, 5), st.floats(0.5, 0.9))
def test_a_bootstrap_interval_is_ordered_and_repeatable(values, seed, level):
    mean, low, high = bootstrap_mean(values, seed, 500, level)
    close = 1e-9 * max(map(abs, values), default=0) + 1e-12
    assert min(values) - close <= low <= high <= max(values) + close
    assert mean == pytest.approx(math.fsum(values) / len(values), abs=close)
    assert bootstrap_mean(values, seed, 500, level) == (mean, low, high)
    wide = bootstrap_mean(values, seed, 500, 0.99)
    assert wide[1] <= low and high <= wide[2]


@examples(100)
@given(VALUES, st.floats(0.5, 0.9), st.floats(-10, 10))
def test_t_interval(values, level, shift):
    mean, low, high = t_interval(values, level)
    assert low <= mean <= high
    _, lower, higher = t_interval(values, 0.99)
    assert lower <= low and high <= higher
    moved = t_interval([v + shift for v in values], level)
    scale = max(map(abs, values)) + 10
    assert moved == pytest.approx((mean + shift, low + shift, high + shift), abs=1e-8 * scale)


@examples(100)
@given(VALUES, st.floats(0.1, 10))
def test_paired(values, scale):
    """A difference of nothing is 1; order of the two changes signs alone; and p does not depend on the unit."""
    zeros = [0.0] * len(values)
    mean, low, high, p = paired_t(values, zeros)
    assert 0 <= p <= 1 and low <= mean <= high
    assert paired_t(values, values)[0] == 0 and paired_t(values, values)[3] == 1
    back = paired_t(zeros, values)
    assert back[0] == -mean and back[3] == pytest.approx(p)
    assert sign_flip(values) == pytest.approx(sign_flip([-v for v in values]))
    assert sign_flip([v * 2 for v in values]) == sign_flip(values)  # exact in floats
    flips = sign_flip(values)
    assert 2 / 2 ** len(values) <= flips <= 1 and math.isclose(flips * 2 ** len(values), round(flips * 2 ** len(values)))


@examples(150)
@given(st.lists(P | st.just(math.nan), max_size=8))
def test_holm(p):
    adjusted = holm(p)
    tested = [(x, y) for x, y in zip(p, adjusted, strict=True) if not math.isnan(x)]
    assert [math.isnan(x) for x in p] == [math.isnan(y) for y in adjusted]
    assert all(x <= y <= 1 and y <= min(1.0, len(tested) * x) for x, y in tested)
    ordered = [y for _, y in sorted(tested)]
    assert ordered == sorted(ordered)


@examples(40)
@given(st.floats(0.2, 5), st.floats(0.2, 2), st.floats(0.3, 0.95))
def test_more_power_or_a_smaller_effect_needs_more_seeds(effect, sd, power):
    n = power_n(effect, sd, power)
    assert n >= 2 and n == power_n(-effect, sd, power)
    assert power_n(effect * 1.5, sd, power) <= n <= power_n(effect, sd * 1.5, power)
    assert power_n(effect, sd, power + 0.04) >= n
