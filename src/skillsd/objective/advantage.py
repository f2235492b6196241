"""Group advantages (Skill-SD, Algorithm 1 line 4; GRPO, arXiv:2402.03300)."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, eps: float = 1e-8) -> Tensor:
    """A_i = (R_i - mean R) / (std R + eps) within each group, sample standard deviation (n - 1).

    Args:
        rewards: [B, G] float, G >= 2.
        eps: Added to the standard deviation.

    Returns:
        [B, G]; exactly 0 in a group whose rewards are all equal.

    Raises:
        ValueError: G < 2, for which no group baseline exists.
    """
    if rewards.shape[-1] < 2:
        raise ValueError(f"a group of {rewards.shape[-1]} has no group advantage: data.init_args.group_size must be at least 2.")
    centred = rewards - rewards.mean(-1, keepdim=True)
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    # The mean of equal floats can differ from them in the last bit; divided by eps that would be a large advantage.
    return torch.where(equal, 0.0, centred / (rewards.std(-1, keepdim=True) + eps))
