"""Decoding with the kernels: what a model's modules compute stays the same, fewer and faster launches compute it.

`DecodingKernels` finds what it can serve in any decoder of transformers: linear layers in nf4 with or without a LoRA adapter, those that
read the same input together; RMSNorms, SwiGLUs and rotary embeddings, each tried on an example; attention through transformers'
AttentionInterface. `installed()` puts it in place for a rollout's forwards and takes it away again: the learner and a checkpoint never see
it. Weights and adapters are read where they are; nothing is merged or copied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from skillsd.errors import ConfigError
from skillsd.kernels import why_not
from skillsd.kernels.reference import COLUMNS, Lora, Nf4Weight, Projection
from skillsd.kernels.workspace import Workspace
from skillsd.policy.lora import linear_forward, nf4_weight
from skillsd.policy.module_patching import Replacement, linear_of

log = logging.getLogger(__name__)

ATTENTION = "skillsd_slots"
TOGETHER = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Names of sibling layers that most decoders give the same input; where they get different ones, each is run alone."""


def decoding_kernels(policy: Any) -> DecodingKernels | None:
    """The kernels for a policy, or None, with the reason in the log, where they can't serve it."""
    reason = "the base is sharded" if policy.sharded else why_not(policy.device, policy.base.dtype)
    if reason:
        log.info("data.rollout.kernels: %s: decoding goes on without them.", reason)
        return None
    return DecodingKernels(policy.base)


class DecodingKernels(Replacement):
    """What stands in for the modules of one model in a rollout.

    Args:
        base: A causal language model, with or without PEFT's layers in it.

    Attributes:
        projections, norms, gates: How many modules of each kind are served: linear layers, RMSNorms, SwiGLUs.
    """

    def __init__(self, base: Any) -> None:
        from skillsd.kernels import attention, elementwise, projections

        super().__init__(base, ATTENTION)
        self.workspace = Workspace(next(base.parameters()).device)
        self.write, self._attention = elementwise.write, attention
        for served in _groups(base, projections.MOST_LAYERS):
            group = _Group(served, self.workspace, projections.project_all, projections.MOST_ROWS)
            self.forwards += [(m, group.forward(i)) for i, (m, _) in enumerate(served)]
        self.projections = len(self.forwards)
        self.norms, self.gates = self.replace_pointwise(base, elementwise.rms_norm, elementwise.silu_mul, elementwise.rotate)
        log.info(
            "kernels serve %d linear layers, %d RMSNorms, %d SwiGLUs, %s rotary embedding and the attention of %s.", self.projections,
            self.norms, self.gates, "the" if self.rotary else "no", type(base).__name__,
        )  # fmt: skip

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None,
        sliding_window: int | None = None, softcap: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """`key` and `value` are a cache's whole stores; `mask` is a row table, int64 [B, 1, 1, COLUMNS] (see kernels.reference)."""
        if odd := [k for k in ("s_aux", "position_bias") if kwargs.get(k) is not None]:
            raise ConfigError(f"data.rollout.kernels: they know no attention with {odd[0]}: set it to false.")
        return self._attention.attend(query, key, value, mask.view(-1, COLUMNS), self.workspace, sliding_window, scaling, softcap), None


class _Group:
    """Layers that read the same input, as one launch: whoever is asked first computes for all."""

    def __init__(
        self, served: Sequence[tuple[Any, Nf4Weight]], workspace: Workspace, run: Callable[..., list[Tensor]], max_rows: int
    ) -> None:
        self.layers, self.weights = zip(*served, strict=True)
        self.workspace, self.run, self.max_rows = workspace, run, max_rows
        self.given: Tensor | None = None
        self.out: dict[int, Tensor] = {}

    def forward(self, i: int) -> Callable[..., Tensor]:
        """What stands in for layer i's forward. More rows than the kernel is made for go through `lora.linear_forward`."""
        usual = linear_forward(self.layers[i])

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if x.numel() // x.shape[-1] > self.max_rows:
                return usual(x, *args, **kwargs)
            if self.given is not x or i not in self.out:
                asked = range(len(self.layers)) if i == 0 else [i]
                flat = x.reshape(-1, x.shape[-1]).contiguous()
                made = self.run(flat, [self._projection(k) for k in asked], self.workspace)
                self.given, self.out = x, {k: y.view(*x.shape[:-1], -1) for k, y in zip(asked, made, strict=True)}
            y = self.out.pop(i)
            if not self.out:
                self.given = None
            return y

        return forward

    def _projection(self, i: int) -> Projection:
        layer, lora = self.layers[i], None
        if isinstance(layer, LoraLayer) and not layer.disable_adapters:
            (name,) = layer.active_adapters
            lora = Lora(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        return Projection(self.weights[i], linear_of(layer).bias, lora)


def _groups(base: nn.Module, most: int) -> list[list[tuple[nn.Module, Nf4Weight]]]:
    """Every layer that can be served and its weight, in groups of those that read the same input."""
    inside = {id(m.base_layer) for m in base.modules() if isinstance(m, LoraLayer)}
    found = []
    for parent in base.modules():
        if isinstance(parent, LoraLayer):
            continue
        plain = {n: m for n, m in parent.named_children() if id(m) not in inside and _plain(m)}
        quantised = {n: (m, w) for n, m in plain.items() if (w := nf4_weight(linear_of(m))) is not None}
        for names in TOGETHER:
            some = [quantised[n] for n in names if n in quantised]
            if len(some) == len(names) <= most and len({_kind(m, w) for m, w in some}) == 1:
                found.append(some)
                quantised = {n: one for n, one in quantised.items() if n not in names}
        found += [[one] for one in quantised.values()]
    return found


def _kind(m: Any, weight: Nf4Weight) -> tuple[Any, ...]:
    """What layers of one launch must share."""
    return weight.shape[1], len(weight.code) > 0, *(sorted(m.r.values()) if isinstance(m, LoraLayer) else ())


def _plain(m: Any) -> bool:
    """Return whether a layer carries nothing but vanilla LoRA."""
    return not isinstance(m, LoraLayer) or (not m.lora_variant and not any(b.bias is not None for b in m.lora_B.values()))
