"""Counter-based sampling noise: a pure function of (run seed, iteration, task, member, position).

A trajectory's draws do not depend on the batch it sits in, on the order of sampling, or on any generator's state, so there
is nothing to save in a checkpoint. The mixing function is splitmix64 (Steele, Lea & Flood 2014, doi:10.1145/2714064.2660195).
"""

from __future__ import annotations

import torch
from torch import Tensor

from skillsd.hashing import hash64

BLOCK = 1024  # of a large vocabulary
_GOLDEN, _M1, _M2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # as signed 64-bit


def stream_key(*what_for: object) -> int:
    """A 64-bit key (signed) from what the noise is for, e.g. (seed, iteration, task_id, member)."""
    return hash64("\x1f".join(map(str, what_for)))


def _shift(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # a logical shift: int64 would drag the sign along


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, one per (key, position); both int64 of one shape."""
    x = keys + (positions + 1) * _GOLDEN
    x = (x ^ _shift(x, 30)) * _M1
    x = (x ^ _shift(x, 27)) * _M2
    x = x ^ _shift(x, 31)
    return _shift(x, 11).double() * 2.0**-53


def sample(logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw a token per row by inverse CDF and give its log-prob.

    Args:
        logits: [B, V].
        u: Uniform numbers, float64 [B].
        temperature: > 0 samples from softmax(logits / temperature); 0 takes the argmax.

    Returns:
        token ids int64 [B]; log-probs float32 [B] in nats under the distribution sampled from (at 0: under temperature 1). Of a row whose
        logits are no distribution (a nan, +inf, all -inf) the log-prob is nan and the id any of the vocabulary.
    """
    logits = logits.float()
    logp = torch.log_softmax(logits / temperature if temperature not in (0.0, 1.0) else logits, -1)
    ids = logp.argmax(-1) if temperature == 0.0 else _inverse_cdf(logp.exp(), u[:, None])
    return ids, logp.gather(-1, ids[:, None]).squeeze(-1)


def _inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    """The first index at which the running sum of p [B, V] exceeds u [B, 1] of the whole, summed in float64.

    A large vocabulary goes in two levels, blocks and what is in one: only sums of blocks are ever held in float64.
    """
    vocabulary = p.shape[-1]
    if vocabulary < 8 * BLOCK:
        cdf = p.double().cumsum(-1)
        return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).squeeze(-1).clamp_max(vocabulary - 1)
    blocks = torch.nn.functional.pad(p, (0, -vocabulary % BLOCK)).view(len(p), -1, BLOCK)
    cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = u * cdf[:, -1:]
    block = torch.searchsorted(cdf, target, right=True).clamp_max(cdf.shape[-1] - 1)
    before = torch.where(block > 0, cdf.gather(-1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks[torch.arange(len(p), device=p.device), block.squeeze(-1)].double().cumsum(-1)
    # Sums of the two levels round differently: stay below the block's own, so that its last token with any probability is the last drawn.
    rest = torch.minimum(target - before, torch.nextafter(inside[:, -1:], torch.zeros_like(before)))
    within = torch.searchsorted(inside, rest, right=True).clamp_max(BLOCK - 1)
    return (block * BLOCK + within).squeeze(-1).clamp_max(vocabulary - 1)
