"""The learner's forward and backward with the kernels: LoRA layers, RMSNorms, SwiGLUs, rotary embedding, and attention over packed rows.

FlashAttention takes the rows' cumulative lengths (cu_seqlens, see `packed`). On a CPU plain attention computes the same row by row.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from skillsd.errors import ConfigError
from skillsd.kernels import why_not
from skillsd.policy.lora import Lowered, linear_forward
from skillsd.policy.module_patching import Replacement

log = logging.getLogger(__name__)

ATTENTION = "skillsd_packed"
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def training_kernels(base: Any, wanted: bool, device: torch.device) -> TrainingKernels | None:
    """What stands in for the modules of `base` in the learner's forward on `device`, or None, with the reason in the log."""
    reason = why_not(device, base.dtype) if wanted else "it is set to false"
    if reason:
        log.info("model.policy.kernels: %s: the learner goes on without them.", reason)
        return None
    return TrainingKernels(base)


class TrainingKernels(Replacement):
    """Forward and backward of the learner: LoRA layers (`lora`), RMSNorms, SwiGLUs, rotary embedding, attention over packed rows.

    Attributes:
        packs: True if rows go without padding: not where attention has a soft cap or is set to be eager.
    """

    def __init__(self, base: Any) -> None:
        from skillsd.kernels import training

        config = base.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        self.packs = not kinds and config._attn_implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is None
        super().__init__(base, ATTENTION if self.packs else None)
        self.training = training
        self.dtype, self.lowered = base.dtype, Lowered()
        self.layers = [m for m in base.modules() if isinstance(m, LoraLayer)]
        self.forwards += [(m, linear_forward(m, self.lowered)) for m in self.layers]
        self.replace_pointwise(base, training.RmsNorm.apply, training.SiluMul.apply, training.Rotate.apply)
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
