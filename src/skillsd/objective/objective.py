"""The objective L = L_GRPO + lambda * L_SDL, both token means over the batch's N action tokens (Eq. 3-14).

No entropy bonus, no KL to a reference. Sums and N are kept apart, so that micro-batches add up to the one-batch gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skillsd.objective.distillation import ESTIMATORS, k3
from skillsd.objective.policy_loss import clipped_policy_loss


@dataclass(frozen=True)
class Terms:
    """Sums over action tokens of one micro-batch: divide by the whole batch's N.

    Args:
        policy: Sum of the policy loss, scalar with gradient.
        distillation: Sum of the distillation loss, scalar with gradient.
        metrics: Name -> sum, detached.
    """

    policy: Tensor
    distillation: Tensor
    metrics: dict[str, Tensor]


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
    """lambda of Eq. 14; 0 is plain GRPO and computes no teacher."""
    estimator: Literal["skill_sd", "score"] = "skill_sd"
    """Form of the distillation loss; both have the same gradient (objective/distillation.py)."""

    def __post_init__(self) -> None:
        for key in ("policy_weight", "clip_low", "clip_high", "distillation_weight"):
            if not getattr(self, key) >= 0:  # also catches nan
                raise ValueError(f"model.init_args.objective.{key} is {getattr(self, key)}: give 0 or more.")
        if not self.policy_weight and not self.distillation_weight:
            raise ValueError(
                "model.init_args.objective: policy_weight and distillation_weight are both 0, which trains nothing: raise one."
            )
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"model.init_args.objective.estimator is {self.estimator}: one of {', '.join(ESTIMATORS)}.")

    def terms(self, logp: Tensor, logp_old: Tensor, logp_teacher: Tensor, mask: Tensor, advantage: Tensor) -> Terms:
        """Both loss terms of a micro-batch.

        Args:
            logp: Student's log-probs with gradient, float32 [B, T].
            logp_old: Recorded at rollout, [B, T].
            logp_teacher: Teacher's, [B, T]; equal to logp.detach() in rows without a skill.
            mask: Action mask, bool [B, T]: the one made when sampling.
            advantage: [B].
        """
        m, adv = mask, advantage[:, None].expand_as(logp)
        logp, logp_old, logp_teacher, adv = logp[m], logp_old[m], logp_teacher[m], adv[m]
        policy, clipped = clipped_policy_loss(logp, logp_old, adv, self.clip_low, self.clip_high)
        sdl = ESTIMATORS[self.estimator](logp, logp_old, logp_teacher)
        with torch.no_grad():
            gap = logp_teacher - logp
            metrics = {
                "gap": gap.sum(),
                "gap_sq": gap.square().sum(),
                "teacher_health": (adv * gap).sum(),
                "k3": k3(-gap).sum(),
                "clip_fraction": clipped.float().sum(),
                "logp_drift": (logp - logp_old).abs().sum(),
            }
        return Terms(policy.sum(), sdl.sum(), metrics)

    def total(self, terms: Terms, n: int) -> Tensor:
        """(policy_weight * policy + lambda * distillation) / N. A term of weight 0 is left out: 0 * inf would be nan."""
        loss = terms.policy.new_zeros(())
        if self.policy_weight:
            loss = loss + self.policy_weight * terms.policy
        if self.distillation_weight:
            loss = loss + self.distillation_weight * terms.distillation
        return loss / n
