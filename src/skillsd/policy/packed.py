"""Rows of any length as one sequence without padding, and the learner's forward over it.

Position ids start anew with each row and attention is causal within it (a block-diagonal mask that nobody writes down): FlashAttention
takes the rows' cumulative lengths (cu_seqlens). Where there is no FlashAttention, rows are padded to the longest, on the right, which a
causal model never sees.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from skillsd.errors import ConfigError
from skillsd.policy.kernels import why_not
from skillsd.policy.lora import Lowered, linear_forward
from skillsd.policy.module_patching import ROTARY, Replacement, is_swiglu, rms_eps, rotary_modules, rotation

log = logging.getLogger(__name__)

ATTENTION = "skillsd_packed"
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


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


def learn(base: Any, wanted: bool, device: torch.device) -> Learner | None:
    """What stands in for the modules of `base` in the learner's forward on `device`, or None, with the reason in the log."""
    reason = why_not(device, base.dtype) if wanted else "it is set to false"
    if reason:
        log.info("model.policy.kernels: %s: the learner goes on without them.", reason)
        return None
    return Learner(base)


class Learner(Replacement):
    """Forward and backward of the learner: LoRA layers (`lora`), RMSNorms, SwiGLUs, rotary embedding, attention over packed rows.

    Attributes:
        packs: Whether rows go without padding: not where attention has a soft cap or is set to be eager.
    """

    def __init__(self, base: Any) -> None:
        from skillsd.policy.kernels import training

        config = base.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        self.packs = not kinds and config._attn_implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is None
        super().__init__(base, ATTENTION if self.packs else None)
        self.training = training
        self.dtype, self.lowered = base.dtype, Lowered()
        self.layers = [m for m in base.modules() if isinstance(m, LoraLayer)]
        self.forwards += [(m, linear_forward(m, self.lowered)) for m in self.layers]
        for m in base.modules():
            if isinstance(m, LoraLayer):
                continue
            if (eps := rms_eps(m)) is not None and not m.weight.requires_grad:
                self.forwards.append((m, lambda x, m=m, e=eps: training.RmsNorm.apply(x, m.weight, e)))
            elif is_swiglu(m):
                self.forwards.append((m, lambda x, m=m: m.down_proj(training.SiluMul.apply(m.gate_proj(x), m.up_proj(x)))))
        self.rotary = {n: rotation(getattr(sys.modules[n], ROTARY), training.Rotate.apply) for n in rotary_modules(base)}
        log.info("kernels serve the learner: %d modules, %s packing.", len(self.forwards), "with" if self.packs else "no")

    def lower(self, name: str) -> None:
        """Cast an adapter to the base's dtype, all of it at once. To be called before each forward: adapters change."""
        a, b = ([part[name].weight.detach() for m in self.layers for part in [getattr(m, k)]] for k in ("lora_A", "lora_B"))
        for m, x, y in zip(self.layers, a, b, strict=True):
            if (id(m), name) not in self.lowered:
                self.lowered[id(m), name] = torch.empty_like(x, dtype=self.dtype), torch.empty_like(y, dtype=self.dtype)
        low = [self.lowered[id(m), name] for m in self.layers]
        if low:
            torch._foreach_copy_([x for x, _ in low], a)
            torch._foreach_copy_([y for _, y in low], torch._foreach_mul(b, [m.scaling[name] for m in self.layers]))

    def logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
        """See `logprobs.selected_logprobs`; the head is a matrix."""
        return self.training.HeadLogprobs.apply(hidden.to(weight.dtype), weight, targets, temperature, chunk)  # type: ignore[no-any-return]

    def arguments(self, cu_seqlens: Tensor | None, max_seqlen: int) -> dict[str, Any]:
        """What a forward over packed rows is given beside ids and positions."""
        if cu_seqlens is None:
            return {}
        mask: Any = cu_seqlens.view(1, 1, 1, -1)
        if len(kinds := set(getattr(self.config, "layer_types", None) or [])) > 1:
            mask = dict.fromkeys(kinds, mask)
        return {"attention_mask": mask, "max_length_q": max_seqlen, "max_length_k": max_seqlen}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None,
        sliding_window: int | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Causal attention. query [B, H, W, D], key and value [B, H_kv, W, D]; `mask` is None or holds the rows' cu_seqlens."""
        if odd := [k for k in ("s_aux", "position_bias", "softcap") if kwargs.get(k) is not None]:
            raise ConfigError(f"model.policy.kernels: they know no attention with {odd[0]}: set it to false.")
        cu_seqlens = None if mask is None else mask.flatten()
        window = sliding_window if sliding_window is not None and sliding_window < query.shape[2] else None
        if cu_seqlens is None and window is None:
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
            return out.transpose(1, 2), None
        max_seqlen = kwargs.get("max_length_q")
        if cu_seqlens is None:
            max_seqlen = query.shape[2]
            cu_seqlens = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device) * max_seqlen
        if max_seqlen is None:  # an architecture that does not hand it on
            max_seqlen = int(cu_seqlens.diff().max())
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
        out = blocks(q, k, v, cu_seqlens, max_seqlen, scaling, window)
        return out.view(len(query), -1, *out.shape[1:]), None


def blocks(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None, window: int | None) -> Tensor:
    """Causal attention within each of the rows that `cu_seqlens` separates. q [M, H, D], k and v [M, H_kv, D] -> [M, H, D].

    A query at p sees positions j with p - window < j <= p.
    """
    if q.is_cuda:
        back = -1 if window is None else window - 1
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(back, 0), **GROUPED)  # type: ignore[return-value, arg-type]
    out = []
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        j = torch.arange(b - a)
        seen = (j <= j[:, None]) & (j > j[:, None] - (window or b - a))
        x, y, z = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
        out.append(scaled_dot_product_attention(x, y, z, seen, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


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
