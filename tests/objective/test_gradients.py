"""Expected gradients at one state: a sum over all tokens of a vocabulary of 7 (float64), each with the probability that it is sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skillsd.objective import (
    FullReverseKL,
    GapAdvantage,
    GapMultiplier,
    GatedLogRatio,
    Objective,
    SampledReverseKL,
    Signal,
    Tokens,
    TopKJSD,
    UnweightedK3,
    k3,
)

V = 7
Dists = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def dists() -> Dists:
    """Student's logits, teacher's log-probs, another old student's log-probs."""
    g = torch.Generator().manual_seed(3)
    z, tea, old = torch.randn(3, V, generator=g, dtype=torch.float64)
    return z.requires_grad_(), tea.log_softmax(-1), old.log_softmax(-1)


def gradient(loss: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(loss, z)[0]


def reverse_kl(z: Tensor, tea: Tensor) -> Tensor:
    stu = z.log_softmax(-1)
    return gradient((stu.exp() * (stu - tea)).sum(), z)


def forward_kl(z: Tensor, tea: Tensor) -> Tensor:
    return gradient((tea.exp() * (tea - z.log_softmax(-1))).sum(), z)


def expected(objective: Objective, z: Tensor, tea: Tensor, b: Tensor, old: Tensor | None = None, advantage: float = 0.0) -> Tensor:
    """Gradient in z of the loss at one token, over tokens sampled by b. `old` is GRPO's, b's own unless given."""
    total = torch.zeros_like(z)
    for token in range(V):
        student = z.log_softmax(-1)
        divergence = objective.signal.divergence(student[None], tea[None]) if objective.signal.distributional else None
        x = {k: d[token].view(1, 1) for k, d in (("logp", student), ("logp_old", b if old is None else old), ("logp_teacher", tea))}
        terms = objective.terms(
            **x, mask=torch.ones(1, 1, dtype=torch.bool), advantage=torch.tensor([advantage], dtype=torch.float64),
            logp_behaviour=b[token].view(1, 1), divergence=None if divergence is None else divergence[None],
        )  # fmt: skip
        total += b[token].exp() * gradient(objective.total(terms, 1), z)
    return total


def alone(signal: Signal, **settings: Any) -> Objective:
    """Distillation without a policy loss."""
    return Objective(policy_weight=0.0, distillation_weight=1.0, loss=signal, **settings)


# -- Skill-SD (Prop. 2) -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["k3", "score"])
@pytest.mark.parametrize("behaviour", ["student", "old student", "old teacher"])
def test_expected_gradient_is_reverse_kl(dists, form, behaviour):
    """Prop. 2 for whoever sampled: the student itself (first step), an older student (Eq. 12), the teacher (Eq. 13)."""
    z, tea, old = dists
    b = {"student": z.detach().log_softmax(-1), "old student": old, "old teacher": tea}[behaviour]
    for grpo_old in (None, old):  # the policy's own ratio is centred elsewhere in Eq. 13, which is nothing to this term
        torch.testing.assert_close(expected(alone(SampledReverseKL(form)), z, tea, b, grpo_old), reverse_kl(z, tea), atol=1e-6, rtol=0)


class Detached(Signal):
    """Eq. 12 with sg(rho): what a reader may take it for."""

    def loss(self, t: Tokens) -> Tensor:
        return t.ratio.detach() * k3(t.logp - t.logp_teacher.detach())


def test_detached_ratio_trains_forward_kl(dists):
    """With sg(rho) the expected gradient is that of KL(pi_tea || pi_stu), whatever the old student was: not what is wanted."""
    z, tea, old = dists
    for b in (old, z.detach().log_softmax(-1)):
        wrong = expected(alone(Detached()), z, tea, b)
        torch.testing.assert_close(wrong, forward_kl(z, tea), atol=1e-6, rtol=0)
        assert (wrong - reverse_kl(z, tea)).abs().max() > 1e-2


def test_naive_k3_trains_forward_kl(dists):
    """On the student's own tokens; on an older student's it trains neither."""
    z, tea, old = dists
    own = expected(alone(UnweightedK3()), z, tea, z.detach().log_softmax(-1))
    torch.testing.assert_close(own, forward_kl(z, tea), atol=1e-6, rtol=0)
    assert (own - reverse_kl(z, tea)).abs().max() > 1e-2
    assert all((expected(alone(UnweightedK3()), z, tea, old) - kl(z, tea)).abs().max() > 1e-2 for kl in (forward_kl, reverse_kl))


def test_score_does_not_overflow():
    logp = torch.tensor([[-200.0]], requires_grad=True)
    rest = dict(
        logp_old=torch.tensor([[-200.0]]), logp_teacher=torch.tensor([[0.0]]), mask=torch.tensor([[True]]), advantage=torch.zeros(1)
    )
    both = [gradient(o.total(o.terms(logp, **rest), 1), logp) for o in (alone(SampledReverseKL()), alone(SampledReverseKL("score")))]
    assert not both[0].isfinite().all()  # exp(200) is not a float32
    torch.testing.assert_close(both[1], torch.tensor([[-200.0]]))


@pytest.mark.parametrize(
    "signal", [SampledReverseKL(), SampledReverseKL("score"), UnweightedK3(), FullReverseKL(), TopKJSD(k=3)], ids=lambda s: type(s).__name__
)
def test_no_gradient_where_teacher_is_student(dists, signal):
    z, _, old = dists
    assert expected(alone(signal), z, z.detach().log_softmax(-1), old).abs().max() < 1e-15


@pytest.mark.parametrize("form", ["k3", "score"])
def test_first_step_equals_a_token_advantage(form):
    """With one update a batch, L_GRPO + lambda L_SDL has the gradient of L_GRPO with A + lambda (log tea - log old): OPID's."""
    g = torch.Generator().manual_seed(0)
    logp = -torch.rand(3, 5, generator=g, dtype=torch.float64).requires_grad_()
    tea = -torch.rand(3, 5, generator=g, dtype=torch.float64)
    mask = torch.rand(3, 5, generator=g) < 0.7
    advantage = torch.randn(3, generator=g, dtype=torch.float64)
    n, lam = int(mask.sum()), 0.125
    ratio = (logp - logp.detach()).exp()
    token_advantage = advantage[:, None] + lam * (tea - logp.detach())
    want = gradient(-(ratio * token_advantage * mask).sum() / n, logp)
    for o in (
        Objective(distillation_weight=lam, loss=SampledReverseKL(form)),
        Objective(distillation_weight=lam, advantage=GapAdvantage()),
    ):
        got = gradient(o.total(o.terms(logp, logp.detach(), tea, mask, advantage), n), logp)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


# -- the others ---------------------------------------------------------------------------------------------------------------


def test_gap_advantage_pulls_along_reverse_kl(dists):
    """At ratio 1 its expected gradient is grad KL(pi_stu || pi_tea), beside GRPO's own, whose advantage sums to nothing here."""
    z, tea, _ = dists
    o = Objective(distillation_weight=1.0, advantage=GapAdvantage())
    torch.testing.assert_close(expected(o, z, tea, z.detach().log_softmax(-1), advantage=3.0), reverse_kl(z, tea), atol=1e-12, rtol=0)


def test_gap_advantage_goes_through_the_bounds_of_the_ratio(dists):
    """Its opinion counts with the reward's, then the ratio is clipped: added as a loss of its own it would not be."""
    z, tea, old = dists
    o = Objective(distillation_weight=1.0, advantage=GapAdvantage())
    for a in (-2.0, 0.3, 2.0):
        want = torch.zeros_like(z)
        for token in range(V):
            p = z.detach().softmax(-1)
            r, total = p[token] / old[token].exp(), a + tea[token] - old[token]
            moves = not (total > 0 and r > 1.28) and not (total < 0 and r < 0.8)
            want -= moves * old[token].exp() * r * total * (torch.eye(V, dtype=torch.float64)[token] - p)
        torch.testing.assert_close(expected(o, z, tea, old, advantage=a), want, atol=1e-12, rtol=0)


class Ungated(Signal):
    """SDAR without its gate."""

    def loss(self, t: Tokens) -> Tensor:
        return t.logp_teacher.detach() - t.logp


def test_gated_log_ratio_is_its_own_gate(dists):
    """The teacher's log-prob is a constant, so without the gate every token is raised alike: nothing in expectation."""
    z, tea, _ = dists
    stu = z.detach().log_softmax(-1)
    assert expected(alone(Ungated()), z, tea, stu).abs().max() < 1e-15
    for beta in (0.0, 1.0, 5.0):
        gate = 1 / (1 + (-beta * (tea - stu)).exp())
        want = -gradient((stu.exp() * gate * z.log_softmax(-1)).sum(), z)
        torch.testing.assert_close(expected(alone(GatedLogRatio(beta)), z, tea, stu), want, atol=1e-12, rtol=0)
        assert (want.abs().max() > 1e-2) == (beta > 0)  # a gate that is 1/2 everywhere is none
    downhill = (expected(alone(GatedLogRatio()), z, tea, stu) * reverse_kl(z, tea)).sum()
    assert downhill > 0  # a step against it lowers KL(pi_stu || pi_tea)


@pytest.mark.parametrize("sampled_by", ["student", "old student", "teacher"])
def test_full_reverse_kl_does_not_depend_on_who_sampled(dists, sampled_by):
    """Cross-entropy minus entropy by torch.distributions; the sampled token does not matter."""
    z, tea, old = dists
    b = {"student": z.detach().log_softmax(-1), "old student": old, "teacher": tea}[sampled_by]
    kl = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=z), torch.distributions.Categorical(logits=tea))
    torch.testing.assert_close(FullReverseKL().divergence(z.log_softmax(-1)[None], tea[None])[0], kl)
    torch.testing.assert_close(expected(alone(FullReverseKL()), z, tea, b), gradient(kl, z), atol=1e-12, rtol=0)


class StateKL(Signal):
    """What is refused: the full-vocabulary KL of the state as an advantage. Unannounced, so that it gets through."""

    def __init__(self, z: Tensor, tea: Tensor) -> None:
        stu = z.detach().log_softmax(-1)
        self.kl = (stu.exp() * (stu - tea)).sum()

    def advantage(self, t: Tokens) -> Tensor:
        return -self.kl.expand_as(t.logp)


def test_a_divergence_as_an_advantage_has_expected_gradient_zero(dists):
    """Why it is refused: it is the same for every token of the state, and advantages that do not depend on the token cancel."""
    z, tea, _ = dists
    stu = z.detach().log_softmax(-1)
    signal = StateKL(z, tea)
    assert signal.kl > 0.1
    assert expected(Objective(distillation_weight=1.0, advantage=signal), z, tea, stu).abs().max() < 1e-15
    for useful in (Objective(distillation_weight=1.0, advantage=GapAdvantage()), alone(FullReverseKL())):
        assert expected(useful, z, tea, stu).abs().max() > 1e-2


def test_gap_multiplier_keeps_the_direction_of_the_reward(dists):
    """Every token's step is GRPO's times 0.8 to 1.2; both bounds are met, and a token that the teacher endorses gains more."""
    z, tea, _ = dists
    stu = z.detach().log_softmax(-1)

    def step(o: Objective, token: int, a: float) -> Tensor:
        mask, advantage = torch.arange(V)[None] == token, torch.tensor([a], dtype=torch.float64)
        return gradient(o.total(o.terms(z.log_softmax(-1)[None], stu[None], tea[None], mask, advantage), 1), z)

    for a in (1.5, -1.5):
        sizes = []
        for token in range(V):
            plain = step(Objective(distillation_weight=0.0), token, a)
            scaled = step(Objective(distillation_weight=1.0, multiplier=GapMultiplier()), token, a)
            sizes.append(float(scaled.norm() / plain.norm()))
            torch.testing.assert_close(scaled, sizes[-1] * plain, atol=1e-12, rtol=0)  # same direction, same sign
        in_order = [s for _, s in sorted(zip((tea - stu).tolist(), sizes, strict=True))]
        assert in_order == pytest.approx(sorted(sizes, reverse=a < 0), abs=1e-12)
        assert min(sizes) == pytest.approx(0.8) and max(sizes) == pytest.approx(1.2)
