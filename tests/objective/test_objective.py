"""GRPO's pieces against implementations by hand, and what `Objective` may and may not look at."""

import math
import random
from statistics import mean, stdev

import pytest
import torch

from skillsd.objective import Objective, clipped_policy_loss, group_advantages


def scalar_loss(logp: float, old: float, advantage: float) -> tuple[float, bool]:
    """-min(r A, clip(r, 0.8, 1.28) A), case by case."""
    r = math.exp(logp - old)
    if advantage > 0:
        return (-1.28 * advantage, True) if r > 1.28 else (-r * advantage, False)
    return (-0.8 * advantage, True) if r < 0.8 else (-r * advantage, False)


def test_clipped_loss_by_hand():
    rng = random.Random(1)
    cases = [(rng.uniform(-3, 0), rng.uniform(-3, 0), rng.uniform(-2, 2)) for _ in range(400)]
    seen = {(a > 0, (lp - old > math.log(1.28)), (lp - old < math.log(0.8))) for lp, old, a in cases}
    assert len(seen) == 6  # both signs with the ratio above, below and within the bounds
    logp, old, adv = torch.tensor(cases, dtype=torch.float64).T
    logp = logp.clone().requires_grad_()
    loss, clipped = clipped_policy_loss(logp, old, adv)
    want = [scalar_loss(*c) for c in cases]
    torch.testing.assert_close(loss, torch.tensor([w for w, _ in want], dtype=torch.float64))
    assert clipped.tolist() == [c for _, c in want]
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    free = [0.0 if c else -math.exp(lp - o) * a for (lp, o, a), (_, c) in zip(cases, want, strict=True)]
    torch.testing.assert_close(grad, torch.tensor(free, dtype=torch.float64))


def test_group_advantages_by_hand():
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(5, 4, generator=g, dtype=torch.float64)
    want = [[(r - mean(row)) / (stdev(row) + 1e-8) for r in row] for row in rewards.tolist()]
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 0.7])
def test_equal_rewards_have_no_advantage(reward):
    assert group_advantages(torch.full((2, 7), reward)).eq(0).all()


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match=r"data\.init_args\.group_size"):
        group_advantages(torch.ones(3, 1))


@pytest.mark.parametrize("key", ["policy_weight", "clip_low", "clip_high", "distillation_weight"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_bad_weights_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"objective\.{key} is"):
        Objective(**{key: value})


def test_an_objective_without_terms_is_refused():
    with pytest.raises(ValueError, match="trains nothing"):
        Objective(policy_weight=0, distillation_weight=0)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    logp, logp_old, logp_teacher = -torch.rand(3, 6, 8, generator=g)
    mask = torch.rand(6, 8, generator=g) < 0.5
    return dict(logp=logp.requires_grad_(), logp_old=logp_old, logp_teacher=logp_teacher, mask=mask, advantage=torch.randn(6, generator=g))


@pytest.mark.parametrize("estimator", ["skill_sd", "score"])
@pytest.mark.parametrize("junk", [5.0, math.inf, math.nan])
def test_nothing_outside_the_mask_counts(batch, estimator, junk):
    objective = Objective(distillation_weight=0.1, estimator=estimator)
    outside = ~batch["mask"]
    spoilt = {k: v.detach().masked_fill(outside, junk) if v.dim() == 2 and k != "mask" else v for k, v in batch.items()}
    spoilt["logp"].requires_grad_()
    results = []
    for b in (batch, spoilt):
        terms = objective.terms(**b)
        (grad,) = torch.autograd.grad(objective.total(terms, 7), b["logp"])
        results.append((terms.policy, terms.distillation, grad, torch.stack(list(terms.metrics.values()))))
        assert grad[outside].eq(0).all()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_micro_batches_add_up(batch):
    objective, n = Objective(distillation_weight=0.1), int(batch["mask"].sum())
    whole = objective.terms(**batch)
    parts = [objective.terms(**{k: v[a : a + 2] for k, v in batch.items()}) for a in (0, 2, 4)]
    for name in whole.metrics:
        torch.testing.assert_close(sum(p.metrics[name] for p in parts), whole.metrics[name])
    (want,) = torch.autograd.grad(objective.total(whole, n), batch["logp"])
    (got,) = torch.autograd.grad(sum(objective.total(p, n) for p in parts), batch["logp"])
    torch.testing.assert_close(got, want)


def test_metrics_by_hand(batch):
    m = Objective().terms(**batch).metrics
    logp, old, tea, mask = (batch[k].detach() for k in ("logp", "logp_old", "logp_teacher", "mask"))
    adv = batch["advantage"][:, None].expand(6, 8)
    gap, ratio = tea - logp, (logp - old).exp()
    clipped = torch.where(adv > 0, ratio > 1.28, ratio < 0.8)
    want = {
        "gap": gap, "gap_sq": gap**2, "teacher_health": adv * gap, "k3": gap.exp() - 1 - gap, "clip_fraction": clipped.float(),
        "logp_drift": (logp - old).abs(),
    }  # fmt: skip
    assert m.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(m[name], value[mask].sum(), msg=name)


def test_a_term_of_weight_zero_cannot_spoil_the_loss(batch):
    batch["logp_teacher"] += 500  # k3 overflows
    objective = Objective(distillation_weight=0.0)
    terms = objective.terms(**batch)
    assert terms.distillation.isinf() and objective.total(terms, 7).isfinite()
