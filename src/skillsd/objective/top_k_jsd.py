"""SDPO: a Jensen-Shannon divergence on the student's likeliest tokens and one bucket for the rest.

    L = mean of sg(min(rho, 2)) JSD_alpha(p, q),   JSD_alpha = (1 - alpha) KL(p || m) + alpha KL(q || m),   m = (1 - alpha) p + alpha q
    p, q = student and teacher on the student's top K tokens, the rest summed; alpha 0.5, K 100; teacher an EMA of rate 0.05

Source: Reinforcement Learning via Self-Distillation, arXiv:2601.20802, where alpha 0 means KL(q || p) and 1 means KL(p || q), it stands
alone instead of beside GRPO, and the context is a successful sibling. Credit: as SDPG's, bounded (at most ln 2 a state), with the tail kept
honest by the bucket. K of the vocabulary's size or more is the exact divergence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skillsd.objective.signal import Signal, Tokens


class TopKJSD(Signal):
    """Top-K Jensen-Shannon divergence with a tail bucket.

    Args:
        k: Tokens kept, the student's likeliest.
        alpha: Between 0, forward KL(teacher || student), and 1, reverse KL(student || teacher); 0.5 is the symmetric JSD.
        ratio_clip: Largest importance weight.
    """

    distributional = True

    def __init__(self, k: int = 100, alpha: float = 0.5, ratio_clip: float = 2.0) -> None:
        if k < 1 or not 0 <= alpha <= 1 or not ratio_clip > 0:
            raise ValueError(f"TopKJSD: k is {k}, alpha {alpha}, ratio_clip {ratio_clip}: give k >= 1, alpha in [0, 1] and ratio_clip > 0.")
        self.k, self.alpha, self.ratio_clip = k, alpha, ratio_clip

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return jsd(*top_k_with_tail(student, teacher, self.k), self.alpha)

    def loss(self, t: Tokens) -> Tensor:
        assert t.divergence is not None
        return t.ratio.detach().clamp_max(self.ratio_clip) * t.divergence


def top_k_with_tail(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probs [n, V] of both -> [n, k + 1]: the student's k likeliest tokens, then the log of what all others have together.

    With k >= V there is no tail and both come back as they are.
    """
    if k >= student.shape[-1]:
        return student, teacher
    index = student.detach().topk(k, -1).indices
    return _bucketed(student, index), _bucketed(teacher, index)


def _bucketed(logp: Tensor, index: Tensor) -> Tensor:
    # The tail is summed over the tokens that are not kept: 1 - (sum of those that are) would lose all digits of a small tail.
    tail = logp.scatter(-1, index, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logp.gather(-1, index), tail], -1)


def jsd(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    """JSD_alpha of log-probs [n, K] -> [n]; by convention alpha 0 is KL(q || p) and 1 is KL(p || q)."""
    if alpha in (0.0, 1.0):
        a, b = (q, p) if alpha == 0.0 else (p, q)
        return (a.exp() * (a - b)).sum(-1)
    m = torch.logaddexp(p + math.log(1 - alpha), q + math.log(alpha))
    return (1 - alpha) * (p.exp() * (p - m)).sum(-1) + alpha * (q.exp() * (q - m)).sum(-1)
