"""UCOB: half of a group plays with the skill, half without; the view that fared better teaches the other.

    L = L_GRPO + 0.1 mean of w sigma(5 d) KL(pi_other || pi_own) on the other view's top K = 32 tokens, both renormalised there
    w = min(gap / 0.2, 2) where gap = mean return of the other view - own view > 0.05, else 0;  d = log pi_other - log pi_own

Source: arXiv:2606.29502. Credit: distillation only where this group's own returns say that the other view is worth following, in either
direction: a harmful skill is unlearnt by the half that sees it. Roll out with `data.actor: half_with_skill`; the sigmoid is a
gate. Two differences from the authors' code: the student learns from the tokens it sampled itself, not on the winner's, and returns are
compared between the halves of a group, not between the visits of an anchor state.
"""

from __future__ import annotations

from torch import Tensor

from skillsd.objective.signal import Signal, Tokens


class TwoViewKL(Signal):
    """Top-K forward KL towards the view with the higher return.

    Args:
        k: Tokens kept, the teacher's likeliest.
        min_gap: Return gap up to which nothing is distilled.
        full_gap: Return gap that weighs 1.
        max_weight: Largest weight of a gap.
    """

    distributional = True

    def __init__(self, k: int = 32, min_gap: float = 0.05, full_gap: float = 0.2, max_weight: float = 2.0) -> None:
        if k < 1 or min_gap < 0 or not full_gap > 0 or not max_weight > 0:
            raise ValueError("TwoViewKL: give k >= 1, min_gap >= 0, full_gap > 0 and max_weight > 0.")
        self.k, self.min_gap, self.full_gap, self.max_weight = k, min_gap, full_gap, max_weight

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        top, index = teacher.topk(min(self.k, teacher.shape[-1]), -1)
        q, p = top.log_softmax(-1), student.gather(-1, index).log_softmax(-1)
        return (q.exp() * (q - p)).sum(-1)

    def loss(self, t: Tokens) -> Tensor:
        assert t.divergence is not None
        gap = t.return_gap.nan_to_num(0.0).to(t.logp)
        return (gap / self.full_gap).clamp(0.0, self.max_weight) * (gap > self.min_gap) * t.divergence
