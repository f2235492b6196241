"""Rows of any length as one sequence without padding, and in micro-batches.

Position ids start anew with each row, and attention is causal within it: a block-diagonal mask that nobody writes down. Where there are no
kernels for that (`training_kernels`), rows are padded to the longest, on the right, which a causal model never sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSequence:
    """One sequence to score: ids before (`prompt_ids`), ids after, and which of those after were actions."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    action_mask: Sequence[bool]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)


@dataclass(frozen=True)
class Packed:
    """B sequences as a forward takes them: all their tokens but the last of each.

    Args:
        ids: [1, M] without padding, or [B, W].
        cu_seqlens: int32 [B + 1], where each row begins in M, and M; None with padding.
        position_ids: [1, M] or [1, W].
        max_seqlen: Tokens of the longest row.
        targets: The N action tokens, row after row.
        logits_indices: int64 [N], the places in `ids` flattened whose logits predict the targets.
        scatter_indices: int64 [N], the places of the targets in the action masks, [B, T] flattened.
        shape: (B, T), with T tokens in the longest `token_ids`.
    """

    ids: Tensor
    cu_seqlens: Tensor | None
    position_ids: Tensor
    max_seqlen: int
    targets: Tensor
    logits_indices: Tensor
    scatter_indices: Tensor
    shape: tuple[int, int]


def pack(sequences: Sequence[TokenSequence], padded: bool, pad_id: int, device: torch.device) -> Packed:
    """See `Packed`. Rows of one length need no cu_seqlens."""
    B, T = len(sequences), max(len(s.token_ids) for s in sequences)
    prompts, sizes = torch.tensor([(len(s.prompt_ids), len(s.token_ids)) for s in sequences]).unbind(1)
    flat = torch.tensor(list(chain.from_iterable(x for s in sequences for x in (s.prompt_ids, s.token_ids))))
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[_leading(sizes, T)] = torch.tensor(list(chain.from_iterable(s.action_mask for s in sequences)), dtype=torch.bool)
    rows, cols = mask.nonzero(as_tuple=True)
    lengths = prompts + sizes
    ends, width = prompts[rows] + cols, int(lengths.max()) - 1
    targets = flat[(lengths.cumsum(0) - lengths)[rows] + ends]
    cu_seqlens = None
    if padded or int(lengths.min()) == int(lengths.max()):
        ids = torch.full((B, width), pad_id)
        fed = _leading(lengths, width + 1)
        fed[torch.arange(B), lengths - 1] = False
        ids[fed[:, :-1]] = flat[_but_last(lengths)]
        begins = torch.arange(B) * width
        positions = torch.arange(width)[None]
    else:
        ids = flat[_but_last(lengths)][None]
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), (lengths - 1).cumsum(0)])
        begins = cu_seqlens[:-1]
        positions = (torch.arange(ids.shape[1]) - begins.repeat_interleave(lengths - 1))[None]
        cu_seqlens = cu_seqlens.int().to(device)
    moved = (x.to(device) for x in (ids, positions, targets, begins[rows] + ends - 1, rows * T + cols))
    ids, positions, targets, logits_indices, scatter_indices = moved
    return Packed(ids, cu_seqlens, positions, width, targets, logits_indices, scatter_indices, (B, T))


def _leading(lengths: Tensor, width: int) -> Tensor:
    """The first `lengths[b]` of `width` columns: bool [B, width]. Indexing with it takes them row by row."""
    return torch.arange(width) < lengths[:, None]


def _but_last(lengths: Tensor) -> Tensor:
    keep = torch.ones(int(lengths.sum()), dtype=torch.bool)
    keep[lengths.cumsum(0) - 1] = False
    return keep


def micro_batches(lengths: Sequence[int], token_budget: int, padded: bool = True) -> list[list[int]]:
    """Split rows into micro-batches of at most `token_budget` tokens (a longer row stands alone).

    Args:
        lengths: Tokens of each row.
        token_budget: Most tokens together.
        padded: Count what rows take when padded to the longest of their micro-batch.

    Returns:
        lists of row indices; rows of similar length go together, in a fixed order.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batches: list[list[int]] = []
    size = 0
    for i in order:
        size = lengths[i] * (len(batches[-1]) + 1 if batches else 1) if padded else size + lengths[i]
        if batches and size <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            size = lengths[i]
    return batches
