"""k3 without the importance weight's gradient: the common mistake, kept as an ablation.

    L = mean of exp(-ell) - 1 + ell,  ell = log pi_stu - log pi_tea

Credit: its gradient (1 - pi_tea / pi_stu) grad log pi_stu is, in expectation, that of FORWARD KL(pi_tea || pi_stu): the student is to
cover all that the teacher might do, not to choose among it. Source of the warning: Skill-SD's Prop. 2 (arXiv:2604.10674), read backwards.
"""

from __future__ import annotations

from torch import Tensor

from skillsd.objective.signal import Signal, Tokens, k3


class UnweightedK3(Signal):
    """k3 without importance weight."""

    def loss(self, t: Tokens) -> Tensor:
        return k3(t.logp - t.logp_teacher.detach())
