"""Settings of the objective that are refused, and its defaults."""

from __future__ import annotations

import math

import pytest

from skillsd.objective import (
    FullReverseKL,
    GapAdvantage,
    GapMultiplier,
    GatedLogRatio,
    Objective,
    OutcomeGate,
    SampledReverseKL,
    SigmoidGate,
    Signal,
    TopKJSD,
    TwoViewKL,
    UnweightedK3,
)

KEY = r"^model\.objective"


@pytest.mark.parametrize("key", ["policy_weight", "clip_low", "clip_high", "distillation_weight", "weight_steps", "weight_end"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_bad_weights_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"{KEY}\.{key} is .*give 0 or more"):
        Objective(**{key: value})


@pytest.mark.parametrize("settings", [{}, {"weight_steps": 5}, {"weight_end": 0.1}])
def test_an_objective_without_terms_is_refused(settings):
    with pytest.raises(ValueError, match=rf"{KEY}: policy_weight and distillation_weight .*trains nothing"):
        Objective(policy_weight=0, distillation_weight=0, **settings)


def test_a_bad_group_filter_is_refused():
    with pytest.raises(ValueError, match=rf"{KEY}\.group_filter is rubbish"):
        Objective(group_filter="rubbish")  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [GatedLogRatio, SigmoidGate])
@pytest.mark.parametrize("beta", [-1.0, math.nan])
def test_bad_steepness(cls, beta):
    with pytest.raises(ValueError, match=rf"^{cls.__name__}\.beta is {beta}"):
        cls(beta)


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_bad_indifference(value):
    with pytest.raises(ValueError, match=r"^OutcomeGate\.indifference is"):
        OutcomeGate(value)


@pytest.mark.parametrize("clip", [-0.1, 1.0, math.nan])
def test_a_multiplier_that_could_change_signs_is_refused(clip):
    with pytest.raises(ValueError, match=r"^GapMultiplier\.clip is .*no sign changes"):
        GapMultiplier(clip)


@pytest.mark.parametrize(
    "two",
    [
        {"loss": SampledReverseKL(), "advantage": GapAdvantage()},
        {"loss": SampledReverseKL(), "multiplier": GapMultiplier()},
        {"advantage": GapAdvantage(), "multiplier": GapMultiplier()},
        {"loss": FullReverseKL(), "advantage": GapAdvantage(), "multiplier": GapMultiplier()},
    ],
    ids="+".join,
)
def test_two_places_at_once_are_refused(two):
    with pytest.raises(ValueError, match=rf"{KEY}: {' and '.join(two)} are both set.*counts the same evidence twice.*null"):
        Objective(**two)


@pytest.mark.parametrize("placement", ["advantage", "multiplier"])
@pytest.mark.parametrize("signal", [FullReverseKL(), TopKJSD(), TwoViewKL()], ids=lambda s: type(s).__name__)
def test_divergences_are_losses_only(placement, signal):
    with pytest.raises(ValueError, match=rf"{KEY}\.{placement} is {type(signal).__name__}, .*expected gradient is zero.*objective\.loss"):
        Objective(**{placement: signal})


@pytest.mark.parametrize(
    ("placement", "signal", "instead"),
    [
        ("advantage", SampledReverseKL(), "loss"),
        ("advantage", UnweightedK3(), "loss"),
        ("advantage", GatedLogRatio(), "loss"),
        ("advantage", GapMultiplier(), "multiplier"),
        ("multiplier", GatedLogRatio(), "loss"),
        ("multiplier", GapAdvantage(), "advantage"),
        ("loss", GapAdvantage(), "advantage"),
        ("loss", GapMultiplier(), "multiplier"),
        ("loss", Signal(), "no method"),
    ],
)
def test_a_place_that_the_class_does_not_write_is_refused(placement, signal, instead):
    with pytest.raises(ValueError, match=rf"{KEY}\.{placement}: {type(signal).__name__} is no {placement}: (give it as|it has) {instead}"):
        Objective(**{placement: signal})


@pytest.mark.parametrize("settings", [{"advantage": GapAdvantage()}, {"multiplier": GapMultiplier()}])
def test_shaping_an_advantage_that_is_not_used_is_refused(settings):
    with pytest.raises(ValueError, match=rf"{KEY}: policy_weight is 0, .*nothing to act on: raise it or use loss"):
        Objective(policy_weight=0.0, **settings)


def test_the_default_is_the_papers():
    o = Objective()
    assert (o.policy_weight, o.distillation_weight, o.clip_low, o.clip_high, o.gate, o.group_filter) == (1, 0.001, 0.2, 0.28, None, "none")
    assert o.placement == "loss" and isinstance(o.signal, SampledReverseKL) and o.signal.form == "k3"
    assert [o.weight(i) for i in (0, 7, 10**6)] == [0.001] * 3


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ((0.5, 50, 0.0), {0: 0.5, 1: 0.49, 25: 0.25, 49: 0.01, 50: 0.0, 51: 0.0, 1000: 0.0}),
        ((0.0, 4, 0.2), {0: 0.0, 1: 0.05, 3: 0.15, 4: 0.2, 9: 0.2}),
        ((0.1, 0, 0.7), {0: 0.1, 1: 0.1, 99: 0.1}),
        ((0.1, 1, 0.7), {0: 0.1, 1: 0.7}),
    ],
)
def test_weight_schedule(settings, want):
    o = Objective(policy_weight=0.0, **dict(zip(("distillation_weight", "weight_steps", "weight_end"), settings, strict=True)))
    assert {i: o.weight(i) for i in want} == pytest.approx(want, abs=1e-15)
