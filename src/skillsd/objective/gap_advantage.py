"""OPID: the teacher's opinion is added to the advantage.

    A_t = A + w (log pi_old(y_t | h, skill) - log pi_old(y_t | h)),   w = 0.001

Source: arXiv:2606.26790 (its episode-level skill; the step-level one is not built here). Credit: dense; a token's advantage rises by how
much likelier a hindsight skill of the same trajectory makes it, through GRPO's ratio and bounds. On the sampled token only: a divergence
of whole distributions depends on the state alone, so its expected gradient as an advantage is zero.
"""

from __future__ import annotations

from torch import Tensor

from skillsd.objective.signal import Signal, Tokens


class GapAdvantage(Signal):
    """Log-prob gap as a token advantage."""

    def advantage(self, t: Tokens) -> Tensor:
        return (t.logp_teacher - t.logp_old).detach()
