"""SDPG: exact reverse KL over the whole vocabulary at the visited states.

    L = L_GRPO + lambda mean of KL(pi_stu(. | h) || sg pi_tea(. | h, context))

Source: Self-Distilled Policy Gradient, arXiv:2606.04036, with the option to teach trajectories of positive advantage alone
(`PositiveGate`); there beside a KL to a reference, and clamped at 20 nats. Credit: each state
pulls all of its answers towards the teacher's, sampled or not: no sampling noise within a state, at the price of the vocabulary's
log-probs, which are made a piece at a time.
"""

from __future__ import annotations

from torch import Tensor

from skillsd.objective.signal import Signal, Tokens


class FullReverseKL(Signal):
    """Full-vocabulary reverse KL."""

    distributional = True

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.exp() * (student - teacher)).sum(-1)

    def loss(self, t: Tokens) -> Tensor:
        assert t.divergence is not None
        return t.divergence
