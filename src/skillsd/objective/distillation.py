"""Self-distillation towards the skill-conditioned teacher (Eq. 10-13).

With ell = log pi_stu - log pi_tea on tokens sampled from b, and rho = pi_stu / sg(b):

    skill_sd    rho * (exp(-ell) - 1 + ell), gradient through rho     (Eq. 12; b = old student, Eq. 11; b = old teacher, Eq. 13)
    score       sg(rho) * sg(ell) * log pi_stu                        the same gradient, no exp(-ell) to overflow

Both have grad = rho * ell * grad log pi_stu, whose expectation under b is grad KL(pi_stu || pi_tea) (Prop. 2). Detaching rho in
the first form would train forward KL instead. The value of the second is not a divergence; it is reported as k3 all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]


def k3(ell: Tensor) -> Tensor:
    """exp(-ell) - 1 + ell >= 0: Schulman's low-variance KL estimate. expm1 keeps its precision near 0."""
    return torch.expm1(-ell) + ell


def skill_sd(logp: Tensor, logp_behaviour: Tensor, logp_teacher: Tensor) -> Tensor:
    """Eq. 12 per token: rho * k3(ell), with gradient through both.

    Args:
        logp: log pi_stu of the sampled tokens, with gradient.
        logp_behaviour: log-prob under whoever sampled them, recorded then.
        logp_teacher: log pi_tea of the same tokens with the skill in front.
    """
    rho = (logp - logp_behaviour.detach()).exp()
    return rho * k3(logp - logp_teacher.detach())


def score(logp: Tensor, logp_behaviour: Tensor, logp_teacher: Tensor) -> Tensor:
    """sg(rho) sg(ell) log pi_stu per token: the gradient of Eq. 12 without its exp(-ell)."""
    with torch.no_grad():
        weight = (logp - logp_behaviour).exp() * (logp - logp_teacher)
    return weight * logp


ESTIMATORS: dict[str, Estimator] = {"skill_sd": skill_sd, "score": score}
