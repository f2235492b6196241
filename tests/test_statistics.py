"""Intervals and tests against published values, closed forms and brute force."""

import itertools
from math import atan, inf, isnan, nan, pi, sqrt

import numpy as np
import pytest

from skillsd.statistics import EXACT_FLIPS, bootstrap_mean, holm, paired_t, power_n, sign_flip, t_interval, wilson_interval


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
    for n in (1, 4, 100):  # a share of 1 has Wilson's interval, and no other number is certain either
        assert bootstrap_mean([1.0] * n, bounds=(0.0, 1.0)) == (1.0, pytest.approx(wilson_interval(n, n)[0]), 1.0)
        _, low, high = bootstrap_mean([0.5] * n, bounds=(0.0, 1.0))
        assert 0.5 - low == pytest.approx(high - 0.5) and 0.0 < low < 0.5
    assert bootstrap_mean([0.25, 0.5], bounds=(0.0, 1.0)) == bootstrap_mean([0.25, 0.5])
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


# -- over seeds ---------------------------------------------------------------------------------------------------------------

SLEEP = ([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
"""Extra hours of sleep with two drugs, of ten patients (Student 1908)."""
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
"""Crossed - self-fertilised maize, eighths of an inch, of fifteen pairs (Darwin 1876; Fisher 1935, The Design of Experiments)."""


def test_t_interval_against_known_quantiles():
    """Quantiles of t with 2 and 4 degrees of freedom: 4.302653 and 2.776445."""
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.302653 / sqrt(3), 2 + 4.302653 / sqrt(3)), abs=1e-6)
    x = [0.61, 0.64, 0.6, 0.66, 0.63]
    mean = sum(x) / 5
    half = 2.776445 * sqrt(sum((v - mean) ** 2 for v in x) / 4 / 5)
    assert t_interval(x) == pytest.approx((mean, mean - half, mean + half), abs=1e-7)


def test_an_interval_ends_where_a_mean_can_be():
    """Two seeds of a share near its end: t alone would give -39% to 127%."""
    values = [0.375, 0.505]
    mean, low, high = t_interval(values)
    assert low < 0 < 1 < high and t_interval(values, bounds=(0.0, 1.0)) == (mean, 0.0, 1.0)
    assert t_interval([0.4, 0.5, 0.6], bounds=(0.0, 1.0)) == t_interval([0.4, 0.5, 0.6])
    assert isnan(t_interval([0.5], bounds=(0.0, 1.0))[1])
    free, cut = paired_t([1.0, 0.0], [0.0, 0.5]), paired_t([1.0, 0.0], [0.0, 0.5], bounds=(-1.0, 1.0))
    assert free[1] < -1 and free[2] > 1 and cut == (free[0], -1.0, 1.0, free[3])


def test_paired_t_gives_student_s_own_example():
    assert paired_t(*SLEEP) == pytest.approx((-1.58, -2.4598858, -0.7001142, 0.00283289), abs=1e-7)
    mean, low, high, p = paired_t(*reversed(SLEEP))
    assert (mean, low, high, p) == pytest.approx((1.58, 0.7001142, 2.4598858, 0.00283289), abs=1e-7)


def test_paired_t_in_closed_form():
    """With two pairs t is Cauchy's: p = 1 - 2 atan(t) / pi; with three, p = 1 - t / sqrt(t^2 + 2)."""
    for d in ([0.3, 0.1], [-0.5, 0.2], [0.3, 0.1, 0.4], [-0.2, 0.1, 0.02]):
        n, mean = len(d), sum(d) / len(d)
        t = abs(mean) / sqrt(sum((x - mean) ** 2 for x in d) / (n - 1) / n)
        expected = 1 - 2 * atan(t) / pi if n == 2 else 1 - t / sqrt(t * t + 2)
        assert paired_t([x + 5 for x in d], [5.0] * n)[3] == pytest.approx(expected)


def test_too_few_seeds_and_no_spread():
    one = paired_t([0.7], [0.6])
    assert one[0] == pytest.approx(0.1) and all(map(isnan, one[1:])) and isnan(sign_flip([0.1]))
    assert all(map(isnan, paired_t([], []))) and all(map(isnan, t_interval([]))) and isnan(sign_flip([]))
    assert t_interval([0.5])[0] == 0.5 and isnan(t_interval([0.5])[1])
    assert paired_t([0.6, 0.7, 0.8], [0.6, 0.7, 0.8]) == (0.0, 0.0, 0.0, 1.0)
    mean, low, high, p = paired_t([0.7, 0.8, 0.9], [0.6, 0.7, 0.8])  # 0.1, but for rounding
    assert (mean, low, high, p) == pytest.approx((0.1, 0.1, 0.1, 2 / 2**3))
    rounding = paired_t([0.1 + 0.2, 0.3], [0.3, 0.1 + 0.2])
    assert rounding[3] == 1.0 and abs(rounding[0]) < 1e-15
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_t([1.0], [1.0, 2.0])


def test_sign_flip_against_fisher_s_example():
    """On one side 835 of the 32,768 flips exceed 314 and 28 equal it."""
    assert sum(DARWIN) == 314 and sign_flip(DARWIN) == pytest.approx(2 * (835 + 28) / 2**15)


@pytest.mark.parametrize("d", [[1, 2, 3, -1], [0, 0], [0.1, 0.2, 0.3], [0.3, -0.1, -0.2], [1, 1, 1, 1, 1], [5, -5], [2, 0, -1, 3, 3, 7]])
def test_sign_flip_against_brute_force(d):
    """Tenths: 0.3 - 0.1 - 0.2 is not 0 in floating point, and must count as a tie all the same."""
    whole = [round(10 * x) for x in d]
    sums = [abs(sum(s * x for s, x in zip(signs, whole, strict=True))) for signs in itertools.product((1, -1), repeat=len(d))]
    assert sign_flip(d) == sum(s >= abs(sum(whole)) for s in sums) / len(sums)


def test_sign_flip_floor_and_scale():
    assert sign_flip([0.01, 0.02, 0.005, 0.03, 0.011]) == 2 / 2**5
    d = [0.013, -0.004, 0.02, 0.001]
    assert sign_flip([1e-12 * x for x in d]) == sign_flip([1e9 * x for x in d]) == sign_flip([-x for x in d]) == sign_flip(d)


def test_sign_flip_beyond_enumeration():
    """The draws are fixed, and agree with the exact value of one fewer difference to the draws' error."""
    d = [0.3, -0.2, 0.1, 0.4, -0.1, 0.25, -0.3, 0.05, 0.15, -0.12] * 2
    assert len(d) == EXACT_FLIPS
    many = [*d, 0.0]  # changes no sum
    assert sign_flip(many) == sign_flip(many) == pytest.approx(sign_flip(d), abs=0.01)


def test_holm_against_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5, 0.9]) == [1.0, 1.0, 1.0] and holm([]) == [] and holm([0.03]) == [0.03]
    p = [0.021, 0.0007, 0.2, 0.021, 0.74, 0.013]
    ordered, running, expected = sorted(range(len(p)), key=lambda i: p[i]), 0.0, [0.0] * len(p)
    for rank, i in enumerate(ordered):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        expected[i] = running
    assert holm(p) == pytest.approx(expected)


def test_holm_leaves_out_what_was_not_tested():
    some = holm([0.04, nan, 0.01])
    assert some[0] == 0.04 and isnan(some[1]) and some[2] == 0.02
    assert all(map(isnan, holm([nan, nan])))


@pytest.mark.parametrize(("effect", "power", "n"), [(0.5, 0.8, 34), (0.5, 0.9, 44), (0.5, 0.95, 54), (0.2, 0.8, 199), (0.8, 0.8, 15)])
def test_power_against_published_sample_sizes(effect, power, n):
    """Paired t tests, two-sided 5%: G*Power 3 (Faul et al. 2007)."""
    assert power_n(effect, 1.0, power) == n == power_n(-3 * effect, 3.0, power)


def test_power_of_few_pairs_by_simulation():
    rng = np.random.default_rng(0)
    size, n = 3.0, int(power_n(3.0, 1.0))

    def power(pairs: int) -> float:
        x = rng.normal(size, 1.0, (40_000, pairs))
        t = np.abs(x.mean(1)) / (x.std(1, ddof=1) / sqrt(pairs))
        return float(np.mean(t > {2: 12.706205, 3: 4.302653, 4: 3.182446}[pairs]))

    assert n == 4 and power(3) < 0.9 <= power(4)


def test_power_at_the_edges():
    assert power_n(0.0, 1.0) == inf and power_n(0.1, 0.0) == 2 and isnan(power_n(nan, 1.0)) and isnan(power_n(1.0, nan))
    assert power_n(1e-3, 1.0) == pytest.approx((1.959964 + 1.281552) ** 2 * 1e6, rel=1e-5)
    assert power_n(100.0, 1.0) == 2
    assert power_n(6.0, 1.0, 0.75) == power_n(9.0, 1.0, 0.75) == 3  # two seeds reach 0.49 and 0.68; scipy's noncentral t is nan at 6
    assert paired_t([1e-170, 3e-170, -1e-170], [0.0] * 3)[3] == pytest.approx(paired_t([1.0, 3.0, -1.0], [0.0] * 3)[3])
