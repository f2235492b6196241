"""What the kernels compute, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""4-bit NormalFloat (QLoRA, arXiv:2305.14314, appendix E)."""
BLOCK, OUTER = 64, 256
"""Weights that share a scale; scales that share a scale of theirs."""
START, COUNT, SLOT, SHARED, OWNER = range(5)
COLUMNS = 5
"""The columns of a row table, int64 [B, COLUMNS], which says where each row's keys lie in a cache [slots, H_kv, T, D]: the position of its
first new token; how many new tokens it has; its slot; how many of its first keys lie in another slot, from index 0 on; that other slot. In
its own slot the key at position j is at index j - SHARED."""


class Nf4Weight(NamedTuple):
    """A matrix [N, K] as bitsandbytes keeps it. K is a multiple of 64, so that no block crosses a row.

    Args:
        packed: uint8, N * K / 2 of them: two weights a byte, the first in the high half.
        scales: One for each block of 64 weights: float32, or uint8 indices into `code` (double quantisation).
        code: float32 [256], empty without double quantisation.
        outer: float32, the scale of 256 scales, likewise.
        offset: Added to every scale, likewise.
        shape: (N, K).
    """

    packed: Tensor
    scales: Tensor
    code: Tensor
    outer: Tensor
    offset: float
    shape: tuple[int, int]


class Lora(NamedTuple):
    """a [r, K] and b [N, r], float32, and alpha / r."""

    a: Tensor
    b: Tensor
    scaling: float


class Projection(NamedTuple):
    """One linear layer: base weight, bias [N] or None, adapter or None."""

    weight: Nf4Weight
    bias: Tensor | None
    lora: Lora | None


def dequantise(w: Nf4Weight, rounded: torch.dtype = torch.float32) -> Tensor:
    """float32 [N, K]: codes, rounded to a dtype, times scales."""
    nibbles = torch.stack([w.packed.flatten() >> 4, w.packed.flatten() & 15], -1).long()
    scales = w.scales
    if len(w.code):
        scales = w.code[scales.long()] * w.outer.repeat_interleave(OUTER)[: len(scales)] + w.offset
    codes = torch.tensor(NF4, device=w.packed.device).to(rounded).float()
    return (codes[nibbles].view(-1, BLOCK) * scales[:, None]).view(w.shape)


def project(x: Tensor, p: Projection) -> Tensor:
    """x W^T + bias + scaling (x A^T) B^T, summed in float32 and rounded once. x [M, K] -> [M, N], both of x's dtype.

    A weight is its code rounded to x's dtype, times its scale in float32.
    """
    out = x.float() @ dequantise(p.weight, x.dtype).T
    if p.bias is not None:
        out = out + p.bias.float()
    if p.lora is not None:
        out = out + p.lora.scaling * ((x.float() @ p.lora.a.T) @ p.lora.b.T)
    return out.to(x.dtype)


def project_all(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """`project` of one input by several layers."""
    return [project(x, p) for p in projections]


def keys_of(store: Tensor, table: Tensor, length: int) -> Tensor:
    """Each row's keys (or values) in the order of their positions.

    Args:
        store: [slots, H_kv, T, D].
        table: int64 [B, COLUMNS], a row table.
        length: Positions wanted.

    Returns:
        [B, H_kv, length, D].
    """
    j = torch.arange(length, device=store.device)
    own, shared, owner = (table[:, column, None] for column in (SLOT, SHARED, OWNER))
    slot, index = torch.where(j < shared, owner, own), torch.where(j < shared, j, j - shared)
    return store[slot, :, index.clamp_max(store.shape[2] - 1)].transpose(1, 2)  # some rows are shorter


def write(keys: Tensor, values: Tensor, key_store: Tensor, value_store: Tensor, table: Tensor) -> None:
    """Write new keys and values [B, H_kv, Q, D] to where the row table says; row b's after the first table[b, COUNT] are padding."""
    for new, store in ((keys, key_store), (values, value_store)):
        for b, (start, count, slot, shared, _) in enumerate(table.tolist()):
            store[slot, :, start - shared : start - shared + count] = new[b, :, :count]


def attend(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, window: int | None = None, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """Attention in which a token's place in the cache follows from its position.

    Args:
        q: Queries [B, H, Q, D] of consecutive positions; row b's after the first table[b, COUNT] are padding.
        k, v: Stores [slots, H_kv, T, D]; what lies beyond a query's position is not read.
        table: int64 [B, COLUMNS], a row table.
        window: A query at p sees positions j with p - window < j <= p; None: all up to p.
        scale: What the scores are multiplied by; D^-1/2 by default.
        softcap: Scores become softcap * tanh(score / softcap) (Gemma 2).

    Returns:
        [B, Q, H, D].
    """
    groups, length = q.shape[1] // k.shape[1], int(table[:, START].max()) + q.shape[2]
    k, v = (keys_of(t, table, length).repeat_interleave(groups, 1) for t in (k, v))
    scores = q.float() @ k.float().transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = table[:, START, None] + torch.arange(q.shape[2], device=q.device)
    j = torch.arange(length, device=q.device)
    gap = position[:, None, :, None] - j
    seen = (gap >= 0) & (j < (table[:, START] + table[:, COUNT])[:, None, None, None])
    if window is not None:
        seen = seen & (gap < window)
    return (torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v.float()).to(q.dtype).transpose(1, 2).contiguous()


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv:2104.09864), the halves of a head paired.

    q [B, H, Q, D], k [B, H_kv, Q, D], cos and sin [B, Q, D].
    """

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return turned(q), turned(k)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU, arXiv:2002.05202), each rounded to their dtype."""
    return torch.nn.functional.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean x^2 + eps)) over the last dimension: in float32, rounded to x's dtype before the weight (Llama)."""
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
