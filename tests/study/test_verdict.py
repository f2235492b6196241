"""Every rule of the verdict once, and what it makes of edges."""

from __future__ import annotations

from math import inf, nan

import pytest

from skillsd.study.comparison import Comparison
from skillsd.study.verdict import about_control, about_method, finding, p_value, points, verdict


def made(d: tuple[float, ...], p: float = nan, needed: float = 12.0, method: str = "m", other: str = "grpo") -> Comparison:
    mean = sum(d) / len(d) if d else nan
    low, high = (mean - 0.01, mean + 0.01) if len(d) > 1 else (nan, nan)
    return Comparison(method, other, tuple(range(len(d))), d, mean, low, high, p, p, needed, p)


BETTER, WORSE = made((0.02, 0.03), 0.01), made((-0.02, -0.03), 0.0004)
UNCLEAR, SAME = made((0.02, -0.01), 0.6), made((0.0, 0.0), 1.0, inf)
ONE, NONE = made((0.02,)), made(())
METHOD = {
    "better": (BETTER, "m beats grpo: +2.5 [+1.5, +3.5] points over 2 seeds, Holm p = 0.01."),
    "worse": (WORSE, "m is worse than grpo: -2.5 [-3.5, -1.5] points over 2 seeds, Holm p < 0.001."),
    "unclear": (
        UNCLEAR,
        "m cannot be told from grpo: +0.5 [-0.5, +1.5] points over 2 seeds, Holm p = 0.6; "
        "about 12 seeds would be needed to see a difference of this size with 90% power in a single test.",
    ),
    "same": (SAME, "m came out the same as grpo with each of 2 seeds."),
    "one": (ONE, "m - grpo is +2.0 points with seed 0; one seed says nothing about others."),
    "none": (NONE, "m cannot be compared with grpo: no seed was finished by both."),
}


@pytest.mark.parametrize("rule", METHOD)
def test_each_rule_about_a_method(rule):
    comparison, sentence = METHOD[rule]
    assert finding(comparison) == rule and about_method(comparison) == sentence


def test_a_mean_of_exactly_0_needs_no_number_of_seeds():
    assert about_method(made((0.01, -0.01), 1.0, inf)).endswith("no number of seeds would show a difference of 0.")


def control(d: tuple[float, ...], p: float = nan) -> Comparison:
    return made(d, p, method="m", other="shuffled")


CONTROL = [
    (control((0.02, 0.03), 0.01), BETTER, "Control: the gain of m over shuffled is established (+2.5 [+1.5, +3.5] points over 2 seeds, "
     "Holm p = 0.01); over grpo one is."),
    (control((0.02, 0.03), 0.01), UNCLEAR, "established (+2.5 [+1.5, +3.5] points over 2 seeds, Holm p = 0.01); over grpo none is."),
    (control((0.02, 0.03), 0.01), None, "points over 2 seeds, Holm p = 0.01)."),
    (control((-0.02, -0.03), 0.01), BETTER, "m is worse than shuffled (-2.5 [-3.5, -1.5] points over 2 seeds, Holm p = 0.01): what m has "
     "and shuffled lacks does harm."),
    (control((0.02, -0.01), 0.5), BETTER, "90% power in a single test): its gain over grpo is not shown to come from what shuffled lacks."),
    (control((0.02, -0.01), 0.5), WORSE, "90% power in a single test), and no gain over grpo is established that shuffled could explain."),
    (control((0.0, 0.0), 1.0), BETTER, "m came out the same as shuffled with each of 2 seeds: its gain over grpo is not shown"),
    (control((0.0, 0.0), 1.0), None, "with each of 2 seeds: a gain is not shown to come from what shuffled lacks."),
    (control((0.01,)), BETTER, "Control: m - shuffled is +1.0 points with seed 0; one seed says nothing about others."),
    (control(()), BETTER, "Control: m cannot be compared with shuffled: no seed was finished by both."),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CONTROL)))
def test_each_rule_about_a_control(case):
    comparison, method, part = CONTROL[case]
    assert part in about_control(comparison, method)


def test_a_verdict_is_all_its_sentences_in_order():
    sentences = verdict([BETTER, WORSE, UNCLEAR, SAME, ONE, NONE], [control((0.02, 0.03), 0.01)])
    assert sentences[0] == (
        "Of 6 methods compared with the baseline: 1 beats it, 1 is worse, 2 cannot be told from it, 2 could not be tested."
    )
    assert sentences[7:] == ["With 2 seeds the sign-flip test cannot give a p below 0.5, however large the difference.", sentences[-1]]
    assert len(sentences) == 9 and sentences[-1].startswith("Control: ")
    assert verdict([], []) == []


def test_p_values_and_points_are_written_so():
    assert [p_value(p) for p in (0.0625, 0.05, 0.00099, 1.0, nan)] == ["0.0625", "0.05", "< 0.001", "1", "n/a"]
    assert points(0.0123, -0.0004, nan) == "+1.2 [-0.0, n/a]"
