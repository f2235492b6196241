"""RLSD: the reward keeps the direction, the teacher sets the size.

    A_t = A ((1 - l) + l clip(exp(sign(A) d), 1 - c, 1 + c)),   d = log pi_tea - log pi_stu, c = 0.2, l from 0.5 to 0 over 50 iterations

Source: Self-Distilled RLVR, arXiv:2604.03128; there the teacher is a snapshot taken every 10 steps. Credit: in a good trajectory the tokens
that the teacher endorses gain most, in a bad one those that it rejects lose most; no token changes sign, so a wrong skill cannot turn
a punishment into a reward.
"""

from __future__ import annotations

from torch import Tensor

from skillsd.objective.signal import Signal, Tokens


class GapMultiplier(Signal):
    """Bounded sign-preserving multiplier of the advantage.

    Args:
        clip: Largest distance of the multiplier from 1, in [0, 1).
    """

    def __init__(self, clip: float = 0.2) -> None:
        if not 0 <= clip < 1:
            raise ValueError(f"GapMultiplier.clip is {clip}: give 0 or more, and less than 1, so that no sign changes.")
        self.clip = clip

    def multiplier(self, t: Tokens) -> Tensor:
        return (t.advantage.sign() * t.gap).exp().clamp(1 - self.clip, 1 + self.clip)
