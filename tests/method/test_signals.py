"""Each distillation signal in an update: its gradient is that of a direct computation on full logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.method.by_hand import FullRow, gradient, kl, rows_from_full_logits
from tests.method.groups import make_groups, sampled_by, with_own_prompts
from tests.tolerance import close
from tests.training import flat, same_gradient
from torch import Tensor

from skillsd.objective import (
    FullReverseKL,
    GapAdvantage,
    GapMultiplier,
    Objective,
    OutcomeGate,
    PositiveGate,
    SigmoidGate,
    TopKJSD,
    TwoViewKL,
)
from skillsd.policy import Policy
from skillsd.trajectory import TrajectoryGroup


def top_jsd(row: FullRow, k: int, alpha: float) -> Tensor:
    """SDPO's, on probabilities in float64, position by position."""
    out = []
    for p, q in zip(row.student.double().exp(), row.teacher.double().exp(), strict=True):
        top = sorted(range(len(p)), key=lambda i: -p[i].item())[:k]
        p, q = (torch.cat([x[top], (x.sum() - x[top].sum())[None]]) for x in (p, q))
        m = (1 - alpha) * p + alpha * q
        out.append((1 - alpha) * kl(p, m) + alpha * kl(q, m))
    return torch.stack(out)


SIGNALS: dict[str, tuple[Any, Callable[[FullRow], Tensor]]] = {
    "sdpg": (FullReverseKL(), lambda r: kl(r.student.double().exp(), r.teacher.double().exp())),
    "sdpo": (TopKJSD(k=4, alpha=0.3), lambda r: r.rho.detach().clamp_max(2.0) * top_jsd(r, 4, 0.3)),
}


def with_rows_without_teacher(policy: Policy) -> tuple[list[TrajectoryGroup], Callable[[FullRow], bool]]:
    """Groups whose members have prompts of their own, and which rows have a teacher: one has no context, another's is too long."""
    first, second = with_own_prompts(make_groups(policy))
    first = replace(first, teacher_prompts=(*first.teacher_prompts[:2], first.student_prompts[2]))
    second = replace(second, teacher_prompts=(second.teacher_prompts[0] * 12, *second.teacher_prompts[1:]))
    policy.context_length = limit = 40
    lengths = {(g.task.task_id, k): len(g.teacher_prompts[k]) + len(g.trajectories[k].token_ids) for g in (first, second) for k in range(3)}
    assert lengths["t1", 0] > limit and sum(n <= limit for n in lengths.values()) == 5
    return [first, second], lambda r: r.group.has_teacher_context(r.member) and lengths[r.group.task.task_id, r.member] <= limit


@pytest.mark.parametrize("name", SIGNALS)
def test_the_gradient_of_a_divergence_between_whole_distributions(make_policy, step, name):
    """Their gradient is that of a direct computation on full logits, whatever the micro-batches; rows without a teacher add nothing."""
    signal, divergence = SIGNALS[name]
    policy = make_policy(head_chunk=3)
    policy.sync()
    with torch.no_grad():  # the student has moved on a little
        for p in policy.student_parameters():
            p.add_(0.05 * torch.randn_like(p))
    groups, has_teacher = with_rows_without_teacher(policy)
    rows = rows_from_full_logits(policy, groups)
    n = sum(len(r.picked) for r in rows)
    grpo = sum(r.grpo().sum() for r in rows) / n
    added = 0.5 * sum(divergence(r).sum() for r in rows if has_teacher(r)) / n
    good = 0.5 * sum(divergence(r).sum() for r in rows if has_teacher(r) and r.advantage > 0) / n
    each, want = [gradient(policy, x.float()) for x in (grpo, added)], gradient(policy, (grpo + good).float())
    not_scored = groups[0].trajectories[2].token_ids
    for tokens in (1, 60, 120, 4096):
        steps = step(policy, groups, objective=Objective(distillation_weight=0.5, loss=signal), micro_batch_tokens=tokens, same=True)
        m = steps.metrics[0]
        same_gradient(steps.grads[0], [a + b for a, b in zip(*each, strict=True)])
        assert m["loss/distillation"] == pytest.approx(added.item(), rel=1e-4)
        assert m["grad_norm/distillation"] == pytest.approx(float(flat(each[1]).norm()), rel=1e-3) and m["teacher/dropped_rows"] == 1
        assert len(steps.teacher_inputs[0]) == 4 and not_scored not in [s.token_ids for s in steps.teacher_inputs[0]]
    gated = step(policy, groups, objective=Objective(distillation_weight=0.5, loss=signal, gate=PositiveGate()), same=True)
    same_gradient(gated.grads[0], want)
    assert 0 < good.item() < added.item()


def two_views(policy: Policy, rewards: Sequence[Sequence[float]], skills: Sequence[int | None]) -> list[TrajectoryGroup]:
    """The second half of each group acted with the skill in front; each half's teacher is the other view."""
    groups = []
    for g in make_groups(policy, rewards, skills):
        plain, skilled = g.student_prompts[0], g.teacher_prompts[0]
        acted, other = ((plain,) * 2 + (skilled,) * 2), ((skilled,) * 2 + (plain,) * 2)
        played = tuple(sampled_by(policy, t, "student", p, 0.1) for t, p in zip(g.trajectories, acted, strict=True))
        groups.append(replace(g, trajectories=played, student_prompts=acted, teacher_prompts=other))
    return groups


def test_the_view_that_fared_better_teaches_the_other(make_policy, step):
    """UCOB's weights come from the halves' mean rewards, in either direction; its divergence is the other view's top K."""
    policy = make_policy(head_chunk=3)
    rewards = ((1.0, 0.0, 0.5, 0.0), (0.0, 0.0, 1.0, 1.0), (0.5, 0.0, 0.54, 0.0), (1.0, 1.0, 0.0, 0.0))
    groups = two_views(policy, rewards, (3, 8, 9, None))
    weights = {("t0", 2): 1.25, ("t0", 3): 1.25, ("t1", 0): 2.0, ("t1", 1): 2.0}  # t2's gap is too small, and t3 has no skill
    rows = rows_from_full_logits(policy, groups)
    n, grpo = sum(len(r.picked) for r in rows), sum(r.grpo().sum() for r in rows)
    added = torch.zeros(())
    for r in rows:
        top = r.teacher.topk(6).indices
        q, p = (x.gather(-1, top).exp() for x in (r.teacher, r.student))
        gate = torch.sigmoid(-5 * r.ell.detach())
        added = added + (weights.get((r.group.task.task_id, r.member), 0.0) * gate * kl(q / q.sum(-1, True), p / p.sum(-1, True))).sum()
    want = gradient(policy, (grpo + 0.1 * added) / n)
    objective = Objective(distillation_weight=0.1, loss=TwoViewKL(k=6), gate=SigmoidGate(5.0))
    for tokens in (1, 100, 4096):
        steps = step(policy, groups, objective=objective, micro_batch_tokens=tokens)
        same_gradient(steps.grads[0], want)
        assert steps.metrics[0]["loss/distillation"] == pytest.approx((0.1 * added / n).item(), rel=1e-4)
    assert added.item() > 0


def test_a_gate_that_knows_the_outcome(make_policy, step):
    """Each row's own success and its own mean gap, whatever micro-batch it is in."""
    policy = make_policy()
    groups = with_own_prompts(make_groups(policy))
    rows = rows_from_full_logits(policy, groups)
    n, grpo, added, signs = sum(len(r.picked) for r in rows), 0.0, 0.0, set()
    for r in rows:
        gap = (-r.ell.detach()).clamp(-3, 3).mean().item()
        sign = (1 if gap > 0.05 else -1 if gap < -0.05 else 0) * (1 if r.group.trajectories[r.member].success else -1)
        signs.add((sign, r.group.trajectories[r.member].success))
        grpo, added = grpo + r.grpo().sum(), added + sign * kl(r.student.double().exp(), r.teacher.double().exp()).sum()
    assert len(signs) > 2  # for and against, of solved ones and others
    want = gradient(policy, ((grpo + 0.5 * added) / n).float())
    objective = Objective(distillation_weight=0.5, loss=FullReverseKL(), gate=OutcomeGate())
    for tokens in (1, 60, 4096):
        same_gradient(step(policy, groups, objective=objective, micro_batch_tokens=tokens).grads[0], want)


@pytest.mark.parametrize("placement", ["advantage", "multiplier"])
def test_a_signal_in_the_advantage_goes_through_the_clipped_ratio(make_policy, step, placement):
    """OPID adds w (log tea - log old), RLSD multiplies; both through GRPO's ratio and bounds, and in rows with a teacher alone."""
    policy = make_policy()
    groups, has_teacher = with_rows_without_teacher(policy)

    def shift(r: FullRow) -> Tensor:
        if placement == "advantage":
            return 0.5 * (r.logp(r.teacher) - r.old)
        return 0.5 * r.advantage * ((math.copysign(1, r.advantage) * -r.ell).exp().clamp(0.8, 1.2) - 1)

    rows = rows_from_full_logits(policy, groups)
    n = sum(len(r.picked) for r in rows)
    shifts = [shift(r).detach() if has_teacher(r) else torch.zeros(len(r.picked)) for r in rows]
    loss = sum(r.grpo(x).sum() for r, x in zip(rows, shifts, strict=True)) / n
    plain = sum(r.grpo().sum() for r in rows) / n
    signal = {"advantage": GapAdvantage(), "multiplier": GapMultiplier(clip=0.2)}[placement]
    objective, want = Objective(distillation_weight=0.5, **{placement: signal}), gradient(policy, loss)
    for tokens in (1, 4096):
        # As if the adapters were one: then a row without context needs no teacher.
        steps = step(policy, groups, objective=objective, micro_batch_tokens=tokens, same=True)
        m = steps.metrics[0]
        same_gradient(steps.grads[0], want)
        close((m["loss/total"], m["loss/policy"]), (loss.item(), plain.item()))
        close(m["loss/distillation"], (loss - plain).item())
        n_taught = sum(len(r.picked) for r in rows if has_teacher(r))
        assert (
            m["teacher/shift"] == pytest.approx(float(sum(x.abs().sum() for x in shifts)) / n_taught, rel=1e-4) and m["teacher/shift"] > 0
        )
