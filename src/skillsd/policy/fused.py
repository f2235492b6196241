"""Decoding with the kernels: what a model's modules compute stays the same, fewer and faster launches compute it.

`Fused` finds what it can serve in any decoder of transformers: linear layers in nf4 with or without a LoRA adapter, those that read the
same input together; RMSNorms, SwiGLUs and rotary embeddings, each tried on an example; attention through transformers'
AttentionInterface. `installed()` puts it in place for a rollout's forwards and takes it away again: the learner and a checkpoint never see
it. Weights and adapters are read where they are; nothing is merged or copied.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface

from skillsd.errors import ConfigError
from skillsd.policy.kernels import reference, why_not
from skillsd.policy.kernels.reference import NF4, Lora, Nf4Weight, Projection
from skillsd.policy.kernels.workspace import Workspace

log = logging.getLogger(__name__)

ATTENTION = "skillsd_slots"
ROTARY = "apply_rotary_pos_emb"
TOGETHER = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Names of sibling layers that most decoders give the same input; where they get different ones, each is run alone."""


def fuse(policy: Any) -> Fused | None:
    """The kernels for a policy, or None, with the reason in the log, where they can't serve it."""
    reason = why_not(policy.device, policy.base.dtype)
    if reason:
        log.info("rollout.kernels: %s: decoding goes on without them.", reason)
        return None
    return Fused(policy.base)


class Fused:
    """What stands in for the modules of one model.

    Args:
        base: A causal language model, with or without PEFT's layers in it.

    Attributes:
        projections, norms, gates: How many modules of each kind are served: linear layers, RMSNorms, SwiGLUs.
        rotary: The modules whose `apply_rotary_pos_emb` is.
    """

    def __init__(self, base: Any) -> None:
        from skillsd.policy.kernels import attention, elementwise, projections

        self.config = base.config.get_text_config()
        self.workspace = Workspace(next(base.parameters()).device)
        self.write = elementwise.write
        self.forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        for served in _groups(base, projections.MOST_LAYERS):
            group = _Group(served, self.workspace, projections.project_all, projections.MOST_ROWS)
            self.forwards += [(m, group.forward(i)) for i, (m, _) in enumerate(served)]
        self.projections = len(self.forwards)
        for m in base.modules():
            if (eps := _rms_eps(m)) is not None:
                self.forwards.append((m, lambda x, w=m.weight, e=eps: elementwise.rms_norm(x, w, e)))
        self.norms = len(self.forwards) - self.projections
        for m in base.modules():
            if _is_swiglu(m):
                self.forwards.append((m, lambda x, m=m: m.down_proj(elementwise.silu_mul(m.gate_proj(x), m.up_proj(x)))))
        self.gates = len(self.forwards) - self.projections - self.norms
        self.rotary = {n: _rotation(getattr(sys.modules[n], ROTARY), elementwise.rotate) for n in _rotary(base)}

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None,
            sliding_window: int | None = None, softcap: float | None = None, **kwargs: Any,
        ) -> tuple[Tensor, None]:  # fmt: skip
            """`key` and `value` are a cache's whole stores; `mask` is int64 [B, 1, 1, 5]: where rows lie (see rollout.cache)."""
            if odd := [k for k in ("s_aux", "position_bias") if kwargs.get(k) is not None]:
                raise ConfigError(f"data.init_args.rollout.kernels: they know no attention with {odd[0]}: set it to false.")
            return attention.attend(query, key, value, mask.view(-1, 5), self.workspace, sliding_window, scaling, softcap), None

        self._attend = attend
        log.info(
            "kernels serve %d linear layers, %d RMSNorms, %d SwiGLUs, %s rotary embedding and the attention of %s.", self.projections,
            self.norms, self.gates, "the" if self.rotary else "no", type(base).__name__,
        )  # fmt: skip

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Forwards in this context go through the kernels; their attention takes places in place of a mask. Not re-entrant."""
        before = self.config._attn_implementation
        rotary = {n: getattr(sys.modules[n], ROTARY) for n in self.rotary}
        AttentionInterface.register(ATTENTION, self._attend)
        self.config._attn_implementation = ATTENTION
        for m, forward in self.forwards:
            m.__dict__["forward"] = forward  # in front of the class's own
        for n, function in self.rotary.items():
            setattr(sys.modules[n], ROTARY, function)
        try:
            yield
        finally:
            for m, _ in self.forwards:
                m.__dict__.pop("forward", None)
            for n, function in rotary.items():
                setattr(sys.modules[n], ROTARY, function)
            self.config._attn_implementation = before


class _Group:
    """Layers that read the same input, as one launch: whoever is asked first computes for all."""

    def __init__(
        self, served: Sequence[tuple[Any, Nf4Weight]], workspace: Workspace, run: Callable[..., list[Tensor]], most_rows: int
    ) -> None:
        self.layers, self.weights = zip(*served, strict=True)
        self.workspace, self.run, self.most_rows = workspace, run, most_rows
        self.given: Tensor | None = None
        self.out: dict[int, Tensor] = {}

    def forward(self, i: int) -> Callable[..., Tensor]:
        """What stands in for layer i's forward. More rows than the kernel is made for go the usual way."""
        usual = type(self.layers[i]).forward
        layer = self.layers[i]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if x.numel() // x.shape[-1] > self.most_rows:
                return usual(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
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
        return Projection(self.weights[i], _linear(layer).bias, lora)


def _linear(m: Any) -> Any:
    return m.base_layer if isinstance(m, LoraLayer) else m


def _groups(base: nn.Module, most: int) -> list[list[tuple[nn.Module, Nf4Weight]]]:
    """Every layer that can be served and its weight, in groups of those that read the same input."""
    inside = {id(m.base_layer) for m in base.modules() if isinstance(m, LoraLayer)}
    found = []
    for parent in base.modules():
        if isinstance(parent, LoraLayer):
            continue
        plain = {n: m for n, m in parent.named_children() if id(m) not in inside and _plain(m)}
        mine = {n: (m, w) for n, m in plain.items() if (w := nf4_weight(_linear(m))) is not None}
        for names in TOGETHER:
            some = [mine[n] for n in names if n in mine]
            if len(some) == len(names) <= most and len({_kind(m, w) for m, w in some}) == 1:
                found.append(some)
                mine = {n: one for n, one in mine.items() if n not in names}
        found += [[one] for one in mine.values()]
    return found


def _kind(m: Any, weight: Nf4Weight) -> tuple[Any, ...]:
    """What layers of one launch must share."""
    return weight.shape[1], len(weight.code) > 0, *(sorted(m.r.values()) if isinstance(m, LoraLayer) else ())


def _plain(m: Any) -> bool:
    """Whether a layer carries nothing but vanilla LoRA."""
    return not isinstance(m, LoraLayer) or (not m.lora_variant and not any(b.bias is not None for b in m.lora_B.values()))


def nf4_weight(layer: Any) -> Nf4Weight | None:
    """A bitsandbytes layer's weight as it lies in memory; None if it is none, or in a form that the kernel does not read."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if state is None or state.quant_type != "nf4" or state.blocksize != reference.BLOCK:
        return None
    packed, n, k = layer.weight.data, layer.out_features, layer.in_features
    if k % reference.BLOCK or packed.dtype != torch.uint8 or packed.numel() != n * k // 2 or not packed.is_contiguous():
        return None
    if not torch.equal(state.code.cpu(), torch.tensor(NF4)):
        return None
    none = state.absmax.new_empty(0, dtype=torch.float32)
    if not state.nested:
        return Nf4Weight(packed, state.absmax, none, none, 0.0, (n, k))
    if state.state2.blocksize != reference.OUTER:
        return None
    return Nf4Weight(packed, state.absmax, state.state2.code, state.state2.absmax, float(state.offset), (n, k))


def _rms_eps(m: nn.Module) -> float | None:
    """The epsilon of a module that computes `reference.rms_norm`, found by trying it; None for any other."""
    eps, weight = getattr(m, "variance_epsilon", getattr(m, "eps", None)), getattr(m, "weight", None)
    if not type(m).__name__.endswith("RMSNorm") or eps is None or weight is None or weight.ndim != 1:
        return None
    probe = torch.linspace(-2, 2, 3 * len(weight), device=weight.device, dtype=weight.dtype).view(3, -1)
    return float(eps) if torch.allclose(m(probe), reference.rms_norm(probe, weight, eps)) else None


def _is_swiglu(m: Any) -> bool:
    """Whether a module computes down(silu(gate(x)) * up(x)), found by trying it."""
    if not all(isinstance(getattr(m, n, None), nn.Module) for n in ("gate_proj", "up_proj", "down_proj")):
        return False
    width = getattr(_linear(m.gate_proj), "in_features", None)
    if width is None:
        return False
    p = next(p for p in m.parameters() if p.is_floating_point())
    probe, training = torch.linspace(-1, 1, 2 * width, device=p.device).view(1, 2, width), m.training
    m.eval()
    with torch.no_grad():
        x = probe.to(getattr(_linear(m.gate_proj), "compute_dtype", None) or p.dtype)
        same = torch.equal(m(x), m.down_proj(reference.silu_mul(m.gate_proj(x), m.up_proj(x))))
    m.train(training)
    return same


def _rotary(base: nn.Module) -> list[str]:
    """Python modules of attention layers whose rotary embedding is `reference.rotate`, found by trying it."""
    found = []
    for name in dict.fromkeys(type(m).__module__ for m in base.modules() if hasattr(m, "q_proj")):
        function = getattr(sys.modules[name], ROTARY, None)
        q, k, angle = torch.linspace(-1, 1, 48).view(1, 3, 2, 8), torch.linspace(0, 1, 16).view(1, 1, 2, 8), torch.linspace(0, 3, 16)
        given = q, k, angle.cos().view(1, 2, 8), angle.sin().view(1, 2, 8)
        try:
            if function and all(map(torch.equal, function(*given), reference.rotate(*given))):
                found.append(name)
        except (TypeError, ValueError, RuntimeError):
            pass  # it takes something else
    return found


def _rotation(usual: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = cos.shape[-1] == q.shape[-1] and cos.dtype == q.dtype  # some models turn a part of each head
        return kernel(q, k, cos, sin) if whole and not args and not kwargs else usual(q, k, cos, sin, *args, **kwargs)

    return rotate
