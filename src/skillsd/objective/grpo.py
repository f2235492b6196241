"""GRPO: one advantage for a whole trajectory, relative to its group.

    A_i = (R_i - mean R) / (std R + 1e-8)                       sample standard deviation (n - 1)
    L   = -mean min(r A, clip(r, 1 - 0.2, 1 + 0.28) A)          r = pi_stu / sg(pi_old), token mean (Skill-SD, Eq. 3-4)

Source: Shao et al. 2024, arXiv:2402.03300; the wider upper bound is DAPO's (arXiv:2503.14476). Credit: every token of a trajectory
gets the same, whatever it did for the result. Distillation terms add what differs from token to token.
"""

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
        raise ValueError(f"a group of {rewards.shape[-1]} has no group advantage: data.group_size must be at least 2.")
    centred = rewards - rewards.mean(-1, keepdim=True)
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    # The mean of equal floats can differ from them in the last bit; divided by eps that would be a large advantage.
    return torch.where(equal, 0.0, centred / (rewards.std(-1, keepdim=True) + eps))


def float32_rewards(rewards: Tensor) -> Tensor:
    """The rewards of groups as float32, with the group advantages that they have in float64.

    Where a group's rewards lie so close together for their size that float32 would merge them (1e8 and 1e8 + 0.1), they are measured from
    the smallest one: advantages do not change with an offset. Others are rounded as they are. Rewards that differ by no more than a sum of
    float64 numbers is off by are equal.

    Args:
        rewards: [B, G] float64, of at most 1e37 in size.

    Returns:
        [B, G] float32.
    """
    smallest, size = rewards.amin(-1, keepdim=True), rewards.abs().amax(-1, keepdim=True)
    spread = rewards.amax(-1, keepdim=True) - smallest
    above = torch.where(spread > 2**-48 * size, rewards - smallest, 0.0)  # 16 roundings of float64
    return torch.where(size > 2**10 * spread, above, rewards).float()


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
