"""Forwards that stand in for those of a model's modules for a while, and what they can stand in for: found by trying it on an example."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface

from skillsd.kernels import reference

ROTARY = "apply_rotary_pos_emb"
Function = Callable[..., Any]


class Replacement(ABC):
    """What stands in for the modules of one model while it is `installed`.

    Args:
        base: A causal language model, with or without PEFT's layers in it.
        attention: The name under which `attend` is given to transformers; None leaves the model's attention alone.

    Attributes:
        forwards: Modules and what is called in place of their forward.
        rotary: By Python module, what is called in place of its `apply_rotary_pos_emb`.
        active: True if it is installed.
    """

    def __init__(self, base: Any, attention: str | None) -> None:
        self.config, self.attention = base.config.get_text_config(), attention
        self.forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        self.rotary: dict[str, Function] = {}
        self.active = False

    def replace_pointwise(self, base: nn.Module, rms_norm: Function, silu_mul: Function, rotate: Function) -> tuple[int, int]:
        """Put these in place of RMSNorms, SwiGLUs and rotary embeddings, see `reference`; how many norms and SwiGLUs there are."""
        norms = [(m, eps) for m in base.modules() if (eps := rms_eps(m)) is not None and not m.weight.requires_grad]
        gates = [m for m in base.modules() if is_swiglu(m)]
        self.forwards += [(m, lambda x, m=m, eps=eps: rms_norm(x, m.weight, eps)) for m, eps in norms]
        self.forwards += [(m, lambda x, m=m: m.down_proj(silu_mul(m.gate_proj(x), m.up_proj(x)))) for m in gates]
        self.rotary = {n: rotation(getattr(sys.modules[n], ROTARY), rotate) for n in rotary_modules(base)}
        return len(norms), len(gates)

    @abstractmethod
    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """In place of the model's attention: see transformers' AttentionInterface."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Forwards in this context are the replaced ones. Not re-entrant."""
        before = self.config._attn_implementation
        rotary = {n: getattr(sys.modules[n], ROTARY) for n in self.rotary}
        if self.attention is not None:
            AttentionInterface.register(self.attention, self.attend)
            self.config._attn_implementation = self.attention
        for m, forward in self.forwards:
            m.__dict__["forward"] = forward  # in front of the class's own
        for n, function in self.rotary.items():
            setattr(sys.modules[n], ROTARY, function)
        self.active = True
        try:
            yield
        finally:
            self.active = False
            for m, _ in self.forwards:
                m.__dict__.pop("forward", None)
            for n, function in rotary.items():
                setattr(sys.modules[n], ROTARY, function)
            self.config._attn_implementation = before


class Reinstalled(AbstractContextManager[None]):
    """`installed()`, as often as it is entered: a checkpointed forward may be recomputed by more than one backward."""

    def __init__(self, replacement: Replacement) -> None:
        self.replacement = replacement

    def __enter__(self) -> None:
        self.context: AbstractContextManager[None] = nullcontext() if self.replacement.active else self.replacement.installed()
        self.context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.context.__exit__(*error)


def linear_of(m: Any) -> Any:
    return m.base_layer if isinstance(m, LoraLayer) else m


def rms_eps(m: nn.Module) -> float | None:
    """The epsilon of a module that computes `reference.rms_norm`, found by trying it; None for any other."""
    eps, weight = getattr(m, "variance_epsilon", getattr(m, "eps", None)), getattr(m, "weight", None)
    if not type(m).__name__.endswith("RMSNorm") or eps is None or weight is None or weight.ndim != 1:
        return None
    probe = torch.linspace(-2, 2, 3 * len(weight), device=weight.device, dtype=weight.dtype).view(3, -1)
    return float(eps) if torch.allclose(m(probe), reference.rms_norm(probe, weight, eps)) else None


def is_swiglu(m: Any) -> bool:
    """Return whether a module computes down(silu(gate(x)) * up(x)), found by trying it."""
    if not all(isinstance(getattr(m, n, None), nn.Module) for n in ("gate_proj", "up_proj", "down_proj")):
        return False
    width = getattr(linear_of(m.gate_proj), "in_features", None)
    if width is None:
        return False
    p = next(p for p in m.parameters() if p.is_floating_point())
    probe, modes = torch.linspace(-1, 1, 2 * width, device=p.device).view(1, 2, width), [(c, c.training) for c in m.modules()]
    m.eval()
    with torch.no_grad():
        x = probe.to(getattr(linear_of(m.gate_proj), "compute_dtype", None) or p.dtype)
        same = torch.equal(m(x), m.down_proj(reference.silu_mul(m.gate_proj(x), m.up_proj(x))))
    for c, training in modes:
        c.training = training
    return same


def rotary_modules(base: nn.Module) -> list[str]:
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


def rotation(usual: Function, kernel: Function) -> Function:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = cos.shape[-1] == q.shape[-1] and cos.dtype == q.dtype  # some models turn a part of each head
        return kernel(q, k, cos, sin) if whole and not args and not kwargs else usual(q, k, cos, sin, *args, **kwargs)

    return rotate
