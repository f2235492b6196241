"""The clipped policy loss of GRPO with asymmetric bounds (Eq. 3-4)."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_policy_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, clip_low: float = 0.2, clip_high: float = 0.28
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / sg(pi_old).

    Args:
        logp: log pi of the sampled tokens, with gradient.
        logp_old: Recorded at rollout, same shape.
        advantage: Broadcastable to it.
        clip_low: Lower bound is 1 - clip_low.
        clip_high: Upper bound is 1 + clip_high.

    Returns:
        loss per token; and whether the bound was active there (bool).
    """
    ratio = (logp - logp_old.detach()).exp()
    free, bound = ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    return -torch.minimum(free, bound), (bound < free).detach()
