"""Attention over a cache in which a token's place follows from its position: a query at p reads the keys 0 to p and nothing else.

No mask, no repeated key-value heads: a program holds the queries of one key-value head, all its query heads beside each other, and walks
over its keys once (online softmax, FlashAttention, arXiv:2205.14135). Few rows leave multiprocessors idle: then the keys of a row are
split between programs (flash decoding), by the row's own length, and the last one to arrive puts the parts together in order.
Rows may have their first keys in common: see `reference.COLUMNS`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skillsd.kernels import reference
from skillsd.kernels.workspace import Workspace

KEYS = 64  # keys of one step
MAX_SPLITS = 16
START, COUNT, SLOT, SHARED, OWNER = (tl.constexpr(i) for i in range(reference.COLUMNS))
COLUMNS = tl.constexpr(reference.COLUMNS)


@triton.jit(do_not_specialize=["SPLITS"])
def _attend(
    q, k, v, table, out, parts, counters,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, HEADS, QUERIES, SPLITS, scale, window, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = pair // KV_HEADS, pair % KV_HEADS
    row = block * BR + tl.arange(0, BR)  # a query and one of its heads
    query, head = row // GROUP, h * GROUP + row % GROUP
    real = query < QUERIES
    d, kk = tl.arange(0, DP), tl.arange(0, KEYS)
    inside = d < D
    entry = table + b * COLUMNS
    first, count = tl.load(entry + START).to(tl.int32), tl.load(entry + COUNT).to(tl.int32)
    own, shared, owner = tl.load(entry + SLOT), tl.load(entry + SHARED).to(tl.int32), tl.load(entry + OWNER)
    position = first + query
    here = real[:, None] & inside[None, :]
    queries = tl.load(q + b * q_b + head[:, None] * q_h + query[:, None] * q_t + d[None, :], mask=here, other=0.0)
    end = first + tl.minimum((block * BR + BR - 1) // GROUP + 1, count)  # keys of the last query that is no padding
    begin = 0
    if WINDOW:
        begin = tl.maximum(0, first + block * BR // GROUP - window + 1) // KEYS * KEYS
    per = tl.cdiv(tl.cdiv(end - begin, KEYS), SPLITS) * KEYS
    low = begin + split * per
    m = tl.full((BR,), -float("inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, DP), tl.float32)
    for at in range(low, tl.minimum(low + per, end), KEYS):
        j = at + kk
        exists = (j[:, None] < end) & inside[None, :]
        slot, index = tl.where(j < shared, owner, own), tl.where(j < shared, j, j - shared)
        keys = tl.load(k + (slot * k_b + index * k_t)[:, None] + h * k_h + d[None, :], mask=exists, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if SOFTCAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)  # tanh
        seen = (j[None, :] <= position[:, None]) & (j[None, :] < end)
        if WINDOW:
            seen = seen & (position[:, None] - j[None, :] < window)
        scores = tl.where(seen, scores, -float("inf"))
        most = tl.maximum(m, tl.max(scores, 1))
        base = tl.where(most == -float("inf"), 0.0, most)  # nothing seen yet
        weight = tl.exp(scores - base[:, None])
        decay = tl.exp(m - base)
        values = tl.load(v + (slot * v_b + index * v_t)[:, None] + h * v_h + d[None, :], mask=exists, other=0.0)
        acc = tl.dot(weight.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
        total = total * decay + tl.sum(weight, 1)
        m = most
    last = SPLITS == 1
    if SPLITS > 1:
        place = pair * tl.num_programs(1) + block
        r = tl.arange(0, BR)
        partials = parts + place.to(tl.int64) * SPLITS * BR * (DP + 2)
        tl.store(partials + (split * BR + r[:, None]) * DP + d[None, :], acc)
        stats = partials + SPLITS * BR * DP
        tl.store(stats + split * BR + r, m)
        tl.store(stats + (SPLITS + split) * BR + r, total)
        tl.debug_barrier()  # all of the part is written before it is counted
        last = tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            m = tl.full((BR,), -float("inf"), tl.float32)
            total = tl.zeros((BR,), tl.float32)
            acc = tl.zeros((BR, DP), tl.float32)
            for s in range(SPLITS):
                its = tl.load(stats + s * BR + r, cache_modifier=".cg")
                most = tl.maximum(m, its)
                base = tl.where(most == -float("inf"), 0.0, most)
                decay, share = tl.exp(m - base), tl.exp(its - base)
                total = total * decay + share * tl.load(stats + (SPLITS + s) * BR + r, cache_modifier=".cg")
                other = tl.load(partials + (s * BR + r[:, None]) * DP + d[None, :], cache_modifier=".cg")
                acc = acc * decay[:, None] + share[:, None] * other
                m = most
            tl.store(counters + place, 0)
    if last:
        to = out + ((b * QUERIES + query[:, None]).to(tl.int64) * HEADS + head[:, None]) * D + d[None, :]
        total = tl.where(total > 0.0, total, 1.0)  # of rows that are padding
        tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=here)


def attend(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, workspace: Workspace, window: int | None = None, scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """See `reference.attend`. `table` and the last dimension of q, k and v are contiguous; the others may have any strides."""
    batch, heads, queries, d = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    rows = queries * group
    br = min(64, max(16, triton.next_power_of_2(rows)))
    blocks = -(-rows // br)
    splits = max(1, min(MAX_SPLITS, 3 * workspace.processors // (batch * kv_heads * blocks), -(-k.shape[2] // (2 * KEYS))))
    padded = max(16, triton.next_power_of_2(d))
    out = q.new_empty(batch, queries, heads, d)
    parts = workspace.floats(batch * kv_heads * blocks * splits * br * (padded + 2) if splits > 1 else 0)
    counters = workspace.counters(batch * kv_heads * blocks)
    _attend[(batch * kv_heads, blocks, splits)](
        q, k, v, table, out, parts, counters, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads, queries, splits,
        d**-0.5 if scale is None else scale, window or 0, softcap or 1.0, kv_heads, group, d, padded, br, KEYS, window is not None,
        softcap is not None, "ieee" if q.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
