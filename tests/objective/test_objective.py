"""GRPO's pieces by hand, and what `Objective` may and may not look at, for every algorithm."""

from __future__ import annotations

import itertools
import math
import random
from statistics import mean, stdev
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
    float32_rewards,
    group_advantages,
)

KEY = r"^model\.objective"

# -- GRPO ---------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("size", range(2, 9))
def test_usual_rewards_are_float32_as_they_are(size):
    """Their advantages are those of the recorded runs to the bit."""
    for values in ((0.0, 1.0), (0.0, 1 / 3, 2 / 3, 1.0), (-3.0, 0.1, 7.5)):
        rewards = list(itertools.islice(itertools.product(values, repeat=size), 5000))
        want = group_advantages(torch.tensor(rewards))
        assert group_advantages(float32_rewards(torch.tensor(rewards, dtype=torch.float64))).equal(want)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e8, -1e12])
@pytest.mark.parametrize("step", [1.0, 0.1])
def test_rewards_far_from_zero_are_told_apart(offset, step):
    rewards = torch.tensor([[offset, offset + step, offset, offset], [offset] * 4], dtype=torch.float64)
    got, want = group_advantages(float32_rewards(rewards)), group_advantages(torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0] * 4]))
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-6)  # of 0.1 float64 keeps three digits beside 1e12
    assert got[1].eq(0).all()


def test_what_only_rounding_tells_apart_is_equal():
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3], [1e16, 1e16 + 2, 1e16]], dtype=torch.float64)
    assert (rewards[:, :1] != rewards).any(-1).all() and group_advantages(float32_rewards(rewards)).eq(0).all()
    huge = torch.tensor([[1e37, -1e37, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(float32_rewards(huge)), torch.tensor([[1.0, -1.0, 0.0]]))


def test_which_rewards_are_measured_from_the_smallest():
    """Those of more than 1,024 times their spread; equal are those that differ by 2^-48 of their size or less. Each group by itself."""
    as_they_are = [[100.0, 101.0], [2000.0, 2002.0], [1023.0, 1024.0], [0.0, -3.0]]
    from_the_smallest = [[1024.0, 1025.0], [-2000.0, -2001.0], [1.0 - 2**-47, 1.0], [1.0 - 2**-48, 1.0], [2.5, 2.5]]
    want = [*as_they_are, [0.0, 1.0], [1.0, 0.0], [0.0, 2**-47], [0.0, 0.0], [0.0, 0.0]]
    found = float32_rewards(torch.tensor([*as_they_are, *from_the_smallest], dtype=torch.float64))
    assert found.tolist() == want and found.dtype == torch.float32


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match=r"data\.group_size"):
        group_advantages(torch.ones(3, 1))


# -- settings -------------------------------------------------------------------------------------------------------------------


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


# -- what counts, for every algorithm ---------------------------------------------------------------------------------------------


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


def test_the_weight_is_that_of_iteration_0_unless_told(batch):
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


# -- a signal of one's own ----------------------------------------------------------------------------------------------------------


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


# -- metrics and overflow -------------------------------------------------------------------------------------------------------------


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


def test_rlsd_never_overflows_nor_flips(batch):
    """A teacher that is certain is worth 1.2 or 0.8, no more."""
    for a in (-2.0, 0.0, 2.0):
        for gap in (-5000.0, -0.1, 0.0, 0.1, 5000.0):
            one, row = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
            t = Tokens(one, one, one, one + gap, one + a, one > 1, one, row)
            m = float(GapMultiplier().multiplier(t))
            want = min(max(math.exp(min(gap * ((a > 0) - (a < 0)), 700.0)), 0.8), 1.2)
            assert m == pytest.approx(want)


# -- gates ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gaps", "success", "want"),
    [
        ([0.2, 0.2], True, 1),
        ([0.2, 0.2], False, -1),
        ([-0.2, -0.2], True, -1),
        ([-0.2, -0.2], False, 1),
        ([0.04, 0.04], True, 0),
        ([0.05, 0.05], True, 0),  # up to and including
        ([-0.04, 0.0], False, 0),
        ([100.0, -2.0], True, 1),
        ([100.0, -2.0, -2.0], True, -1),  # one token counts for 3 nats at most
        ([-100.0, 2.0, 2.0], True, 1),
    ],
)
def test_outcome_gate(gaps, success, want):
    """One word for a trajectory; another trajectory between its tokens changes nothing."""
    d = torch.tensor([x for g in gaps for x in (g, -7.0)], dtype=torch.float64)
    row = torch.tensor([0, 2] * len(gaps))
    zero = torch.zeros_like(d)
    t = Tokens(zero, zero, zero, d, zero, torch.where(row == 0, success, True), zero, row)
    assert OutcomeGate()(t)[row == 0].tolist() == [want] * len(gaps) and OutcomeGate()(t)[row == 2].eq(-1).all()


def test_positive_gate_leaves_out_the_average():
    a = torch.tensor([-1.0, -1e-9, 0.0, 1e-9, 1.0])
    zero, row = torch.zeros(5), torch.arange(5)
    assert PositiveGate()(Tokens(zero, zero, zero, zero, a, zero > 0, zero, row)).tolist() == [0, 0, 0, 1, 1]


def test_trace_gate_ends_where_the_teacher_would_not_have_gone():
    """Each trajectory begins at 1; a step that the teacher likes better makes up for nothing; one that it rules out ends it."""
    d = torch.tensor([0.0, 2.0, -1.0, 3.0, -0.5, 9.0, -math.inf, 1.0, -math.inf, 2.0, -0.25], dtype=torch.float64)
    row, zero = torch.tensor([0] * 6 + [3] * 4 + [4]), torch.zeros_like(d)
    want = [1, 1, 1, math.exp(-1), math.exp(-1), math.exp(-1.5), 1, 0, 0, 0, 1]
    assert TraceGate()(Tokens(zero, zero, zero, d, zero, zero > 0, zero, row)).tolist() == pytest.approx(want, abs=1e-15)
