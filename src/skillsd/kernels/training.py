"""The learner's kernels, with their gradients: RMSNorm, SwiGLU, rotary embedding, and log-probs from the language-model head.

Forward they are those of decoding (`elementwise`), rounded alike. Each backward reads its inputs once and recomputes what it needs.
Weights of norms and of the head are frozen.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from skillsd.kernels import elementwise, interpreted


@triton.jit(do_not_specialize=["ROWS"])
def _rms_norm_backward(x, weight, dy, dx, ROWS, eps, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr):
    row, d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, DP)
    here = (row[:, None] < ROWS) & (d[None, :] < D)
    at = row[:, None].to(tl.int64) * D + d[None, :]
    h = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(h * h, 1) / D + eps)[:, None]
    h = h * r
    g = tl.load(dy + at, mask=here, other=0.0).to(tl.float32) * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    out = r * (g - h * (tl.sum(g * h, 1) / D)[:, None])
    tl.store(dx + at, out.to(dx.dtype.element_ty), mask=here)


class RmsNorm(torch.autograd.Function):
    """`reference.rms_norm`. x [..., D], weight [D] without gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return elementwise.rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x, dy = x.contiguous(), dy.contiguous()
        d = x.shape[-1]
        rows, padded, dx = x.numel() // d, triton.next_power_of_2(d), torch.empty_like(x)
        br = max(1, min(16, 2048 // padded))
        _rms_norm_backward[(-(-rows // br),)](x, weight, dy, dx, rows, ctx.eps, d, padded, br, num_warps=8 if padded >= 2048 else 4)
        return dx, None, None


@triton.jit
def _silu_mul_backward(gate, up, dy, dgate, dup, N, BN: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    g = tl.load(gate + i, mask=i < N, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < N, other=0.0).to(tl.float32)
    d = tl.load(dy + i, mask=i < N, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(dgate + i, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=i < N)
    tl.store(dup + i, (d * g * s).to(dup.dtype.element_ty), mask=i < N)


class SiluMul(torch.autograd.Function):
    """`reference.silu_mul`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return elementwise.silu_mul(gate, up)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, dy = (t.contiguous() for t in (*ctx.saved_tensors, dy))
        dgate, dup, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        _silu_mul_backward[(-(-n // 1024),)](gate, up, dy, dgate, dup, n, 1024, num_warps=4)
        return dgate, dup


class Rotate(torch.autograd.Function):
    """`reference.rotate`, whose transpose turns back. What it gives lies in memory as what it is given."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return elementwise.rotate(q, k, cos, sin, alike=True)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk))
        return *elementwise.rotate(dq, dk, cos, -sin, alike=True), None, None


@triton.jit
def _choose(logits, targets, logp, entropy, V, scale, GRADIENT: tl.constexpr, BV: tl.constexpr):
    row, v = tl.program_id(0), tl.arange(0, BV)
    z = logits + row.to(tl.int64) * V
    target = tl.load(targets + row)
    chosen = tl.load(z + target).to(tl.float32) * scale  # before the gradient takes its place
    most, total, weighted = tl.full([], -1e30, tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for start in range(0, V, BV):
        x = tl.load(z + start + v, mask=start + v < V, other=-float("inf")).to(tl.float32) * scale
        new = tl.maximum(most, tl.max(x, 0))
        e = tl.exp(x - new)
        shrink = tl.exp(most - new)
        total = total * shrink + tl.sum(e, 0)
        weighted = weighted * shrink + tl.sum(tl.where(e > 0.0, e * x, 0.0), 0)
        most = new
    lse = most + tl.log(total)
    tl.store(logp + row, chosen - lse)
    tl.store(entropy + row, lse - weighted / total)
    if GRADIENT:
        for start in range(0, V, BV):
            here = start + v < V
            p = tl.exp(tl.load(z + start + v, mask=here, other=0.0).to(tl.float32) * scale - lse)
            g = (tl.where(start + v == target, 1.0, 0.0) - p) * scale
            tl.store(z + start + v, g.to(logits.dtype.element_ty), mask=here)


def choose(logits: Tensor, targets: Tensor, temperature: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """Log-probs of targets and the entropy of their distributions.

    Args:
        logits: [N, V], contiguous; with `gradient` d logp / d logits takes its place.
        targets: int64 [N].
        temperature: Divides the logits.
        gradient: See `logits`.

    Returns:
        logp [N], entropy [N], float32, nats.
    """
    n, v = logits.shape
    logp, entropy = (torch.empty(n, device=logits.device) for _ in range(2))
    if n:
        _choose[(n,)](logits, targets, logp, entropy, v, 1.0 / temperature, gradient, 256 if interpreted() else 4096, num_warps=8)
    return logp, entropy


class HeadLogprobs(torch.autograd.Function):
    """Log-probs of targets under a linear head, its weight [V, H] frozen, `chunk` positions at a time.

    d logp / d hidden = (onehot - p) W / T does not depend on what comes after, so it is made while the logits are there: nothing is
    computed twice, and [chunk, V] of hidden's dtype is all that ever exists of them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[0]
        slope = torch.empty_like(hidden) if needed else None
        parts = []
        for first in range(0, max(1, len(hidden)), chunk):
            rows = slice(first, first + chunk)
            logits = hidden[rows] @ weight.T
            parts.append(choose(logits, targets[rows], temperature, needed))
            if slope is not None:
                torch.mm(logits, weight, out=slope[rows])
            del logits  # or those of two pieces would exist at one time
        logp, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
        ctx.mark_non_differentiable(entropy)
        if slope is not None:
            ctx.save_for_backward(slope)
        return logp, entropy

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dlogp: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (dlogp[:, None] * slope).to(slope.dtype), None, None, None, None
