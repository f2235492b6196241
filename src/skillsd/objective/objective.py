"""The objective L = L_GRPO + what the teacher's signal adds, token means over the batch's N action tokens (Eq. 3-14).

No entropy bonus, no KL to a reference. Sums and N are kept as two numbers, so that micro-batches add up to the one-batch gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skillsd.objective.grpo import clipped_policy_loss
from skillsd.objective.sampled_reverse_kl import SampledReverseKL
from skillsd.objective.signal import Gate, Signal, Tokens, k3, per_token

PLACEMENTS = ("loss", "advantage", "multiplier")


@dataclass(frozen=True)
class Terms:
    """What a micro-batch comes to. Sums are over its action tokens: divide by the whole batch's N.

    Args:
        policy: Sum of GRPO's loss (times policy_weight), scalar with gradient.
        distillation: Sum of what the signal adds to it, lambda included, scalar with gradient.
        metrics: Name -> sum, detached.
        logp: The student's log-probs with gradient, [B, T], nats.
        gap: log pi_tea - log pi_stu, [B, T], nats; 0 in rows that no teacher scores.
        max_drift: Largest absolute difference of log pi now and log pi at the rollout, of an action token, nats, scalar.
        teacher_s: Seconds of teacher scoring, where they are measured.
    """

    policy: Tensor
    distillation: Tensor
    metrics: dict[str, Tensor]
    logp: Tensor
    gap: Tensor
    max_drift: Tensor
    teacher_s: float = 0.0


@dataclass
class Objective:
    """Which terms make the loss. Defaults are the paper's (Table 5)."""

    policy_weight: float = 1.0
    """Weight of the GRPO term; 0 leaves distillation alone (on-policy distillation without reward)."""
    clip_low: float = 0.2
    """The ratio's lower bound is 1 - clip_low."""
    clip_high: float = 0.28
    """The ratio's upper bound is 1 + clip_high."""
    distillation_weight: float = 0.001
    """lambda of Eq. 14 (w of OPID, l of RLSD) at the start; 0 is plain GRPO and computes no teacher."""
    weight_steps: int = 0
    """Iterations over which lambda moves linearly to weight_end; 0 keeps it."""
    weight_end: float = 0.0
    """lambda after weight_steps iterations."""
    loss: Signal | None = None
    """Signal that adds a loss; null, with the next two null as well, is SampledReverseKL."""
    advantage: Signal | None = None
    """Signal that is added to the advantage."""
    multiplier: Signal | None = None
    """Signal that multiplies the advantage."""
    gate: Gate | None = None
    """Weight of each token's signal; null is 1 everywhere."""
    group_filter: Literal["none", "zero_variance"] = "none"
    """`zero_variance` leaves out groups whose members all got the same reward (RAGEN-2), from both terms and from N."""

    def __post_init__(self) -> None:
        where = "model.objective"
        for key in ("policy_weight", "clip_low", "clip_high", "distillation_weight", "weight_steps", "weight_end"):
            if not getattr(self, key) >= 0:  # also catches nan
                raise ValueError(f"{where}.{key} is {getattr(self, key)}: give 0 or more.")
        if not self.policy_weight and not self.distillation_weight and not (self.weight_steps and self.weight_end):
            raise ValueError(f"{where}: policy_weight and distillation_weight are both 0, which trains nothing: raise one.")
        if self.group_filter not in ("none", "zero_variance"):
            raise ValueError(f"{where}.group_filter is {self.group_filter}: give none or zero_variance.")
        given = [p for p in PLACEMENTS if getattr(self, p) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{where}: {' and '.join(given)} are both set. One signal in two places counts the same evidence twice, and no "
                "weight says which of them worked: set all but one to null."
            )
        self.placement = given[0] if given else "loss"
        self.signal: Signal = getattr(self, self.placement) or SampledReverseKL()
        name = type(self.signal).__name__
        if self.signal.distributional and self.placement != "loss":
            raise ValueError(
                f"{where}.{self.placement} is {name}, which compares whole distributions (top-k or full vocabulary). Its value depends on "
                "the state alone, not on the token that was sampled, so as an advantage its expected gradient is zero: give it as "
                f"{where}.loss, or give a signal of the sampled token, such as GapAdvantage."
            )
        if not self.signal.writes(self.placement):
            can = [p for p in PLACEMENTS if self.signal.writes(p)]
            cure = f"give it as {' or '.join(can)}" if can else f"it has no method {' or '.join(PLACEMENTS)} of its own: write one"
            raise ValueError(f"{where}.{self.placement}: {name} is no {self.placement}: {cure}.")
        if self.placement != "loss" and not self.policy_weight:
            raise ValueError(f"{where}: policy_weight is 0, so {where}.{self.placement} has nothing to act on: raise it or use loss.")
        if self.placement == "multiplier" and max(self.distillation_weight, self.weight_end) > 1:
            raise ValueError(f"{where}: a multiplier's distillation_weight and weight_end are shares: give at most 1, or signs may change.")

    def weight(self, step: int) -> float:
        """lambda at iteration `step` (0-based)."""
        if not self.weight_steps:
            return self.distillation_weight
        progress = min(1.0, step / self.weight_steps)
        return (1 - progress) * self.distillation_weight + progress * self.weight_end

    def terms(
        self, logp: Tensor, logp_old: Tensor, logp_teacher: Tensor, mask: Tensor, advantage: Tensor, *, weight: float | None = None,
        logp_behaviour: Tensor | None = None, teacher_mask: Tensor | None = None, success: Tensor | None = None,
        return_gap: Tensor | None = None, divergence: Tensor | None = None,
    ) -> Terms:  # fmt: skip
        """Both loss terms of a micro-batch.

        Args:
            logp: Student's log-probs with gradient, float32 [B, T].
            logp_old: Log-probs under the student of the rollout, [B, T].
            logp_teacher: Teacher's, [B, T]; equal to logp.detach() in rows without one.
            mask: Action mask, bool [B, T]: the one made when sampling.
            advantage: [B].
            weight: lambda; None is that of iteration 0.
            logp_behaviour: Log-probs under whichever adapter sampled, [B, T]; None is `logp_old`.
            teacher_mask: Rows that a teacher scores: it has a context or other weights, bool [B]; None is all.
            success: Rows that solved their task, bool [B]; None is none.
            return_gap: [B], see `Tokens`; None is nan.
            divergence: The divergence of a distributional signal, [B, T] with gradient; None for the other signals.
        """
        lam = self.weight(0) if weight is None else weight

        def rows(x: Tensor | None, otherwise: float | bool) -> Tensor:
            x = torch.full(advantage.shape, otherwise, device=advantage.device) if x is None else x
            return x[:, None].expand_as(mask)[mask]

        t = Tokens(
            logp[mask], logp_old[mask], (logp_old if logp_behaviour is None else logp_behaviour)[mask], logp_teacher[mask],
            rows(advantage, 0.0), rows(success, False), rows(return_gap, float("nan")), mask.nonzero()[:, 0],
            None if divergence is None else divergence[mask],
        )  # fmt: skip
        has_teacher = rows(teacher_mask, True)  # [n]
        plain, clipped = clipped_policy_loss(t.logp, t.logp_old, t.advantage, self.clip_low, self.clip_high)
        policy = self.policy_weight * plain.sum() if self.policy_weight else plain.new_zeros(())  # 0 * inf would be nan
        distillation, shift = policy.new_zeros(()), torch.zeros_like(t.advantage)
        if lam and has_teacher.any():
            g = lam if self.gate is None else lam * per_token(self.gate(t), t, self.gate).detach()
            if self.placement == "loss":
                distillation = torch.where(has_teacher, g * per_token(self.signal.loss(t), t, self.signal), 0.0).sum()
            else:
                said = per_token(getattr(self.signal, self.placement)(t), t, self.signal)
                shift = g * (said if self.placement == "advantage" else t.advantage * (said - 1))
                shift = torch.where(has_teacher, shift, 0.0).detach()
                shaped, clipped = clipped_policy_loss(t.logp, t.logp_old, t.advantage + shift, self.clip_low, self.clip_high)
                distillation = self.policy_weight * (shaped - plain).sum()
        with torch.no_grad():
            metrics = {
                "gap": t.gap.sum(),
                "gap_sq": t.gap.square().sum(),
                "teacher_health": (t.advantage * t.gap).sum(),
                "k3": k3(-t.gap).sum(),
                "shift": shift.abs().sum(),
                "clip_fraction": clipped.float().sum(),
                "logp_drift": (t.logp - t.logp_old).abs().sum(),
            }
            max_drift = torch.where(mask, (logp - logp_old).abs(), 0.0).max()
        return Terms(policy, distillation, metrics, logp, (logp_teacher - logp).detach(), max_drift)

    def total(self, terms: Terms, n: int) -> Tensor:
        """(policy + distillation) / N; without gradient where neither has one."""
        return (terms.policy + terms.distillation) / n
