"""One step of decoding: the forward of every row's new ids and the draw of its next token, in dynamic or in static shapes.

A small model on a GPU waits for kernel launches, and several processes on one GPU take turns at it. In static shapes the whole step is
one CUDA graph, launched at once: rows, new ids and visible length are padded to a few sizes. Padding writes to the cache's spare index and
is seen by nobody, so the result is that of the dynamic shapes up to rounding. LoRA tensors are updated in place: the graphs stay valid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skillsd.policy import Policy
from skillsd.rollout.cache import SlotCache
from skillsd.rollout.noise import sample, uniforms

log = logging.getLogger(__name__)

HEAD = 4  # columns of a packed step before its ids: start, number of ids, noise key, noise position
WIDTHS = (1, 8, 16, 32, 48, 64)  # new ids of a row; a longer prompt takes the dynamic path
MOST_GRAPHS = 128
SHARE = 8  # the kept cache may take this part of the device's memory, as 1 / SHARE


def bucket(n: int, least: int) -> int:
    """The smallest power of two >= n and >= least."""
    return max(least, 1 << max(0, n - 1).bit_length())


class Stepper:
    """Runs steps on a cache; where `static` is set, in few shapes, of which those met again are recorded as CUDA graphs.

    A packed step is int64 [n, 4 + width]: where the row's ids begin in its cache, how many there are, its noise key and noise position,
    the ids. A step's result is float64 [2, n]: the drawn ids (exact in float64) and their log-probs.

    Args:
        policy: Whose backbone and head; its active adapter acts.
        static: Static shapes; without CUDA they are run as they are, without a graph.
    """

    def __init__(self, policy: Policy, static: bool) -> None:
        self.policy, self.static = policy, static
        self.cache = SlotCache(policy.base)
        self.limit = torch.cuda.get_device_properties(policy.device).total_memory // SHARE if policy.device.type == "cuda" else 1 << 40
        self.graphs: dict[tuple[Any, ...], tuple[Callable[[], None], Tensor, Tensor]] = {}
        self.met: set[tuple[Any, ...]] = set()
        self.valid: Any = None
        self.shared: Any = None  # memory and stream of the captures

    def plan(self, rows: int, longest: int) -> bool:
        """Room for a step of slots 0 to rows - 1 with rows of up to `longest` tokens. Whether it can be static.

        A cache too large to be kept between rollouts ends static shapes for good.
        """
        slots, length = bucket(rows, 8), bucket(longest, 256)
        if self.static and self.cache.bytes_for(slots, length) > self.limit:
            log.info("the rollout's cache is too large for CUDA graphs: decoding goes on without them.")
            self.disable()
        if self.static:
            self.cache.reserve(slots, length)
        # Autocast keeps cast copies of weights, which a graph would go on reading after an optimizer step.
        return self.static and not torch.is_autocast_enabled(self.policy.device.type)

    def disable(self) -> None:
        """Dynamic shapes from here on."""
        self.static, self.shared = False, None
        self.graphs.clear()

    def forward(self, packed: Tensor, first: int, longest: int) -> Tensor:
        """Append the ids to the rows in slots first, first + 1, ...; logits after each one's last id, [n, V]."""
        width = packed.shape[1] - HEAD
        kwargs = self.cache.prepare(first, packed[:, 0], packed[:, 1], width, longest)
        ids = packed[:, HEAD:]
        hidden = self.policy.backbone(input_ids=ids, past_key_values=self.cache, use_cache=True, **kwargs).last_hidden_state
        last = hidden[torch.arange(len(ids), device=ids.device), (packed[:, 1] - 1).clamp_min(0)]
        return self.policy.head(last)

    def draw(self, packed: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """A token for each row of `logits`."""
        ids, logp = sample(logits, uniforms(packed[:, 2], packed[:, 3]), temperature)
        return torch.stack([ids.double(), logp.double()])

    def fixed(self, packed: Tensor, longest: int, temperature: float, adapter: str | None) -> Tensor:
        """Forward and draw for slots 0 to n - 1 in static shapes. `packed` may lie on the CPU; its width is one of WIDTHS."""
        n, length = len(packed), bucket(longest, 256)
        rows = bucket(n, 8)
        key = (adapter, temperature, rows, packed.shape[1], length)
        self._forget_stale()
        padded = torch.zeros(rows, packed.shape[1], dtype=torch.int64)  # a row of padding has no ids: it writes to the spare index
        padded[:n] = packed
        if key in self.graphs:
            replay, given, out = self.graphs[key]
            given.copy_(padded)
            replay()
            return out[:, :n]
        given = padded.to(self.policy.device)

        def step() -> Tensor:
            return self.draw(given, self.forward(given, 0, length), temperature)

        if key in self.met and len(self.graphs) < MOST_GRAPHS and can_record(given):
            try:
                replay, out = self._record(step)
            except Exception as e:  # a kernel that cannot be captured, whatever it raises
                log.warning("CUDA graphs are off, decoding goes on without them: %s", str(e).splitlines()[0] if str(e) else repr(e))
                self.disable()
                return step()[:, :n]
            self.graphs[key] = replay, given, out
            replay()
            return out[:, :n]
        self.met.add(key)
        return step()[:, :n]

    def _forget_stale(self) -> None:
        """A graph reads the addresses that it was recorded with: drop all of them when the cache or a weight has moved."""
        if self.valid is None or self.valid[0] != self.cache.version:
            self.check()

    def check(self) -> None:
        """Compare the addresses of cache and weights with those of the graphs. Cheap enough for each rollout, not for each step."""
        now = self.cache.version, tuple(p.data_ptr() for p in self.policy.model.parameters())
        if now != self.valid:
            self.graphs.clear()
            self.met.clear()
            self.valid, self.shared = now, None

    def _record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.shared is None:
            self.shared = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.policy.device)
        return record(step, *self.shared)


def can_record(given: Tensor) -> bool:
    """Whether steps on this tensor's device can be recorded."""
    return given.is_cuda


def record(step: Callable[[], Tensor], pool: Any, side: Any) -> tuple[Callable[[], None], Tensor]:
    """Capture `step` as a CUDA graph.

    Args:
        step: Called twice: libraries set themselves up on first use, which a capture does not allow. Doing it again changes nothing.
        pool: Memory, shared by graphs that are replayed one at a time: what must outlast a replay is its result alone.
        side: A stream other than the current one.

    Returns:
        what replays it, and the tensor that holds its result after each replay.
    """
    main = torch.cuda.current_stream(side.device)
    side.wait_stream(main)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            step()
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            out = step()
    finally:
        torch.cuda.set_stream(main)  # after an error the capture's own context does not
    main.wait_stream(side)
    return graph.replay, out
