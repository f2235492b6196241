"""The divergences of whole distributions: exactness, bounds, precision. That they are right in the main is in test_by_hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from skillsd.objective import FullReverseKL, Objective, TopKJSD, TwoViewKL
from skillsd.objective.top_k_jsd import top_k_with_tail

ALPHAS = (0.0, 0.3, 0.5, 1.0)


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    """Log-probs of 200 students and teachers over 7 tokens, from nearly equal to nearly disjoint."""
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 1.5, 200, dtype=torch.float64)[:, None]
    z = torch.randn(2, 200, 7, generator=g, dtype=torch.float64)
    return (scale * z[0]).log_softmax(-1).requires_grad_(), (scale * z[1]).log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("k", [7, 100])
def test_with_the_whole_vocabulary_topk_jsd_is_exact(pairs, k, alpha):
    p, q = pairs
    m = ((1 - alpha) * p.exp() + alpha * q.exp()).log()
    want = {0.0: kl(q, p), 1.0: kl(p, q)}.get(alpha, (1 - alpha) * kl(p, m) + alpha * kl(q, m))
    torch.testing.assert_close(TopKJSD(k=k, alpha=alpha).divergence(p, q), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_buckets_never_raise_a_divergence(pairs, k, alpha):
    """Data processing: merging outcomes cannot enlarge a divergence. And none is negative."""
    fewer, more = (TopKJSD(k=n, alpha=alpha).divergence(*pairs) for n in (k, k + 1))
    assert (fewer <= more + 1e-12).all() and (fewer >= -1e-12).all() and (fewer < more - 1e-3).any()


def test_jsd_is_at_most_ln_2(pairs):
    """At alpha 0.5, and symmetric there; in general at most the entropy of (alpha, 1 - alpha)."""
    p, q = pairs
    half = TopKJSD(k=7, alpha=0.5)
    jsd = half.divergence(p, q)
    assert jsd.max() <= math.log(2) and jsd.max() > 0.9 * math.log(2)
    torch.testing.assert_close(jsd, half.divergence(q, p))
    assert TopKJSD(k=7, alpha=0.3).divergence(p, q).max() <= -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert kl(p, q).max() > 10 * math.log(2)  # what the bound is for


def test_the_tail_keeps_its_digits():
    """One minus the sum of the kept would be 0 in float32, and its log -inf."""
    z = torch.tensor([[0.0, -1.0, -40.0, -41.0, -42.0]])
    p, q = top_k_with_tail(z.log_softmax(-1), torch.zeros(1, 5).log_softmax(-1), 2)
    norm = math.log(1 + math.exp(-1))
    tail = -40 + math.log(1 + math.exp(-1) + math.exp(-2))
    torch.testing.assert_close(p, torch.tensor([[-norm, -1 - norm, tail - norm]]))
    torch.testing.assert_close(q, torch.tensor([[0.2, 0.2, 0.6]]).log())
    logits = z.requires_grad_()
    for alpha in ALPHAS:
        value = TopKJSD(k=2, alpha=alpha).divergence(logits.log_softmax(-1), torch.zeros(1, 5).log_softmax(-1))
        (grad,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all() and grad.isfinite().all()


def test_the_kept_tokens_are_whose():
    """SDPO keeps the student's likeliest, UCOB the teacher's, and forgets the others."""
    student, teacher = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.1, 0.3, 0.6]]).log()
    p, q = top_k_with_tail(student, teacher, 1)
    torch.testing.assert_close(p, torch.tensor([[0.6, 0.4]]).log())
    torch.testing.assert_close(q, torch.tensor([[0.1, 0.9]]).log())
    assert TwoViewKL(k=1).divergence(student, teacher).item() == 0  # of one token nothing is left to compare
    want = 2 / 3 * math.log(2 / 3 / (1 / 4)) + 1 / 3 * math.log(1 / 3 / (3 / 4))
    assert TwoViewKL(k=2).divergence(student, teacher).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "signal",
    [FullReverseKL(), TopKJSD(k=3), TopKJSD(k=3, alpha=0.0), TwoViewKL(k=3)],
    ids=["FullReverseKL", "TopKJSD", "SDPO forward", "TwoViewKL"],
)
def test_a_piece_at_a_time(pairs, signal):
    """States do not know of each other: the vocabulary's log-probs are made in chunks. And the teacher gets no gradient here."""
    p, q = pairs
    whole = signal.divergence(p, q)
    parts = torch.cat([signal.divergence(a, b) for a, b in zip(p.split(33), q.split(33), strict=True)])
    assert torch.equal(whole, parts) and whole.shape == (200,)
    assert torch.equal(torch.autograd.grad(whole.sum(), p)[0], torch.autograd.grad(parts.sum(), p)[0])


# -- their weights ------------------------------------------------------------------------------------------------------------


def test_topk_jsd_importance_weight_is_capped_and_detached(batch):
    """Its gradient does not pass through rho: that of the divergence alone, times a constant."""
    o = Objective(policy_weight=0.0, distillation_weight=1.0, loss=TopKJSD(k=3))
    x = batch.inputs(o)
    seen = set()
    for log_rho in (-3.0, 0.0, 0.5, math.log(2.0), 0.9, 50.0):
        behaviour = x["logp"].detach() - log_rho
        plain = torch.autograd.grad(x["divergence"][batch.mask].sum(), batch.logits, retain_graph=True)[0]
        got = torch.autograd.grad(o.total(o.terms(**x | {"logp_behaviour": behaviour}), 1), batch.logits, retain_graph=True)[0]
        weight = min(math.exp(log_rho), 2.0)
        torch.testing.assert_close(got, weight * plain)
        seen.add(weight)
    assert 2.0 in seen and len(seen) == 4


@pytest.mark.parametrize(
    ("gap", "weight"),
    [(-1.0, 0), (0.0, 0), (0.05, 0), (0.0501, 0.2505), (0.1, 0.5), (0.2, 1), (0.3, 1.5), (0.4, 2), (0.5, 2), (9.0, 2), (math.nan, 0)],
)
def test_two_view_kl_is_weighted_by_the_return_gap(batch, gap, weight):
    """Nothing up to 0.05, then gap / 0.2, at most 2; nothing where nobody acted under the other view, not even a nan."""
    o = Objective(policy_weight=0.0, distillation_weight=1.0, loss=TwoViewKL())
    x = batch.inputs(o)
    terms = o.terms(**x | {"return_gap": torch.full((7,), gap, dtype=torch.float64)})
    torch.testing.assert_close(terms.distillation, weight * x["divergence"][batch.mask].sum())
    got, plain = (
        torch.autograd.grad(v, batch.logits, retain_graph=True)[0] for v in (terms.distillation, x["divergence"][batch.mask].sum())
    )
    torch.testing.assert_close(got, weight * plain)


def test_two_view_kl_without_a_pair_has_no_gradient(batch):
    o = Objective(policy_weight=0.0, distillation_weight=1.0, loss=TwoViewKL())
    terms = o.terms(**batch.inputs(o) | {"return_gap": None})
    assert terms.distillation == 0 and torch.autograd.grad(terms.distillation, batch.logits)[0].eq(0).all()


@pytest.mark.parametrize(
    "bad", [{"k": 0}, {"alpha": -0.1}, {"alpha": 1.1}, {"ratio_clip": 0.0}, {"alpha": math.nan}, {"ratio_clip": math.nan}]
)
def test_topk_jsd_refuses_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} "):
        TopKJSD(**bad)


@pytest.mark.parametrize("bad", [{"k": 0}, {"min_gap": -0.1}, {"full_gap": 0.0}, {"max_weight": 0.0}, {"full_gap": math.nan}])
def test_two_view_kl_refuses_settings_out_of_range(bad):
    with pytest.raises(ValueError, match="full_gap > 0"):
        TwoViewKL(**bad)
