"""x W^T + scaling (x A^T) B^T with W in nf4, for few rows of x: W is never written in another form.

One launch serves up to three layers that read the same x (query, key, value; gate, up). Each program dequantises a strip of one W into
registers and multiplies it on the tensor cores. K is split between programs; the last one to arrive at a tile sums their parts in
order, so the result does not depend on who that was, then adds the adapter's part. The launch's first programs make x A^T meanwhile.

The tensor cores multiply x by the codes, rounded to x's dtype, and each block's sum of 64 products by its scale, in float32. The learner's
forward rounds code * scale instead: either way a weight is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from skillsd.kernels import interpreted
from skillsd.kernels.reference import NF4, Projection
from skillsd.kernels.workspace import Workspace

MOST_ROWS = 128
MOST_LAYERS = 3
SLAB = 1024  # of K, for one program's part of x A^T
ROWS = 16  # of x, likewise


def table_look_up(kind: str) -> str:
    """PTX: four bytes of packed weights to four pairs of codes in a 16-bit format, the code of the high half of a byte first.

    `prmt` picks bytes from two registers by four selectors of three bits: a table of 16 bytes takes two picks and a third between them by
    the fourth bit. Both bytes of the codes are looked up so.
    """
    codes = torch.tensor(NF4).to(getattr(torch, kind)).view(torch.int16).tolist()
    lines = []
    for half in (0, 1):
        lines += [
            f"shr.u32 x, $4, {16 * half};",
            "and.b32 s, x, 0x7777;",
            "and.b32 t, x, 0x8888; shr.u32 t, t, 1; or.b32 t, t, 0x3210;",
        ]
        for plane in (0, 1):
            words = [sum((codes[i + j] >> 8 * plane & 255) << 8 * j for j in range(4)) for i in range(0, 16, 4)]
            lines += [
                "prmt.b32 y, 0x{:08x}, 0x{:08x}, s;".format(*words[:2]),
                "prmt.b32 z, 0x{:08x}, 0x{:08x}, s;".format(*words[2:]),
                f"prmt.b32 p{plane}, y, z, t;",
            ]
        # p0 and p1 hold a byte of: low 0, high 0, low 1, high 1
        lines += [f"prmt.b32 ${2 * half}, p0, p1, 0x4051;", f"prmt.b32 ${2 * half + 1}, p0, p1, 0x6273;"]
    return "{\n.reg .b32 x, y, z, s, t, p0, p1;\n" + "\n".join(lines) + "\n}"


BFLOAT16, FLOAT16 = (tl.constexpr(table_look_up(kind)) for kind in ("bfloat16", "float16"))


@triton.jit
def _look_up(packed, codes, KIND: tl.constexpr, COMPILED: tl.constexpr):
    """The codes of packed uint8 [...], as [..., 2] of a 16-bit format."""
    if COMPILED:
        TABLE: tl.constexpr = BFLOAT16 if tl.bfloat16 == KIND else FLOAT16
        pair = tl.inline_asm_elementwise(TABLE, "=r,=r,=r,=r,r", [packed], dtype=tl.int32, is_pure=True, pack=4)
        high, low = pair.to(tl.int16).to(KIND, bitcast=True), (pair >> 16).to(tl.int16).to(KIND, bitcast=True)
    else:
        byte = packed.to(tl.int32)
        high, low = tl.load(codes + (byte >> 4)).to(KIND), tl.load(codes + (byte & 15)).to(KIND)
    return tl.join(high, low)


@triton.jit
def _tile(
    x, t, tile, split, out, w, scales, code, outer, offset, bias, b, scaling, M, N, K, SPLITS, SLABS, TILES, DOWN, codes, parts, counters,
    first_tile, NESTED: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    COMPILED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Rows of W from tile * BN on, as [BN, BM]: W is the tensor cores' first operand, which may come from registers."""
    m, nn = tl.arange(0, BM), tl.arange(0, BN)
    n = tile * BN + nn
    row = tl.minimum(n, N - 1).to(tl.int64)
    byte, kk = tl.arange(0, 32), tl.arange(0, 64)
    # A thread of the tensor cores' operand holds columns 2q, 2q + 1, 2q + 8, 2q + 9 of every 16. Columns may come in any order if x has the
    # same one: in this order a thread's columns of a block of 64 are 8 bytes in a row, read at once.
    order = kk // 2 % 4 * 16 + kk // 16 % 4 * 4 + kk // 8 % 2 * 2 + kk % 2
    per = tl.cdiv(K // 64, SPLITS) * 64
    acc = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(split * per, tl.minimum(split * per + per, K), 64, num_stages=STAGES):
        packed = tl.load(w + (row * (K // 2))[:, None] + k // 2 + byte[None, :])
        packed = tl.permute(tl.reshape(packed, (BN, 4, 4, 2)), (0, 2, 3, 1))
        block = row * (K // 64) + k // 64
        if NESTED:
            scale = tl.load(code + tl.load(scales + block).to(tl.int32)) * tl.load(outer + block // 256) + offset
        else:
            scale = tl.load(scales + block)
        values = tl.reshape(_look_up(packed, codes, x.dtype.element_ty, COMPILED), (BN, 64))
        a = tl.load(x + m[None, :] * K + k + order[:, None], mask=m[None, :] < M, other=0.0)
        acc += tl.dot(values, a, input_precision=PRECISION) * scale[:, None]
    last = SPLITS == 1
    if SPLITS > 1:
        partials = parts + ((first_tile + tile) * SPLITS).to(tl.int64) * BN * BM + nn[:, None] * BM + m[None, :]
        tl.store(partials + split * BN * BM, acc)
        tl.debug_barrier()  # all of the part is written before it is counted
        last = tl.atomic_add(counters + 2 + first_tile + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            acc = tl.zeros((BN, BM), tl.float32)
            for s in range(0, SPLITS, AHEAD):
                for i in tl.static_range(AHEAD):  # loads in flight together, added in order
                    acc += tl.load(partials + (s + i) * BN * BM, mask=s + i < SPLITS, other=0.0, cache_modifier=".cg")
            tl.store(counters + 2 + first_tile + tile, 0)
    if last:
        if BIAS:
            acc += tl.load(bias + row).to(tl.float32)[:, None]
        if R > 0:
            r = tl.arange(0, RP)
            up = tl.load(b + row[:, None] * R + r[None, :], mask=r[None, :] < R, other=0.0)
            while tl.atomic_add(counters, 0, sem="acquire", scope="gpu") < DOWN:  # x A^T: by programs that were started before
                pass
            inner = tl.zeros((RP, BM), tl.float32)
            for s in range(0, SLABS, 4):
                for i in tl.static_range(4):
                    at = t + ((s + i) * tl.cdiv(M, 16) * 16 + m[None, :]) * RP + r[:, None]
                    inner += tl.load(at, mask=(m[None, :] < M) & (s + i < SLABS), other=0.0, cache_modifier=".cg")
            acc += scaling * tl.dot(up, inner, input_precision=PRECISION)
        tl.store(out + m[None, :] * N + n[:, None], acc.to(out.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))
        if R > 0:
            if tl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu") == TILES - 1:  # nobody waits any more
                tl.store(counters, 0)
                tl.store(counters + 1, 0)


@triton.jit
def _down(
    x, t, a, layer, rows, slab, ROW_BLOCKS, M, K, SLABS, counters,
    R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, SLAB: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of x A^T: float32 [layer, slab of K, row, RP]."""
    m, r, kk = rows * ROWS + tl.arange(0, ROWS), tl.arange(0, RP), tl.arange(0, BK)
    acc = tl.zeros((ROWS, RP), tl.float32)
    for k in range(slab * SLAB, tl.minimum(slab * SLAB + SLAB, K), BK):
        inside = k + kk < K
        left = tl.load(x + m[:, None] * K + k + kk[None, :], mask=(m[:, None] < M) & inside[None, :], other=0.0).to(tl.float32)
        right = tl.load(a + r[None, :] * K + k + kk[:, None], mask=(r[None, :] < R) & inside[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    tl.store(t + ((layer * SLABS + slab) * ROW_BLOCKS * ROWS + m[:, None]) * RP + r[None, :], acc)
    tl.debug_barrier()
    tl.atomic_add(counters, 1, sem="release", scope="gpu")


@triton.jit(do_not_specialize=["M", "SPLITS", "SLABS", "TILES", "DOWN"])
def _project(
    x, t, M, K, SPLITS, SLABS, TILES, DOWN, codes, parts, counters,
    out0, w0, scales0, code0, outer0, offset0, bias0, a0, b0, scaling0, N0,
    out1, w1, scales1, code1, outer1, offset1, bias1, a1, b1, scaling1, N1,
    out2, w2, scales2, code2, outer2, offset2, bias2, a2, b2, scaling2, N2,
    LAYERS: tl.constexpr, NESTED: tl.constexpr, BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, SLAB: tl.constexpr, DOWN_BK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, COMPILED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Programs 0 to DOWN - 1 make x A^T, the others a split of a tile each. A GPU starts programs in their order, so waiting ends."""
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(M, ROWS)
    if pid < DOWN:
        if R > 0:
            slab, rows, layer = pid % SLABS, pid // SLABS % row_blocks, pid // SLABS // row_blocks
            if layer == 0:
                _down(x, t, a0, 0, rows, slab, row_blocks, M, K, SLABS, counters, R, RP, ROWS, SLAB, DOWN_BK, PRECISION)
            if LAYERS > 1:
                if layer == 1:
                    _down(x, t, a1, 1, rows, slab, row_blocks, M, K, SLABS, counters, R, RP, ROWS, SLAB, DOWN_BK, PRECISION)
            if LAYERS > 2:
                if layer == 2:
                    _down(x, t, a2, 2, rows, slab, row_blocks, M, K, SLABS, counters, R, RP, ROWS, SLAB, DOWN_BK, PRECISION)
    else:
        tile, split = (pid - DOWN) % TILES, (pid - DOWN) // TILES
        n0 = tl.cdiv(N0, BN)
        n1 = tl.cdiv(N1, BN)
        step = SLABS * row_blocks * ROWS * RP
        if tile < n0:
            _tile(x, t, tile, split, out0, w0, scales0, code0, outer0, offset0, bias0, b0, scaling0, M, N0, K, SPLITS, SLABS, TILES, DOWN,
                  codes, parts, counters, 0, NESTED, BIAS0, R, RP, BM, BN, COMPILED, PRECISION, STAGES, AHEAD)  # fmt: skip
        if LAYERS > 1:
            if (tile >= n0) & (tile < n0 + n1):
                _tile(x, t + step, tile - n0, split, out1, w1, scales1, code1, outer1, offset1, bias1, b1, scaling1, M, N1, K, SPLITS,
                      SLABS, TILES, DOWN, codes, parts, counters, n0, NESTED, BIAS1, R, RP, BM, BN, COMPILED, PRECISION, STAGES,
                      AHEAD)  # fmt: skip
        if LAYERS > 2:
            if tile >= n0 + n1:
                _tile(x, t + 2 * step, tile - n0 - n1, split, out2, w2, scales2, code2, outer2, offset2, bias2, b2, scaling2, M, N2, K,
                      SPLITS, SLABS, TILES, DOWN, codes, parts, counters, n0 + n1, NESTED, BIAS2, R, RP, BM, BN, COMPILED, PRECISION,
                      STAGES, AHEAD)  # fmt: skip


@cache
def _codes(device: torch.device) -> Tensor:
    return torch.tensor(NF4, device=device)


class Plan(NamedTuple):
    """Rows of x and of W in a tile; splits of K; warps and pipeline stages."""

    bm: int
    bn: int
    splits: int
    warps: int
    stages: int


def plan(rows: int, sizes: Sequence[int], k: int, processors: int) -> Plan:
    """About three programs a multiprocessor, by a sweep over shapes of Qwen3-4B on an H100 (benchmarks/projections.py)."""
    bm, bn = max(16, triton.next_power_of_2(rows)), 128
    tiles = sum(-(-n // bn) for n in sizes)
    return Plan(bm, bn, max(1, min(13, round(3 * processors / tiles), k // 256)), 4, 3)


def project_all(x: Tensor, projections: Sequence[Projection], workspace: Workspace, planned: Plan | None = None) -> list[Tensor]:
    """See `reference.project_all`.

    Args:
        x: [M, K] contiguous, at most MOST_ROWS rows.
        projections: Up to MOST_LAYERS, all of one K, all with adapters of one rank or all without, all with double quantisation or none.
        workspace: Scratch memory.
        planned: In place of `plan`.
    """
    m, k = x.shape
    count = len(projections)
    given = [*projections] + [projections[0]] * (MOST_LAYERS - count)
    rank = given[0].lora.a.shape[0] if given[0].lora is not None else 0
    padded = max(16, triton.next_power_of_2(rank))
    sizes = [p.weight.shape[0] for p in projections]
    how = planned or plan(m, sizes, k, workspace.processors)
    tiles = sum(-(-n // how.bn) for n in sizes)
    slabs, blocks = -(-k // SLAB), -(-m // ROWS)
    down = slabs * blocks * count if rank else 0
    inner = down * ROWS * padded
    t = workspace.floats(inner + tiles * how.splits * how.bm * how.bn)
    out = [x.new_empty(m, n) for n in sizes]
    layers: list[object] = []
    for p, o in zip(given, [*out, *out[:1] * (MOST_LAYERS - count)], strict=True):
        w, lora = p.weight, p.lora
        layers += [o, w.packed, w.scales, w.code, w.outer, w.offset, o if p.bias is None else p.bias]
        layers += [o, o, 0.0] if lora is None else [lora.a, lora.b, lora.scaling]
        layers.append(w.shape[0])
    biases = [p.bias is not None for p in projections] + [False] * (MOST_LAYERS - count)
    _project[(down + tiles * how.splits,)](
        x, t, m, k, how.splits, slabs, tiles, down, _codes(x.device), t[inner:], workspace.counters(tiles + 2), *layers, count,
        len(given[0].weight.code) > 0, *biases, rank, padded, ROWS, SLAB, 64 if interpreted() else 128, how.bm, how.bn,
        not interpreted(), "ieee" if x.dtype == torch.float32 else "tf32", how.stages, max(1, min(4, (1 << 13) // (how.bm * how.bn))),
        num_warps=how.warps,
    )  # fmt: skip
    return out
