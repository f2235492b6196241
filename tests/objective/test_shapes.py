"""What batches of the usual shape, dtype and settings do not show."""

import pytest
import torch

from skillsd.objective import (
    FullReverseKL,
    GapAdvantage,
    Gate,
    GatedLogRatio,
    NotPerToken,
    Objective,
    OutcomeGate,
    PositiveGate,
    SampledReverseKL,
    SigmoidGate,
    Signal,
    Tokens,
    TopKJSD,
    TraceGate,
    TwoViewKL,
    group_advantages,
)
from skillsd.objective.grpo import float32_rewards


def tokens(n: int) -> Tokens:
    """Tokens of one trajectory, in float32, with advantage and return gap in float64."""
    x, wide = torch.full((n,), -1.0), torch.ones(n, dtype=torch.float64)
    return Tokens(x, x, x, x, wide, wide > 0, wide, torch.zeros(n, dtype=torch.int64), -x)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_vocabulary_is_the_last_dimension(alpha):
    student, teacher = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    for signal in (FullReverseKL(), *(TopKJSD(k=k, alpha=alpha) for k in (3, 4, 5)), TwoViewKL(k=4)):
        flat = signal.divergence(student.flatten(0, 1), teacher.flatten(0, 1))
        torch.testing.assert_close(signal.divergence(student, teacher), flat.view(2, 3))


def test_the_group_is_the_last_dimension():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1023.5, 1024.5, 1024.0, 1024.25], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    for function in (group_advantages, float32_rewards):
        torch.testing.assert_close(function(rewards[:, None]), function(rewards)[:, None])


def test_weights_have_the_dtype_of_the_log_probs():
    assert PositiveGate()(tokens(3)).dtype == TwoViewKL().loss(tokens(3)).dtype == torch.float32


@pytest.mark.parametrize("gate", [SigmoidGate(), PositiveGate(), OutcomeGate(), TraceGate()])
def test_a_gate_of_no_tokens(gate):
    assert gate(tokens(0)).shape == (0,)


def test_the_gate_is_as_steep_by_default_as_in_the_paper():
    assert SigmoidGate().beta == GatedLogRatio().beta == 5.0


@pytest.mark.parametrize("signal", [{"loss": SampledReverseKL()}, {"advantage": GapAdvantage()}], ids=["loss", "advantage"])
@pytest.mark.parametrize("key", ["clip_low", "clip_high"])
def test_each_bound_of_the_ratio_may_be_set(batch, key, signal):
    narrow, wide = (Objective(**{key: bound}, distillation_weight=0.5, **signal) for bound in (0.1, 0.15))
    assert batch.loss(narrow) != batch.loss(wide)
    clipped = [o.terms(**batch.inputs(o)).metrics["clip_fraction"] for o in (narrow, wide)]
    assert clipped[0] >= clipped[1]


def test_a_shaped_advantage_has_the_same_bounds(batch):
    """None of the batch's ratios lies outside these, and some lie outside those by default."""
    o = Objective(clip_high=5.0, clip_low=0.9, distillation_weight=1.0, advantage=GapAdvantage())
    assert o.terms(**batch.inputs(o)).metrics["clip_fraction"] == 0


class Given(Gate, Signal):
    """Gives what it is made with, as a gate and as a signal."""

    def __init__(self, what):
        self.what = what

    def __call__(self, t):
        return self.what(t)

    loss = advantage = multiplier = __call__


def terms(**settings):
    """An objective's terms of two rows of three tokens, and the student's log-probs."""
    logp = torch.full((2, 3), -1.0, dtype=torch.float64, requires_grad=True)
    still, mask = logp.detach(), torch.ones(2, 3, dtype=torch.bool)
    objective = Objective(distillation_weight=1.0, **settings)
    return objective.terms(logp, still, still - 1, mask, torch.tensor([1.0, -1.0], dtype=torch.float64)), logp


@pytest.mark.parametrize("what", [lambda t: torch.ones(3), lambda t: torch.ones(1), lambda t: t.logp[:, None], lambda t: 1.0])
@pytest.mark.parametrize("place", ["gate", "loss", "advantage", "multiplier"])
def test_what_is_no_number_for_each_token_is_refused(place, what):
    with pytest.raises(NotPerToken, match=r"Given gave .*, not \[6\]"):
        terms(**{place: Given(what)})


def test_no_gradient_goes_through_a_gate():
    gradients = []
    for gate in (lambda t: t.logp.exp(), lambda t: t.logp.detach().exp()):
        made, logp = terms(gate=Given(gate))
        made.distillation.backward()
        gradients.append(logp.grad)
    assert gradients[0].any() and torch.equal(*gradients)
