"""SDAR: the sampled tokens that the teacher likes better are made more likely, by a gate.

    L = L_GRPO + lambda mean of sg(sigma(beta d)) d,   d = log pi_tea - log pi_stu, gradient through log pi_stu alone

Source: Self-Distilled Agentic Reinforcement Learning, arXiv:2605.15155 (beta 5, lambda 0.01). Credit: a token gains sigma(beta d): near 1
where the teacher endorses it, near 0 where it rejects it, so a wrong skill does little harm. Without the gate, d alone has expected
gradient zero: the gate is the signal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skillsd.objective.signal import Signal, Tokens


class GatedLogRatio(Signal):
    """Sigmoid-gated log-prob gap.

    Args:
        beta: Steepness of the gate, >= 0, in 1 / nats.
    """

    def __init__(self, beta: float = 5.0) -> None:
        if not beta >= 0:
            raise ValueError(f"GatedLogRatio.beta is {beta}: give 0 or more.")
        self.beta = beta

    def loss(self, t: Tokens) -> Tensor:
        return torch.sigmoid(self.beta * t.gap) * (t.logp_teacher.detach() - t.logp)
