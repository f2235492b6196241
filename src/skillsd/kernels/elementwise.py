"""RMSNorm, rotary embedding, SwiGLU and the cache's writes: one launch each, rounded where the model's own operations round."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skillsd.kernels import interpreted, reference

EXACT = {} if interpreted() else {"enable_fp_fusion": False}
"""Products and sums are each rounded to the tensors' dtype, as the model's own are."""
ROWS = 1024 if interpreted() else 16  # of D numbers, for one program: the interpreter is slow at starting one
START, COUNT, SLOT, SHARED = (tl.constexpr(i) for i in (reference.START, reference.COUNT, reference.SLOT, reference.SHARED))
COLUMNS = tl.constexpr(reference.COLUMNS)


@triton.jit(do_not_specialize=["ROWS"])
def _rms_norm(x, weight, out, ROWS, eps, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr):
    row, d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, DP)
    here = (row[:, None] < ROWS) & (d[None, :] < D)
    at = row[:, None].to(tl.int64) * D + d[None, :]
    h = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    h = h * tl.rsqrt(tl.sum(h * h, 1) / D + eps)[:, None]
    w = tl.load(weight + d, mask=d < D, other=0.0)
    kind = out.dtype.element_ty
    tl.store(out + at, w[None, :] * h.to(kind), mask=here)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`. x [..., D] is made contiguous."""
    x = x.contiguous()
    d = x.shape[-1]
    rows, padded = x.numel() // d, triton.next_power_of_2(d)
    br = max(1, min(16, 2048 // padded))
    out = x.new_empty(x.shape)
    _rms_norm[(-(-rows // br),)](x, weight, out, rows, eps, d, padded, br, num_warps=4 if padded >= 512 else 2, **EXACT)
    return out


@triton.jit(do_not_specialize=["ROWS", "T"])
def _rotate(
    q, k, cos, sin, q_out, k_out, q_b, q_h, q_t, k_b, k_h, k_t, c_b, c_t, s_b, s_t, Q_b, Q_h, Q_t, K_b, K_h, K_t, ROWS, HEADS, KV_HEADS, T,
    D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, DP)  # a head of a token: queries' heads, then keys'
    head, token = row % (HEADS + KV_HEADS), row // (HEADS + KV_HEADS)
    b, t = (token // T).to(tl.int64), token % T
    is_key, kv = head >= HEADS, head - HEADS
    other = tl.where(d < D // 2, d + D // 2, d - D // 2)
    sign = tl.where(d < D // 2, -1.0, 1.0)
    here = (row < ROWS)[:, None] & (d < D)[None, :]
    c = tl.load(cos + (b * c_b + t * c_t)[:, None] + d[None, :], mask=here, other=0.0)
    s = tl.load(sin + (b * s_b + t * s_t)[:, None] + d[None, :], mask=here, other=0.0) * sign.to(sin.dtype.element_ty)[None, :]
    source = tl.where(is_key, k + b * k_b + kv * k_h + t * k_t, q + b * q_b + head * q_h + t * q_t)[:, None]
    x = tl.load(source + d[None, :], mask=here, other=0.0)
    y = tl.load(source + other[None, :], mask=here, other=0.0)
    to = tl.where(is_key, k_out + b * K_b + kv * K_h + t * K_t, q_out + b * Q_b + head * Q_h + t * Q_t)[:, None]
    tl.store(to + d[None, :], x * c + y * s, mask=here)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, alike: bool = False) -> tuple[Tensor, Tensor]:
    """See `reference.rotate`. The last dimension is contiguous; cos and sin may be for one row that stands for all.

    The results are contiguous; with `alike` they lie in memory as q and k do.
    """
    batch, heads, new, d = q.shape
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    made = torch.preserve_format if alike else torch.contiguous_format
    out = torch.empty_like(q, memory_format=made), torch.empty_like(k, memory_format=made)
    rows = batch * new * (heads + k.shape[1])
    _rotate[(-(-rows // ROWS),)](
        q, k, cos, sin, *out, *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
        *out[0].stride()[:3], *out[1].stride()[:3], rows, heads, k.shape[1], new, d,
        triton.next_power_of_2(d), ROWS, num_warps=4, **EXACT,
    )  # fmt: skip
    return out


@triton.jit
def _silu_mul(gate, up, out, N, BN: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    kind = out.dtype.element_ty
    g = tl.load(gate + i, mask=i < N, other=0.0).to(tl.float32)
    g = (g / (1.0 + tl.exp(-g))).to(kind)
    tl.store(out + i, g * tl.load(up + i, mask=i < N, other=0.0), mask=i < N)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    gate, up = gate.contiguous(), up.contiguous()
    out, n = gate.new_empty(gate.shape), gate.numel()
    _silu_mul[(-(-n // 1024),)](gate, up, out, n, 1024, num_warps=4, **EXACT)
    return out


@triton.jit(do_not_specialize=["ROWS", "T"])
def _write(
    keys, values, key_store, value_store, table, k_b, k_h, k_t, v_b, v_h, v_t, K_b, K_h, K_t, V_b, V_h, V_t, ROWS, HEADS, T,
    D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, DP)  # a head of a token
    h, t, b = row % HEADS, row // HEADS % T, (row // HEADS // T).to(tl.int64)
    exists = row < ROWS
    entry = table + b * COLUMNS
    real = exists & (t < tl.load(entry + COUNT, mask=exists, other=0))
    index = tl.load(entry + START, mask=real, other=0) + t - tl.load(entry + SHARED, mask=real, other=0)
    slot = tl.load(entry + SLOT, mask=real, other=0)
    here = real[:, None] & (d < D)[None, :]
    k = tl.load(keys + (b * k_b + h * k_h + t * k_t)[:, None] + d[None, :], mask=here)
    tl.store(key_store + (slot * K_b + h * K_h + index * K_t)[:, None] + d[None, :], k, mask=here)
    v = tl.load(values + (b * v_b + h * v_h + t * v_t)[:, None] + d[None, :], mask=here)
    tl.store(value_store + (slot * V_b + h * V_h + index * V_t)[:, None] + d[None, :], v, mask=here)


def write(keys: Tensor, values: Tensor, key_store: Tensor, value_store: Tensor, table: Tensor) -> None:
    """See `reference.write`. `table` and the last dimension of the others are contiguous."""
    batch, heads, new, d = keys.shape
    strides = [n for t in (keys, values, key_store, value_store) for n in t.stride()[:3]]
    rows = batch * heads * new
    _write[(-(-rows // ROWS),)](
        keys, values, key_store, value_store, table, *strides, rows, heads, new, d, triton.next_power_of_2(d), ROWS, num_warps=4
    )
