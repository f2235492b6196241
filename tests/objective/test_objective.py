"""What `Objective` may and may not look at, for every algorithm; its metrics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from skillsd.objective import (
    FullReverseKL,
    GapAdvantage,
    GapMultiplier,
    Gate,
    GatedLogRatio,
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
    UnweightedK3,
    clipped_policy_loss,
)


class Own(Signal):
    """Somebody's own: one class, no other file. It speaks in all three places."""

    def loss(self, t: Tokens) -> Tensor:
        return t.logp.square()

    def advantage(self, t: Tokens) -> Tensor:
        return t.logp_teacher - 1.0

    def multiplier(self, t: Tokens) -> Tensor:
        return 1.0 + t.success.to(t.logp)


class OwnDistributional(Signal):
    """A total variation distance."""

    distributional = True

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.exp() - teacher.exp()).abs().sum(-1) / 2

    def loss(self, t: Tokens) -> Tensor:
        assert t.divergence is not None
        return t.divergence


class OwnGate(Gate):
    """Somebody's own gate."""

    def __call__(self, t: Tokens) -> Tensor:
        return (t.row % 2).to(t.logp)


ALGORITHMS: dict[str, dict[str, Any]] = {
    "GRPO": {"distillation_weight": 0.0},
    "SkillSD k3": {"loss": SampledReverseKL()},
    "SkillSD score": {"loss": SampledReverseKL("score")},
    "UnweightedK3": {"loss": UnweightedK3()},
    "GatedLogRatio": {"loss": GatedLogRatio()},
    "FullReverseKL": {"loss": FullReverseKL()},
    "TopKJSD": {"loss": TopKJSD(k=3)},
    "TwoViewKL": {"loss": TwoViewKL(k=3)},
    "GapAdvantage": {"advantage": GapAdvantage()},
    "GapMultiplier": {"multiplier": GapMultiplier()},
    "own loss": {"loss": Own()},
    "own advantage": {"advantage": Own()},
    "own multiplier": {"multiplier": Own()},
    "own divergence": {"loss": OwnDistributional()},
    "SkillSD, sigmoid": {"loss": SampledReverseKL(), "gate": SigmoidGate()},
    "SDPG, positive": {"loss": FullReverseKL(), "gate": PositiveGate()},
    "SDPO, outcome": {"loss": TopKJSD(k=3), "gate": OutcomeGate()},
    "SkillSD, trace": {"loss": SampledReverseKL(), "gate": TraceGate()},
    "OPID, sigmoid": {"advantage": GapAdvantage(), "gate": SigmoidGate()},
    "RLSD, outcome": {"multiplier": GapMultiplier(), "gate": OutcomeGate()},
    "UCOB, sigmoid": {"loss": TwoViewKL(k=3), "gate": SigmoidGate()},
}


@pytest.fixture(params=ALGORITHMS)
def objective(request: pytest.FixtureRequest) -> Objective:
    return Objective(**{"distillation_weight": 0.375} | ALGORITHMS[request.param])


FLOATS = ("logp", "logp_old", "logp_teacher", "logp_behaviour", "divergence")


def leaves(batch: Any, objective: Objective) -> dict[str, Any]:
    """The inputs of `terms`, with log-probs and divergence as leaves."""
    x = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in batch.inputs(objective).items()}
    for k in ("logp", "divergence"):
        if x[k] is not None:
            x[k].requires_grad_()
    return x


def outcome_of(o: Objective, x: dict[str, Any], n: int) -> list[Tensor]:
    """Everything that comes out: both sums, the metrics, the gradients."""
    terms = o.terms(**x)
    wanted = [x["logp"]] + ([x["divergence"]] if o.signal.distributional else [])
    grads = torch.autograd.grad(o.total(terms, n), wanted, allow_unused=True)
    grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]
    return [terms.policy.detach(), terms.distillation.detach(), torch.stack(list(terms.metrics.values())), *grads]


@pytest.mark.parametrize("junk", [5.0, math.inf, -math.inf, math.nan])
def test_nothing_outside_the_mask_counts(batch, objective, junk):
    outside = ~batch.mask
    clean = leaves(batch, objective)
    spoilt = {k: v.detach().masked_fill(outside, junk) if k in FLOATS and v is not None else v for k, v in clean.items()}
    for k in ("logp", "divergence"):
        if spoilt[k] is not None:
            spoilt[k].requires_grad_()
    a, b = outcome_of(objective, clean, 7), outcome_of(objective, spoilt, 7)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(g[outside].eq(0).all() and g[~outside].ne(0).any() for g in b[3:])


def test_micro_batches_add_up(batch, objective):
    """Whatever the pieces: one row, two, or a piece without an action token."""
    batch.mask[3] = False
    n = int(batch.mask.sum())
    whole = outcome_of(objective, leaves(batch, objective), n)
    for cuts in ([(i, i + 1) for i in range(7)], [(0, 2), (2, 7)]):
        parts = [outcome_of(objective, leaves(batch.rows(slice(*c)), objective), n) for c in cuts]
        for i in range(3):
            torch.testing.assert_close(sum(p[i] for p in parts), whole[i])
        for i in range(3, len(whole)):
            torch.testing.assert_close(torch.cat([p[i] for p in parts]), whole[i])


def test_rows_without_a_teacher_are_left_to_the_policy_loss(batch, objective):
    """Exactly, whatever stands in their teacher's place: SDAR's loss has a gradient even where the gap is 0."""
    grpo, without_teacher = Objective(distillation_weight=0.0), ~batch.teacher_mask
    plain = outcome_of(grpo, leaves(batch, grpo), 7)
    x = leaves(batch, objective)
    some = outcome_of(objective, x, 7)
    assert torch.equal(some[3][without_teacher], plain[3][without_teacher])
    moved = not torch.equal(some[3], plain[3]) or any(g[batch.teacher_mask].ne(0).any() for g in some[4:])
    assert moved == (objective.distillation_weight > 0)

    x["logp_teacher"] = torch.where(batch.teacher_mask[:, None], x["logp_teacher"], -3.0)
    for value in [x["divergence"]] if objective.signal.distributional else []:
        value.data[without_teacher] = 2.0
    others = outcome_of(objective, x, 7)
    assert torch.equal(others[1], some[1]) and all(torch.equal(a, b) for a, b in zip(others[3:], some[3:], strict=True))
    assert all(g[without_teacher].eq(0).all() for g in others[4:])

    x["teacher_mask"] = torch.zeros(7, dtype=torch.bool)
    none = outcome_of(objective, x, 7)
    assert none[1] == 0 and torch.equal(none[3], plain[3]) and all(g.eq(0).all() for g in none[4:])


def test_at_weight_0_every_algorithm_is_grpo(batch, objective):
    """To the last bit: RLSD's end, and any schedule's."""
    grpo = Objective(distillation_weight=0.0)
    x = leaves(batch, objective)
    terms, want = objective.terms(**x, weight=0.0), grpo.terms(**x)
    assert terms.distillation == 0 and torch.equal(terms.policy, want.policy) and terms.metrics == want.metrics
    got, plain = (torch.autograd.grad(o.total(t, 7), x["logp"])[0] for o, t in ((objective, terms), (grpo, want)))
    assert torch.equal(got, plain)


def test_the_weight_is_that_of_iteration_0_by_default(batch):
    o = Objective(distillation_weight=0.5, weight_steps=10, loss=UnweightedK3())
    x = batch.inputs(o)
    by_weight = {w: o.terms(**x, weight=w).distillation for w in (None, 0.5, 0.25)}
    assert by_weight[None] == by_weight[0.5] and by_weight[0.25].item() == pytest.approx(by_weight[0.5].item() / 2, rel=1e-12)


def test_optional_inputs_have_neutral_defaults(batch):
    """Without a word about it: the student sampled, all rows have a teacher, none succeeded, nobody acted under the other view."""
    few = ("logp", "logp_old", "logp_teacher", "mask", "advantage")
    extras = {
        "logp_behaviour": batch.logp_old, "teacher_mask": torch.ones(7, dtype=torch.bool), "success": torch.zeros(7, dtype=torch.bool),
        "return_gap": torch.full((7,), math.nan, dtype=torch.float64),
    }  # fmt: skip
    seen = []

    class Seen(SampledReverseKL):
        def loss(self, t: Tokens) -> Tensor:
            seen.append(t)
            return super().loss(t)

    o = Objective(loss=Seen(), gate=OutcomeGate())
    x = {k: v for k, v in batch.inputs(o).items() if k in few}
    assert torch.equal(o.terms(**x).distillation, o.terms(**x, **extras).distillation)
    for name in ("logp_behaviour", "success", "return_gap", "row", "advantage"):
        torch.testing.assert_close(getattr(seen[0], name), getattr(seen[1], name), equal_nan=True, check_dtype=False)
    assert torch.equal(seen[0].row, batch.mask.nonzero()[:, 0]) and seen[0].divergence is None
    assert torch.equal(seen[0].advantage, batch.advantage[seen[0].row])


def test_a_batch_without_tokens(batch, objective):
    x = leaves(batch, objective) | {"mask": torch.zeros_like(batch.mask)}
    policy, distillation, metrics, *grads = outcome_of(objective, x, 1)
    assert policy == 0 and distillation == 0 and metrics.eq(0).all() and all(g.eq(0).all() for g in grads)


def test_an_own_signal_in_its_three_places(batch):
    n, lam = int(batch.mask.sum()), 0.375
    m, adv = batch.mask & batch.teacher_mask[:, None], batch.advantage[:, None].expand_as(batch.mask)
    x = batch.inputs(Objective())
    bonus = {"advantage": lam * (x["logp_teacher"] - 1.0), "multiplier": lam * adv * batch.success[:, None].double()}
    for place in ("loss", "advantage", "multiplier"):
        shaped = torch.where(m, adv + bonus[place], adv) if place != "loss" else adv
        plain, _ = clipped_policy_loss(x["logp"], x["logp_old"], shaped)
        want = (plain * batch.mask).sum() + (lam * (x["logp"].square() * m).sum() if place == "loss" else 0.0)
        o = Objective(distillation_weight=lam, **{place: Own()})
        torch.testing.assert_close(batch.loss(o), want / n)
        torch.testing.assert_close(batch.gradient(o), torch.autograd.grad(want / n, batch.logits, retain_graph=True)[0])


def test_an_advantage_carries_no_gradient(batch):
    """Nor does a multiplier, whatever its author forgot: the ratio alone is differentiated."""

    class Leaky(Own):
        def advantage(self, t: Tokens) -> Tensor:
            return t.logp

        def multiplier(self, t: Tokens) -> Tensor:
            return 1.0 + t.logp.square()

    class Tight(Own):
        def advantage(self, t: Tokens) -> Tensor:
            return t.logp.detach()

        def multiplier(self, t: Tokens) -> Tensor:
            return 1.0 + t.logp.detach().square()

    for place in ("advantage", "multiplier"):
        a, b = (batch.gradient(Objective(distillation_weight=0.375, **{place: signal})) for signal in (Leaky(), Tight()))
        assert torch.equal(a, b)


def test_a_gate_of_one_s_own_is_applied(batch):
    odd = torch.arange(7) % 2 == 1
    o = Objective(distillation_weight=0.375, loss=Own(), gate=OwnGate())
    same = Objective(distillation_weight=0.375, loss=Own())
    torch.testing.assert_close(batch.gradient(o), batch.gradient(same, teacher_mask=batch.teacher_mask & odd))


def test_a_signal_inherits_its_places():
    class Mine(GapAdvantage):
        def loss(self, t: Tokens) -> Tensor:
            return -t.logp

    assert [p for p in ("loss", "advantage", "multiplier") if Mine().writes(p)] == ["loss", "advantage"]
    assert Objective(advantage=Mine()).placement == "advantage" and Objective(loss=Mine()).placement == "loss"


def test_metrics_by_hand(batch, objective):
    """Metrics of the batch, whatever the algorithm; `shift` and `clip_fraction` are of the advantages that were used."""
    x = batch.inputs(objective)
    terms = objective.terms(**x)
    logp, old, tea = (x[k].detach() for k in ("logp", "logp_old", "logp_teacher"))
    adv = batch.advantage[:, None].expand_as(logp)
    gap, ratio = tea - logp, (logp - old).exp()
    shift = torch.zeros_like(adv)
    if objective.placement != "loss":
        row = batch.mask.nonzero()[:, 0]
        t = Tokens(*(v[batch.mask] for v in (logp, old, batch.logp_behaviour, tea, adv)), batch.success[row], batch.return_gap[row], row)
        g = 0.375 if objective.gate is None else 0.375 * objective.gate(t)
        said = objective.signal.advantage(t) if objective.placement == "advantage" else t.advantage * (objective.signal.multiplier(t) - 1)
        shift[batch.mask] = g * said
        shift[~batch.teacher_mask] = 0.0
        assert shift.abs().sum() > 0
    clipped = torch.where(adv + shift > 0, ratio > 1.28, ratio < 0.8)
    want = {
        "gap": gap, "gap_sq": gap**2, "teacher_health": adv * gap, "k3": gap.exp() - 1 - gap, "clip_fraction": clipped.double(),
        "logp_drift": (logp - old).abs(), "shift": shift.abs(),
    }  # fmt: skip
    assert terms.metrics.keys() == want.keys()
    for name, value in want.items():
        assert not terms.metrics[name].requires_grad
        torch.testing.assert_close(terms.metrics[name].double(), value[batch.mask].sum(), msg=name)


def test_a_term_of_weight_zero_cannot_spoil_the_loss(batch):
    x = leaves(batch, Objective())
    far = x | {"logp_teacher": x["logp_teacher"] + 5000}  # k3 overflows
    assert Objective(distillation_weight=0.5).terms(**far).distillation.isinf()
    grpo = Objective(distillation_weight=0.0)
    terms = grpo.terms(**far)
    assert terms.distillation == 0 and grpo.total(terms, 7).isfinite()

    far = x | {"logp_old": x["logp_old"] - 5000, "logp_behaviour": x["logp"].detach()}  # GRPO's ratio overflows
    alone = Objective(policy_weight=0.0, distillation_weight=0.5)
    terms = alone.terms(**far)
    assert terms.policy == 0
    total = alone.total(terms, 7)
    assert total.isfinite() and torch.autograd.grad(total, x["logp"])[0].isfinite().all()


def test_gap_multiplier_never_overflows_nor_flips(batch):
    """A teacher that is certain is worth 1.2 or 0.8, no more."""
    for a in (-2.0, 0.0, 2.0):
        for gap in (-5000.0, -0.1, 0.0, 0.1, 5000.0):
            one, row = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
            t = Tokens(one, one, one, one + gap, one + a, one > 1, one, row)
            m = float(GapMultiplier().multiplier(t))
            want = min(max(math.exp(min(gap * ((a > 0) - (a < 0)), 700.0)), 0.8), 1.2)
            assert m == pytest.approx(want)
