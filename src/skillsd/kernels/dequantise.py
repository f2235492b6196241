"""An nf4 matrix as plain numbers, in one launch: what the learner and long prompts multiply with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skillsd.kernels import interpreted
from skillsd.kernels.elementwise import EXACT
from skillsd.kernels.reference import BLOCK, NF4, OUTER, Nf4Weight

_TABLES: dict[torch.device, Tensor] = {}


@triton.jit
def _dequantise(
    packed, scales, code, outer, table, out, offset, BYTES, NESTED: tl.constexpr, HALF: tl.constexpr, OUT: tl.constexpr, BN: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    here = i < BYTES
    byte = tl.load(packed + i, mask=here, other=0).to(tl.int32)
    block = i // HALF
    if NESTED:
        index = tl.load(scales + block, mask=here, other=0).to(tl.int32)
        scale = tl.load(code + index) * tl.load(outer + block // OUT, mask=here, other=0.0) + offset
    else:
        scale = tl.load(scales + block, mask=here, other=0.0)
    kind = out.dtype.element_ty
    high, low = (tl.load(table + (byte >> 4)) * scale).to(kind), (tl.load(table + (byte & 15)) * scale).to(kind)
    at = tl.program_id(0).to(tl.int64) * 2 * BN + tl.arange(0, 2 * BN)
    tl.store(out + at, tl.interleave(high, low), mask=at < 2 * BYTES)


def dequantise(w: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """[N, K]: `reference.dequantise` in float32, rounded once, as bitsandbytes does."""
    device = w.packed.device
    if device not in _TABLES:
        _TABLES[device] = torch.tensor(NF4, device=device)
    out = torch.empty(w.shape, dtype=dtype, device=device)
    n, bn = w.packed.numel(), 1 << 16 if interpreted() else 1024
    nested = len(w.code) > 0
    _dequantise[(-(-n // bn),)](
        w.packed, w.scales, w.code, w.outer, _TABLES[device], out, w.offset, n, nested, BLOCK // 2, OUTER, bn, num_warps=4, **EXACT
    )
    return out
