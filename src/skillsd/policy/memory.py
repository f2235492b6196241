"""What a run takes of memory: estimates on the safe side, from shapes alone (benchmarks/iteration.py --cap checks them); and its peak."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skillsd.policy.policy import Policy

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

WORK = 3 << 27
"""Bytes for libraries' workspaces, recorded graphs and what is lost between blocks: 0.375 GiB."""


@dataclass(frozen=True)
class Demand:
    """What decides how much an update takes.

    Args:
        longest: Tokens of the longest row.
        micro_batch: Most tokens in one forward and backward.
        chunk: Positions whose logits exist at one time.
        checkpointing: True if activations are recomputed.
        distributions: True if whole next-token distributions are compared.
        grad_norms: True if each term's gradient is measured.
    """

    longest: int
    micro_batch: int
    chunk: int
    checkpointing: bool
    distributions: bool = False
    grad_norms: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the largest forward and backward: a row that is longer than a micro-batch stands alone."""
        return max(self.longest, self.micro_batch)


class Footprint:
    """Bytes that a policy takes.

    Args:
        policy: Loaded.
        decodes: True if it is sampled from, too, and not a copy of it elsewhere.

    Attributes:
        weights: The base, as it lies in memory; this rank's part of a sharded one.
        gathered: A sharded base's layers while they are whole.
        adapters: Student and teacher in float32, and in the base's dtype where kernels serve the learner.
        optimizer: AdamW's two moments and the gradient.
        token_cache: Keys and values of one token.
    """

    def __init__(self, policy: Policy, decodes: bool = True) -> None:
        c = policy.base.config.get_text_config()
        self.kernels, self.size = policy.training_kernels is not None, policy.base.dtype.itemsize
        self.weights = sum(t.numel() * t.element_size() for n, p in policy.base.named_parameters() if "lora_" not in n for t in _parts(p))
        self.gathered = policy.shards.gathered if policy.shards is not None else 0
        self.student = sum(p.numel() * 4 for p in policy.adapter("student").values())
        self.adapters = 2 * self.student * (4 + self.size * self.kernels) // 4
        self.optimizer = 3 * self.student
        heads, (kv_heads, dim) = c.num_attention_heads, _kv_shape(c)
        self.hidden, self.vocabulary, self.layers = c.hidden_size, c.vocab_size, c.num_hidden_layers
        self.decodes, self.token_cache = decodes, cache_bytes(policy.base) * decodes
        inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
        # What a layer's backward keeps: inputs of norms and projections, heads before and after norm and rotation, the MLP, its gradients
        self.layer = (5 * c.hidden_size + 3 * (heads + kv_heads) * dim + 5 * inner) * self.size
        if not self.kernels:  # PEFT's copies in float32
            self.layer = self.layer * 5 // 2

    @property
    def static(self) -> int:
        """What is there all the time."""
        return self.weights + self.gathered + self.adapters + self.optimizer + WORK

    def activations(self, d: Demand) -> int:
        """Bytes of the student's forward and backward, without the head."""
        kept = self.hidden * self.size * self.layers if d.checkpointing else self.layer * self.layers
        return d.tokens * (kept + (self.layer if d.checkpointing else 0))

    def logits(self, d: Demand) -> int:
        """Bytes of the logits of `chunk` positions, with what is computed from them."""
        once = self.size if self.kernels and not d.distributions else self.size + 6 * 4
        return min(d.chunk, d.tokens) * self.vocabulary * once + 3 * d.tokens * self.hidden * self.size

    def update(self, d: Demand) -> int:
        """Beyond `static`, at the peak of an update: the head's backward is over when the layers' begins."""
        kept = d.tokens * (self.hidden * self.size if d.checkpointing else self.layer) * self.layers
        return max(self.activations(d), kept + self.logits(d), 2 * self.student) + (3 * self.student if d.grad_norms else 0)

    def prefill(self, tokens: int) -> int:
        """Beyond `static` and the cache, while prompts of so many tokens are read."""
        return tokens * self.layer // 2 * self.decodes

    def fitting_settings(self, d: Demand, fits: Callable[[Demand], bool]) -> Iterator[dict[str, Any]]:
        """Changes of settings after which a demand `fits`: single ones if there are such, else the fewest together."""
        policy = "model.policy"
        steps: list[tuple[dict[str, Any], dict[str, Any]]] = []
        if not d.checkpointing:
            steps.append(({f"{policy}.gradient_checkpointing": True}, {"checkpointing": True}))
        if d.chunk > 256:
            steps.append(({f"{policy}.head_chunk": 256}, {"chunk": 256}))
        if d.micro_batch > d.longest:
            steps.append(({"model.micro_batch_tokens": d.longest}, {"micro_batch": d.longest}))
        alone = [(keys, replace(d, **change)) for keys, change in steps]
        fitting = [keys for keys, e in alone if fits(e)]
        if fitting:
            yield from fitting
            return
        keys: dict[str, Any] = {}
        for more, change in steps:
            keys, d = keys | more, replace(d, **change)
        if keys and fits(d):
            yield keys
            return
        for longest in range((d.longest - 1) // 512 * 512, 0, -512):
            if fits(replace(d, longest=longest, micro_batch=longest)):
                yield keys | {f"{policy}.context_length": longest, "model.micro_batch_tokens": longest}
                return


def _parts(p: Tensor) -> Iterator[Tensor]:
    """A parameter's own memory and that of its quantisation."""
    yield p.to_local() if hasattr(p, "to_local") else p
    state = getattr(p, "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, state.code) if t is not None)
        state = state.state2 if state.nested else None


def cache_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token."""
    config = model.config.get_text_config()
    heads, dim = _kv_shape(config)
    return int(2 * config.num_hidden_layers * heads * dim * model.dtype.itemsize)


def _kv_shape(config: Any) -> tuple[int, int]:
    """Heads of keys and values, and their dimension."""
    heads = config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def peak_gib(device: torch.device) -> float:
    """Most memory since the start, GiB: what PyTorch reserved on a GPU, else the process's resident set (nan where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
