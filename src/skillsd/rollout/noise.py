"""Counter-based sampling noise: a pure function of (run seed, iteration, task, member, position).

A trajectory's draws do not depend on the batch it sits in, on the order of sampling, or on any generator's state, so there
is nothing to save in a checkpoint. The mixing function is splitmix64 (Steele, Lea & Flood 2014, doi:10.1145/2714064.2660195).
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

_GOLDEN, _M1, _M2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # as signed 64-bit


def stream_key(*what_for: object) -> int:
    """A 64-bit key (signed) from what the noise is for, e.g. (seed, iteration, task_id, member)."""
    digest = blake2b("\x1f".join(map(str, what_for)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


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
        token ids int64 [B]; log-probs float32 [B] in nats under the distribution sampled from (at 0: under temperature 1).
    """
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0.0:
        ids = logp.argmax(-1)
    else:
        cdf = logp.exp().double().cumsum(-1)
        ids = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)
        ids = ids.clamp_max(logits.shape[-1] - 1)
    return ids, logp.gather(-1, ids[:, None]).squeeze(-1)
