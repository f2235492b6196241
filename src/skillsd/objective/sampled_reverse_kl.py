"""Skill-SD: the student is pulled towards itself with the task's skill in front, token by token.

    ell = log pi_stu - log pi_tea,  rho = pi_stu / sg(pi_b)
    k3      rho (exp(-ell) - 1 + ell), gradient through rho         (Eq. 10-12; b = old student, or old teacher off-policy, Eq. 13)
    score   sg(rho ell) log pi_stu                                  the same gradient, no exp(-ell) to overflow

Source: arXiv:2604.10674. Credit: dense; each sampled token is moved by how much better or worse the teacher likes it. Both forms have
grad = rho ell grad log pi_stu, whose expectation under b is grad KL(pi_stu || pi_tea) at the visited state (Prop. 2). Detaching rho in
k3 would train forward KL instead (`unweighted_k3`). With one update a batch it equals a token advantage lambda (log pi_tea - log pi_old).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from skillsd.objective.signal import Signal, Tokens, k3


class SampledReverseKL(Signal):
    """Importance-weighted reverse KL on the sampled tokens.

    Args:
        form: `k3` is Eq. 12; `score` has the same gradient and does not overflow, but its value is no divergence.
    """

    def __init__(self, form: Literal["k3", "score"] = "k3") -> None:
        self.form = form

    def loss(self, t: Tokens) -> Tensor:
        ell = t.logp - t.logp_teacher.detach()
        if self.form == "k3":
            return t.ratio * k3(ell)
        return (t.ratio * ell).detach() * t.logp
