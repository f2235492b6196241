"""A KV cache in which a token's slot is its position: rows of any length side by side, without padding between tokens.

Row b's token at position p lies at index p, so what a query may see follows from positions alone: j <= p, and p - j < window in
sliding layers. That is exact for every architecture, and stale entries beyond p need no clearing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from skillsd.errors import ConfigError
from skillsd.kernels.reference import COLUMNS, COUNT, START
from skillsd.policy import cache_bytes


class SlotCache(Cache):
    """Keys and values [slots, heads, capacity + 1, dim] per layer; index `capacity` takes the writes of padding.

    Args:
        model: The causal language model (without adapters' wrapper); gives layer types, window and attention implementation.
        write: Puts new keys and values in place (`policy.decoding_kernels`). Attention is then its own too: it takes rows in any slots, and
            a row table, int64 [B, 1, 1, COLUMNS], in place of a mask.

    Attributes:
        version: Changes whenever the storage is another.

    Raises:
        ConfigError: a layer type or an attention implementation that such a cache cannot serve.
    """

    def __init__(self, model: PreTrainedModel, write: Callable[..., None] | None = None) -> None:
        config = model.config.get_text_config()
        super().__init__(layers=[])
        self.layer_types = list(getattr(config, "layer_types", None) or [])
        self.window: int | None = getattr(config, "sliding_window", None)
        if odd := set(self.layer_types) - {"full_attention", "sliding_attention"}:
            raise ConfigError(
                f"model.policy.model: layers of type {', '.join(sorted(odd))}: choose a model with full or sliding attention only."
            )
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ConfigError(f"model.policy.attention is {config._attn_implementation}: set it to sdpa or eager.")
        self.eager = config._attn_implementation == "eager"
        self.dtype, self.write = model.dtype, write
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.capacity = 0
        self.width = 0
        self.slots = 0
        self.first = 0
        self.positions = self.table = torch.empty(0)
        self.version = 0
        self.token_bytes = cache_bytes(model)

    def prepare(self, first: int, table: Tensor, width: int, longest: int) -> dict[str, Any]:
        """What a forward of `width` new tokens of each row needs; there is room for them (`reserve`).

        Args:
            first: Row b lies in slot first + b, unless `write` is set.
            table: int64 [B, COLUMNS], a row table (`skillsd.kernels.reference`).
            width: New ids of a row, padding included.
            longest: Most tokens of a row in its slot.

        Returns:
            the attention mask (or the row table instead) and position ids for the model's forward.
        """
        offsets = torch.arange(width, device=table.device)
        starts, counts = table[:, START], table[:, COUNT]
        position_ids = starts[:, None] + offsets
        both = "sliding_attention" in self.layer_types and "full_attention" in self.layer_types
        self.first, self.width = first, longest
        if self.write is not None:
            self.table = table.contiguous()
            mask: Any = self.table.view(-1, 1, 1, COLUMNS)
            return {"attention_mask": {"full_attention": mask, "sliding_attention": mask} if both else mask, "position_ids": position_ids}
        self.positions = position_ids.masked_fill(offsets >= counts[:, None], self.capacity)
        position_ids = position_ids.clamp_max(longest - 1)
        seen = torch.arange(longest, device=starts.device)
        gap = position_ids[:, None, :, None] - seen
        full = gap >= 0
        sliding = full if self.window is None else full & (gap < self.window)
        if both:
            mask = {"full_attention": self._form(full), "sliding_attention": self._form(sliding)}
        else:  # a window without layer types applies to all layers
            mask = self._form(full if "full_attention" in self.layer_types else sliding)
        return {"attention_mask": mask, "position_ids": position_ids}

    def _form(self, visible: Tensor) -> Tensor:
        if not self.eager:
            return visible
        return torch.zeros(visible.shape, dtype=self.dtype, device=visible.device).masked_fill_(~visible, torch.finfo(self.dtype).min)

    def _shape(self, slots: int, length: int, spare: bool = True) -> tuple[int, int]:
        capacity = self.capacity
        if length > capacity:  # to the double at least: what is recorded on it seldom becomes void
            capacity = -(-max(length, 2 * capacity if spare else 0) // 64) * 64
        return max(self.slots, slots), capacity

    def bytes_for(self, slots: int, length: int, spare: bool = True) -> int:
        """What the cache would take after `reserve`."""
        count, capacity = self._shape(slots, length, spare)
        return count * (capacity + 1) * self.token_bytes

    def reserve(self, slots: int, length: int, spare: bool = True) -> None:
        """Room for `slots` rows of `length` tokens; what is there stays. With `spare` for some more."""
        if length <= self.capacity and slots <= self.slots:
            return
        count, capacity = self._shape(slots, length, spare)
        for store in (self.keys, self.values):
            for i, old in enumerate(store):
                new = old.new_zeros(count, old.shape[1], capacity + 1, old.shape[3])
                new[: self.slots, :, : self.capacity] = old[:, :, : self.capacity]
                store[i] = new
        self.capacity, self.slots = capacity, count
        self.version += 1

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, heads, T, dim] at their positions.

        Those B slots up to the longest row come back, with `write` the whole stores.
        """
        batch, heads, new, dim = key_states.shape
        if layer_idx == len(self.keys):
            shape = (self.slots, heads, self.capacity + 1, dim)
            self.keys.append(key_states.new_zeros(shape))
            self.values.append(value_states.new_zeros(*shape[:3], value_states.shape[-1]))
        if self.write is not None:
            self.write(key_states, value_states, self.keys[layer_idx], self.values[layer_idx], self.table)
            return self.keys[layer_idx], self.values[layer_idx]
        index = self.positions[:, None, :, None]
        out = []
        for store, states in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            rows = store[self.first : self.first + batch]
            rows.scatter_(2, index.expand(-1, heads, -1, states.shape[-1]), states)
            out.append(rows[:, :, : self.width])
        return out[0], out[1]

    def move(self, into: Sequence[int], source: Sequence[int], length: int) -> None:
        """Slots `into` get what slots `source` held, `length` tokens of it."""
        for store in (self.keys, self.values):
            if store and into:
                i, j = (torch.tensor(x, device=store[0].device) for x in (into, source))
                for t in store:
                    t = t[:, :, :length]
                    t.index_copy_(0, i, t.index_select(0, j))

    def wipe(self, slots: Sequence[int]) -> None:
        """Zeros in these slots."""
        for store in (*self.keys, *self.values):
            store[torch.tensor(slots, device=store.device)] = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Longest row, in tokens."""
        return self.width
