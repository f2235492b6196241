"""Settings and groups at the edge of what is allowed."""

import pytest
import torch

from skillsd.objective import (
    GapMultiplier,
    GatedLogRatio,
    Objective,
    OutcomeGate,
    SigmoidGate,
    Signal,
    Tokens,
    TopKJSD,
    TwoViewKL,
    group_advantages,
)


def tokens(gap: float) -> Tokens:
    """One trajectory of one token, solved."""
    x = torch.tensor([-1.0], dtype=torch.float64)
    return Tokens(x, x, x, x + gap, x, torch.tensor([True]), x, torch.tensor([0]))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_the_least_settings(value):
    assert SigmoidGate(value).beta == GatedLogRatio(value).beta == OutcomeGate(value).indifference == value
    assert SigmoidGate(0.0)(tokens(2.0)).item() == 0.5
    assert GapMultiplier(clip=value).clip == TopKJSD(ratio_clip=0.5 + value).ratio_clip - 0.5 == value
    assert TwoViewKL(min_gap=value).min_gap == TwoViewKL(max_weight=0.5 + value).max_weight - 0.5 == value


def test_defaults():
    """What the methods' overlays and docs/ rely on."""
    assert vars(TopKJSD()) == {"k": 100, "alpha": 0.5, "ratio_clip": 2.0}
    assert vars(TwoViewKL()) == {"k": 32, "min_gap": 0.05, "full_gap": 0.2, "max_weight": 2.0}
    assert Objective(group_filter="zero_variance").group_filter == "zero_variance"


@pytest.mark.parametrize("key", ["distillation_weight", "weight_end"])
def test_a_share_above_one(key):
    """It could turn an advantage's sign; a loss may weigh what it likes."""
    assert getattr(Objective(multiplier=GapMultiplier(), **{key: 1.0}), key) == 1.0
    with pytest.raises(ValueError, match=r"a multiplier's distillation_weight and weight_end are shares: give at most 1"):
        Objective(multiplier=GapMultiplier(), **{key: 1.5})
    assert getattr(Objective(loss=TopKJSD(), **{key: 1.5}), key) == 1.5


@pytest.mark.parametrize(("gap", "opinion"), [(0.06, 1.0), (0.04, 0.0), (-0.06, -1.0)])
def test_one_token_is_an_opinion(gap, opinion):
    assert OutcomeGate()(tokens(gap)).item() == opinion


def test_the_smallest_group():
    assert group_advantages(torch.tensor([[0.0, 1.0], [2.0, 2.0]])).tolist() == [pytest.approx([-(0.5**0.5), 0.5**0.5]), [0.0, 0.0]]


@pytest.mark.parametrize("method", ["loss", "advantage", "multiplier"])
def test_a_signal_says_what_it_lacks(method):
    with pytest.raises(TypeError, match=f"GatedLogRatio has no {method}" if method != "loss" else "Signal has no loss"):
        getattr(Signal() if method == "loss" else GatedLogRatio(), method)(tokens(0.0))
    with pytest.raises(TypeError, match="GatedLogRatio has no divergence: write that method"):
        GatedLogRatio().divergence(torch.zeros(1, 2), torch.zeros(1, 2))


def test_an_unknown_group_filter():
    with pytest.raises(ValueError, match=r"objective\.group_filter is all: give none or zero_variance"):
        Objective(group_filter="all")
