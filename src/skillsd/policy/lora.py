"""A linear layer with an unmerged LoRA adapter, forward and backward (Hu et al., arXiv:2106.09685; QLoRA, arXiv:2305.14314).

    y = x W^T + b + s (x A^T) B^T
    dx = dy W + (dy s B) A    dA = (dy s B)^T x    dB = s dy^T (x A^T)

W is frozen, in nf4 or plain, and dequantised anew in each pass. PEFT computes the same in float32, with a copy of the output and five
passes over it; here the adapter's products are in x's dtype, as under autocast, and are added by the matrix product itself. The gradients
of A and B are summed and kept in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from skillsd.kernels import reference
from skillsd.kernels.reference import NF4, Nf4Weight
from skillsd.policy.module_patching import linear_of

Lowered = dict[tuple[int, str], tuple[Tensor, Tensor]]
"""By id of a layer and name of an adapter: a, and alpha / r * b, in the base's dtype."""


def linear_forward(layer: Any, lowered: Lowered | None = None) -> Callable[..., Tensor]:
    """What computes the layer's forward: ours for a vanilla LoRA on a frozen linear layer, else the layer's own.

    Args:
        layer: A linear layer or PEFT's around one.
        lowered: Adapters that somebody keeps in the base's dtype; others are cast in each forward.
    """
    own = type(layer).forward
    linear = linear_of(layer)
    vanilla = isinstance(layer, LoraLayer) and not layer.lora_variant and not any(b.bias is not None for b in layer.lora_B.values())
    if not vanilla or not _frozen(linear):
        return lambda x, *args, **kwargs: own(layer, x, *args, **kwargs)
    weight = _weight(linear)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (name,) = layer.active_adapters
        dropout = layer.lora_dropout[name]
        drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        if args or kwargs or drops or layer.merged or torch.is_autocast_enabled(x.device.type):
            return own(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
        if layer.disable_adapters:
            return torch.nn.functional.linear(x, weight(x.dtype), linear.bias)
        a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        low = (lowered or {}).get((id(layer), name))
        if low is None or low[0].dtype != x.dtype:
            with torch.no_grad():
                low = a.to(x.dtype), (scaling * b).to(x.dtype)
        if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad):
            return LoraLinear.apply(x, a, b, *low, weight, linear.bias, scaling)  # type: ignore[no-any-return, no-untyped-call]
        return _forward(x, *low, weight, linear.bias)[0].view(*x.shape[:-1], -1)

    return forward


def _frozen(linear: Any) -> bool:
    plain = type(linear) is nn.Linear or getattr(linear.weight, "quant_state", None) is not None
    return plain and not any(p.requires_grad for p in linear.parameters())


def _weight(linear: Any) -> Callable[[torch.dtype], Tensor]:
    """What gives the base's weight [N, K] in a dtype."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return lambda dtype: linear.weight.to(dtype)
    if (packed := nf4_weight(linear)) is not None:
        from skillsd.kernels.dequantise import dequantise

        return lambda dtype: dequantise(packed, dtype)
    return lambda dtype: dequantize_4bit(linear.weight.data, state).to(dtype)


def nf4_weight(layer: Any) -> Nf4Weight | None:
    """A bitsandbytes layer's weight as it lies in memory; None if it is none, or in a form that the kernel does not read."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if state is None or state.quant_type != "nf4" or state.blocksize != reference.BLOCK:
        return None
    packed, n, k = layer.weight.data, layer.out_features, layer.in_features
    if k % reference.BLOCK or packed.dtype != torch.uint8 or packed.numel() != n * k // 2 or not packed.is_contiguous():
        return None
    if not torch.equal(state.code.cpu(), torch.tensor(NF4, device="cpu")):
        return None
    none = state.absmax.new_empty(0, dtype=torch.float32)
    if not state.nested:
        return Nf4Weight(packed, state.absmax, none, none, 0.0, (n, k))
    if state.state2.blocksize != reference.OUTER:
        return None
    return Nf4Weight(packed, state.absmax, state.state2.code, state.state2.absmax, float(state.offset), (n, k))


def _forward(x: Tensor, a: Tensor, b: Tensor, weight: Callable[[torch.dtype], Tensor], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    y = torch.nn.functional.linear(flat, weight(x.dtype), None if bias is None else bias.to(x.dtype))
    inner = flat @ a.T
    return y.addmm_(inner, b.T), inner


class LoraLinear(torch.autograd.Function):
    """See the head of this file. x [..., K] -> [..., N].

    The gradients are those of a [r, K] and b [N, r], float32; what is computed with are low_a and low_b, as `_forward` takes them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, low_a: Tensor, low_b: Tensor, weight: Callable[[torch.dtype], Tensor],
        bias: Tensor | None, scaling: float,
    ) -> Tensor:  # fmt: skip
        y, inner = _forward(x, low_a, low_b, weight, bias)
        ctx.save_for_backward(x, inner)
        ctx.low = low_a, low_b  # written again, with the same values, by a further forward: no concern of autograd's
        ctx.weight, ctx.scaling = weight, scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, inner), (a, b) = ctx.saved_tensors, ctx.low
        flat, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        through = dy @ b  # [M, r]
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ ctx.weight(dy.dtype)).addmm_(through, a).view(x.shape)
        if ctx.needs_input_grad[1]:
            da, db = _summed(through.T, flat), _summed(dy.T, inner).mul_(ctx.scaling)
        return dx, da, db, None, None, None, None, None


def _summed(p: Tensor, q: Tensor) -> Tensor:
    """p q in float32."""
    if p.is_cuda and p.dtype != torch.float32:
        return torch.mm(p, q, out_dtype=torch.float32)
    return p.float() @ q.float()
