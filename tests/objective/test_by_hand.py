"""Every algorithm and gate through `Objective`, against its formulas written out token by token without tensors: values and gradients."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from skillsd.objective import (
    FullReverseKL,
    GapAdvantage,
    GapMultiplier,
    GatedLogRatio,
    Objective,
    OutcomeGate,
    PositiveGate,
    SampledReverseKL,
    SigmoidGate,
    TopKJSD,
    TraceGate,
    TwoViewKL,
    UnweightedK3,
)

V = 6
Loss = tuple[float, list[float]]
"""A value and its derivatives in the student's logits."""


@dataclass
class Token:
    """An action token in plain numbers: log-probs of student and teacher over the vocabulary, what was sampled and where."""

    p: list[float]
    q: list[float]
    y: int
    old: float
    behaviour: float
    a: float
    success: bool
    return_gap: float
    has_teacher: bool
    mates: list[float]
    """d of all action tokens of its trajectory."""
    place: int
    """Its index among them."""

    @property
    def ell(self) -> float:
        return self.p[self.y] - self.q[self.y]

    @property
    def rho(self) -> float:
        return math.exp(self.p[self.y] - self.behaviour)

    def along(self, coefficient: float) -> list[float]:
        """coefficient * d log p(y) / dz."""
        return [coefficient * ((j == self.y) - math.exp(x)) for j, x in enumerate(self.p)]


def by_token(batch: Any) -> dict[tuple[int, int], Token]:
    p, q = batch.logits.detach().log_softmax(-1).tolist(), batch.teacher.tolist()
    out = {}
    for b, t in batch.mask.nonzero().tolist():
        y = int(batch.tokens[b, t])
        numbers = [float(x) for x in (batch.logp_old[b, t], batch.logp_behaviour[b, t], batch.advantage[b])]
        out[b, t] = Token(
            p[b][t], q[b][t], y, *numbers, bool(batch.success[b]), float(batch.return_gap[b]), bool(batch.teacher_mask[b]),
            [q[b][s][int(batch.tokens[b, s])] - p[b][s][int(batch.tokens[b, s])] for s in batch.mask[b].nonzero()[:, 0].tolist()],
            int(batch.mask[b, :t].sum()),
        )  # fmt: skip
    return out


# -- the algorithms ---------------------------------------------------------------------------------------------------------


def skill_sd(t: Token) -> Loss:
    return t.rho * (math.exp(-t.ell) - 1 + t.ell), t.along(t.rho * t.ell)


def score(t: Token) -> Loss:
    return t.rho * t.ell * t.p[t.y], t.along(t.rho * t.ell)


def naive_k3(t: Token) -> Loss:
    return math.exp(-t.ell) - 1 + t.ell, t.along(1 - math.exp(-t.ell))


def sdar(beta: float) -> Callable[[Token], Loss]:
    def loss(t: Token) -> Loss:
        gate = 1 / (1 + math.exp(beta * t.ell))
        return -gate * t.ell, t.along(-gate)

    return loss


def sdpg(t: Token) -> Loss:
    kl = sum(math.exp(x) * (x - z) for x, z in zip(t.p, t.q, strict=True))
    return kl, [math.exp(x) * (x - z - kl) for x, z in zip(t.p, t.q, strict=True)]


def sdpo(k: int, alpha: float, ratio_clip: float = 2.0) -> Callable[[Token], Loss]:
    def loss(t: Token) -> Loss:
        # Bucket j of token j: one each for the student's k likeliest, the last for all others.
        top = sorted(range(V), key=lambda j: -t.p[j])[:k]
        bucket = [top.index(j) if j in top else k for j in range(V)]
        P, Q = ([sum(math.exp(x[j]) for j in range(V) if bucket[j] == b) for b in range(min(k + 1, V))] for x in (t.p, t.q))
        pairs = list(zip(P, Q, strict=True))
        if alpha == 0:  # KL(q || p)
            value, slope = sum(q * math.log(q / p) for p, q in pairs), [-q / p for p, q in pairs]
        elif alpha == 1:  # KL(p || q)
            value, slope = sum(p * math.log(p / q) for p, q in pairs), [math.log(p / q) for p, q in pairs]
        else:
            M = [(1 - alpha) * p + alpha * q for p, q in pairs]
            value = sum((1 - alpha) * p * math.log(p / m) + alpha * q * math.log(q / m) for (p, q), m in zip(pairs, M, strict=True))
            slope = [(1 - alpha) * math.log(p / m) for p, m in zip(P, M, strict=True)]  # dJ/dP, to a constant
        mean = sum(p * s for p, s in zip(P, slope, strict=True))
        weight = min(t.rho, ratio_clip)
        return weight * value, [weight * math.exp(t.p[j]) * (slope[bucket[j]] - mean) for j in range(V)]

    return loss


def ucob_weight(gap: float, least: float = 0.05, full: float = 0.2, most: float = 2.0) -> float:
    return min(gap / full, most) if gap > least else 0.0  # nan > x is False


def ucob(k: int) -> Callable[[Token], Loss]:
    def loss(t: Token) -> Loss:
        top = sorted(range(V), key=lambda j: -t.q[j])[:k]
        own, other = (sum(math.exp(x[j]) for j in top) for x in (t.p, t.q))
        p, q = ({j: math.exp(x[j]) / total for j in top} for x, total in ((t.p, own), (t.q, other)))
        w = ucob_weight(t.return_gap)
        value = w * sum(q[j] * math.log(q[j] / p[j]) for j in top)
        return value, [w * (p[j] - q[j]) if j in top else 0.0 for j in range(V)]

    return loss


def opid(t: Token) -> float:
    return t.q[t.y] - t.old


def rlsd(clip: float) -> Callable[[Token], float]:
    def shift(t: Token) -> float:
        sign = (t.a > 0) - (t.a < 0)
        return t.a * (min(max(math.exp(-sign * t.ell), 1 - clip), 1 + clip) - 1)

    return shift


LOSSES: dict[str, tuple[Any, Callable[[Token], Loss]]] = {
    "SkillSD k3": (SampledReverseKL(), skill_sd),
    "SkillSD score": (SampledReverseKL("score"), score),
    "UnweightedK3": (UnweightedK3(), naive_k3),
    "GatedLogRatio": (GatedLogRatio(), sdar(5.0)),
    "SDAR beta 0": (GatedLogRatio(beta=0.0), sdar(0.0)),
    "FullReverseKL": (FullReverseKL(), sdpg),
    **{f"SDPO k {k} alpha {a}": (TopKJSD(k, a), sdpo(k, a)) for k in (1, 3, 5, 6, 100) for a in (0.0, 0.3, 0.5, 1.0)},
    "SDPO ratio clip": (TopKJSD(3, 0.5, ratio_clip=1.1), sdpo(3, 0.5, 1.1)),
    "TwoViewKL": (TwoViewKL(), ucob(32)),
    "UCOB k 3": (TwoViewKL(k=3), ucob(3)),
}
ADVANTAGES: dict[str, tuple[Any, Callable[[Token], float]]] = {"GapAdvantage": (GapAdvantage(), opid)}
MULTIPLIERS: dict[str, tuple[Any, Callable[[Token], float]]] = {
    "GapMultiplier": (GapMultiplier(), rlsd(0.2)),
    "RLSD clip 0.5": (GapMultiplier(clip=0.5), rlsd(0.5)),
}
PLACED = {
    name: (placement, *signal)
    for placement, signals in {"loss": LOSSES, "advantage": ADVANTAGES, "multiplier": MULTIPLIERS}.items()
    for name, signal in signals.items()
}  # fmt: skip


# -- the gates --------------------------------------------------------------------------------------------------------------


def outcome(t: Token) -> float:
    mean = sum(min(max(d, -3.0), 3.0) for d in t.mates) / len(t.mates)
    if abs(mean) <= 0.3:
        return 0.0
    return 1.0 if (mean > 0) == t.success else -1.0


def trace(t: Token) -> float:
    return math.prod(min(1.0, math.exp(d)) for d in t.mates[: t.place])


GATES: dict[str, tuple[Any, Callable[[Token], float]]] = {
    "no gate": (None, lambda t: 1.0),
    "sigmoid": (SigmoidGate(), lambda t: 1 / (1 + math.exp(5 * t.ell))),
    "sigmoid beta 1": (SigmoidGate(beta=1.0), lambda t: 1 / (1 + math.exp(t.ell))),
    "positive": (PositiveGate(), lambda t: float(t.a > 0)),
    "outcome": (OutcomeGate(indifference=0.3), outcome),
    "trace": (TraceGate(), trace),
}


# -- Eq. 14 -----------------------------------------------------------------------------------------------------------------


def policy_loss(t: Token, a: float) -> Loss:
    """GRPO's, case by case."""
    r = math.exp(t.p[t.y] - t.old)
    if a > 0 and r > 1.28:
        return -1.28 * a, [0.0] * V
    if a < 0 and r < 0.8:
        return -0.8 * a, [0.0] * V
    return -r * a, t.along(-r * a)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", PLACED)
def test_total_and_gradient(batch, name, gate):
    """lambda is far from the paper's, so that neither term hides the other."""
    lam = 0.375
    placement, signal, reference = PLACED[name]
    weight_of_policy = 0.7
    value, want = 0.0, torch.zeros_like(batch.logits)
    for (b, s), t in by_token(batch).items():
        g = lam * GATES[gate][1](t) * t.has_teacher
        if placement == "loss":
            (x, dx), (y, dy) = policy_loss(t, t.a), reference(t)
            value += weight_of_policy * x + g * y
            gradient = [weight_of_policy * i + g * j for i, j in zip(dx, dy, strict=True)]
        else:
            x, dx = policy_loss(t, t.a + g * reference(t))
            value += weight_of_policy * x
            gradient = [weight_of_policy * i for i in dx]
        want[b, s] = torch.tensor(gradient, dtype=torch.float64)
    n = int(batch.mask.sum())
    objective = Objective(policy_weight=weight_of_policy, distillation_weight=lam, gate=GATES[gate][0], **{placement: signal})
    loss = batch.loss(objective)
    assert loss.item() == pytest.approx(value / n, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, batch.logits)[0], want / n, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_alone(batch, name):
    """Without the policy loss: on-policy distillation without a reward."""
    signal, reference = LOSSES[name]
    want, n = torch.zeros_like(batch.logits), int(batch.mask.sum())
    for (b, s), t in by_token(batch).items():
        want[b, s] = t.has_teacher * torch.tensor(reference(t)[1], dtype=torch.float64)
    got = batch.gradient(Objective(policy_weight=0.0, distillation_weight=1.0, loss=signal))
    torch.testing.assert_close(got, want / n, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_clipped_policy_loss_without_a_teacher(batch, sign):
    batch = batch.replace(advantage=sign * batch.advantage)
    want, value = torch.zeros_like(batch.logits), 0.0
    for (b, s), t in by_token(batch).items():
        x, gradient = policy_loss(t, t.a)
        value, want[b, s] = value + x, torch.tensor(gradient, dtype=torch.float64)
    n, objective = int(batch.mask.sum()), Objective(distillation_weight=0.0)
    assert batch.loss(objective).item() == pytest.approx(value / n, rel=1e-12)
    torch.testing.assert_close(batch.gradient(objective), want / n, rtol=1e-12, atol=1e-15)


def test_the_batch_visits_every_branch(batch):
    """Else the comparisons above would say less than they seem to."""
    tokens = by_token(batch).values()
    ratio = Counter((t.a > 0, (r > 1.28) - (r < 0.8)) for t in tokens for r in [math.exp(t.p[t.y] - t.old)])
    assert len(ratio) == 6
    has_teacher = [t for t in tokens if t.has_teacher]
    assert 0 < len(has_teacher) < len(tokens)
    assert {(t.rho > 2) - (t.rho < 1.1) for t in has_teacher} == {-1, 0, 1}
    gap = Counter("none" if math.isnan(t.return_gap) else (t.return_gap > 0.05) + (t.return_gap > 0.4) for t in has_teacher)
    assert set(gap) == {"none", 0, 1, 2}
    scale = Counter((t.a > 0, (x > 1.5) - (x < 0.5)) for t in has_teacher for x in [math.exp(math.copysign(1, t.a) * -t.ell)])
    assert len(scale) == 6
    assert {outcome(t) for t in has_teacher} == {-1.0, 0.0, 1.0} and any(abs(d) > 3 for t in has_teacher for d in t.mates)
    assert {t.success for t in has_teacher} == {True, False}
