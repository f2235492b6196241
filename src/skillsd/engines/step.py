"""One step of decoding: the forward of every row's new ids and the draw of its next token, in dynamic or in static shapes.

A small model on a GPU waits for kernel launches, and several processes on one GPU take turns at it. In static shapes the whole step is
one CUDA graph, launched at once: rows, new ids and visible length are padded to a few sizes. Padding writes to the cache's spare index and
is seen by nobody, so the result is that of the dynamic shapes up to rounding. LoRA tensors are updated in place: the graphs stay valid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from skillsd.engines.cache import SlotCache
from skillsd.engines.engine import CacheFull
from skillsd.engines.noise import sample, uniforms
from skillsd.kernels.reference import COLUMNS, COUNT, SLOT, START
from skillsd.policy import CacheBudget, DecodingKernels, Policy

log = logging.getLogger(__name__)

KEY, POSITION, HEAD = COLUMNS, COLUMNS + 1, COLUMNS + 2
"""A packed step is a row of a row table (`skillsd.kernels.reference`), then the noise's key and position, then its ids."""
WIDTHS = (1, 8, 16, 32, 48, 64, 96, 128, 192, 256)  # new ids of a row; a longer prompt takes the dynamic path
MAX_FED_TOKENS = 4096  # tokens of a recorded forward, padding included: more keep a GPU busy for longer than launching them takes
MAX_GRAPHS = 128
SHARE = 4  # the kept cache may take this part of the device's memory, as 1 / SHARE


def bucket(n: int, minimum: int) -> int:
    """The smallest power of two >= n and >= minimum."""
    return max(minimum, 1 << max(0, n - 1).bit_length())


class Stepper:
    """Runs steps on a cache; where `static` is set, in few shapes, of which those met again are recorded as CUDA graphs.

    `feed` takes packed steps, int64 [n, HEAD + width]: where each row's ids begin, how many there are, and so on, and draws a token after
    them. The row's next step is then known here, in `state`: `decode` goes on from there, as often as wanted, and the host need not have
    seen a token to ask for the next. Results are float64 [2, n]: the drawn ids (exact in float64) and their log-probs.

    Args:
        policy: Whose backbone and head; its active adapter acts.
        static: Static shapes; without CUDA they are run as they are, without a graph.
        fused: Kernels that stand in for the model's modules. Their attention finds a row in any slot and reads it up to its own length;
            without them the rows of a step lie in consecutive slots.
        budget: What the cache may take. None is no limit; static shapes then end where a kept cache would take more than a share of the
            device's memory.
    """

    def __init__(self, policy: Policy, static: bool, fused: DecodingKernels | None = None, budget: CacheBudget | None = None) -> None:
        self.policy, self.static, self.fused = policy, static, fused
        self.cache = SlotCache(policy.base, fused.write if fused else None)
        self.budget = budget
        self.max_bytes = budget.bytes(self.cache.token_bytes) if budget else 1 << 60
        total = torch.cuda.get_device_properties(policy.device).total_memory if policy.device.type == "cuda" else 1 << 60
        self.static_max_bytes = self.max_bytes if budget else total // SHARE
        self.state = torch.zeros(1, HEAD + 1, dtype=torch.int64, device=policy.device)  # of each slot; the last row is padding's
        self.graphs: dict[tuple[Any, ...], tuple[Callable[[], None], Tensor, Tensor]] = {}
        self.met: set[tuple[Any, ...]] = set()
        self.valid: Any = None
        self.shared: Any = None  # memory and stream of the captures

    def plan(self, slots: int, longest: int) -> bool:
        """Make room for a step in slots 0 to slots - 1 with rows of up to `longest` tokens. Returns True if it can be static.

        A cache too large to be kept between rollouts ends static shapes for good.

        Raises:
            CacheFull: there is less memory than that.
        """
        if not self._reserve(slots, longest, self.static_max_bytes if self.static else self.max_bytes):
            if not self.static or (self.fused and self.static_max_bytes == self.max_bytes):
                assert self.budget is not None  # what else has a limit goes on without static shapes
                text = f"{slots} rows of {longest} tokens do not fit into the {self.max_bytes / 2**30:.2f} GiB of the rollout's cache."
                raise CacheFull(text, self.budget.rows)
            log.info("the rollout's cache is too large for CUDA graphs: decoding goes on without them.")
            self.disable()
            return self.plan(slots, longest)
        if len(self.state) <= self.cache.slots:
            old, self.state = self.state, self.state.new_zeros(self.cache.slots + 1, HEAD + 1)
            self.state[: len(old) - 1] = old[:-1]
        # Autocast keeps cast copies of weights, which a graph would go on reading after an optimizer step.
        return self.static and not torch.is_autocast_enabled(self.policy.device.type)

    def _reserve(self, slots: int, longest: int, max_bytes: int) -> bool:
        """With room to grow while there is plenty, else all that the rollout will need, else what is needed now."""
        wanted = self._shape(slots, longest)
        options = [(*wanted, True, 2 if self.budget else 1)]
        if self.fused or not self.static:
            if self.budget and slots <= self.budget.slots and longest <= self.budget.tokens:
                options.append((self.budget.slots, self.budget.tokens, False, 1))
            options.append((slots, longest, False, 1))
        else:  # static shapes are padded to what is wanted
            options.append((*wanted, False, 1))
        for count, length, spare, share in options:
            if self.cache.bytes_for(count, length, spare) <= max_bytes // share:
                self.cache.reserve(count, length, spare)
                return True
        return False

    def _shape(self, slots: int, longest: int) -> tuple[int, int]:
        """Slots and tokens of a cache that this shape does not outgrow at once."""
        if self.fused:
            rounded = -(-slots // 8) * 8
            return min(rounded, max(slots, self.budget.slots)) if self.budget else rounded, longest
        return (bucket(slots, 8), bucket(longest, 256)) if self.static else (slots, longest)

    def disable(self) -> None:
        """Dynamic shapes from here on."""
        self.static, self.shared = False, None
        self.graphs.clear()

    def move(self, into: Sequence[int], source: Sequence[int], length: int) -> None:
        """Slots `into` get what slots `source` held, `length` tokens of it."""
        self.cache.move(into, source, length)
        i, j = (torch.tensor(x, device=self.state.device) for x in (into, source))
        self.state[i] = self.state[j]
        self.state[i, SLOT] = i

    def feed(self, packed: Tensor, parts: Sequence[tuple[int, int]], longest: int, temperature: float, adapter: str | None) -> Tensor:
        """Append ids to rows and draw a token for each.

        Args:
            packed: int64 [n, HEAD + width], on the CPU. Without `fused` row i is in slot i.
            parts: Ranges of rows that a forward takes together.
            longest: Most tokens of a row in its slot, after this.
            temperature, adapter: Who acts and how.
        """
        static = self.plan(int(packed[:, SLOT].max()) + 1, longest)
        if static and len(parts) == 1 and packed.shape[1] - HEAD in WIDTHS:
            return self._fixed("feed", packed, longest, temperature, adapter)
        given = packed.to(self.policy.device)
        logits = [self.forward(given[a:b, : HEAD + int(packed[a:b, COUNT].max())], a, longest) for a, b in parts]
        return self.draw(given, torch.cat(logits), temperature)

    def decode(self, slots: Sequence[int], longest: int, temperature: float, adapter: str | None) -> Tensor:
        """Append the token drawn last to each row and draw the next. Without `fused` the slots are 0 to n - 1."""
        index = torch.tensor(slots, dtype=torch.int64)
        if self.plan(max(slots) + 1, longest):
            return self._fixed("decode", index, longest, temperature, adapter)
        packed = self.state[index.to(self.policy.device)]
        return self.draw(packed, self.forward(packed, 0, longest), temperature)

    def forward(self, packed: Tensor, first: int, longest: int) -> Tensor:
        """Append the ids to the rows, which without `fused` are in slots first, first + 1, ...; logits after each one's last id, [n, V]."""
        ids, counts = packed[:, HEAD:], packed[:, COUNT]
        kwargs = self.cache.prepare(first, packed[:, :COLUMNS], ids.shape[1], longest)
        with self.fused.installed() if self.fused else nullcontext():
            hidden = self.policy.backbone(input_ids=ids, past_key_values=self.cache, use_cache=True, **kwargs).last_hidden_state
        return self.policy.head(hidden[torch.arange(len(ids), device=ids.device), (counts - 1).clamp_min(0)])

    def draw(self, packed: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """A token for each row of `logits`; their next steps go to `state`."""
        ids, logp = sample(logits, uniforms(packed[:, KEY], packed[:, POSITION]), temperature)
        count = packed[:, COUNT]
        after = torch.cat([packed[:, :HEAD], ids[:, None]], 1)
        after[:, START] += count
        after[:, POSITION] += 1
        after[:, COUNT] = count.clamp_max(1)
        self.state.index_copy_(0, torch.where(count > 0, packed[:, SLOT], len(self.state) - 1), after)
        return torch.stack([ids.double(), logp.double()])

    def _fixed(self, kind: str, given: Tensor, longest: int, temperature: float, adapter: str | None) -> Tensor:
        """A step in static shapes: `given` is padded to one of a few numbers of rows."""
        n, length = len(given), self.cache.capacity if self.fused else bucket(longest, 256)
        rows = bucket(n, 8)
        key = (kind, adapter, temperature, rows, given.shape[1:], length)
        self._forget_stale()
        # A row of padding has no ids: it is read and written nowhere.
        nobody = len(self.state) - 1 if kind == "decode" else 0
        padded = given.new_full((rows, *given.shape[1:]), nobody, pin_memory=self.policy.device.type == "cuda")
        padded[:n] = given
        if key in self.graphs:
            replay, static, out = self.graphs[key]
            static.copy_(padded, non_blocking=True)
            replay()
            return out[:, :n]
        static = padded.to(self.policy.device)

        def step() -> Tensor:
            packed = self.state[static] if kind == "decode" else static
            return self.draw(packed, self.forward(packed, 0, length), temperature)

        if key in self.met and len(self.graphs) < MAX_GRAPHS and can_record(static):
            before = self.state.clone()
            try:
                replay, out = self._record(step)
            except Exception as e:  # a kernel that cannot be captured, whatever it raises
                log.warning("CUDA graphs are off, decoding goes on without them: %s", str(e).splitlines()[0] if str(e) else repr(e))
                self.disable()
                self.state.copy_(before)
                return step()[:, :n]
            self.graphs[key] = replay, static, out
            self.state.copy_(before)  # the recording took the step already
            replay()
            return out[:, :n]
        self.met.add(key)
        return step()[:, :n]

    def _forget_stale(self) -> None:
        """A graph reads the addresses that it was recorded with: drop all of them when the cache or a weight has moved."""
        if self.valid is None or self.valid[:2] != (self.cache.version, self.state.data_ptr()):
            self.check()

    def check(self) -> None:
        """Compare the addresses of cache and weights with those of the graphs. Cheap enough for each rollout, not for each step."""
        now = self.cache.version, self.state.data_ptr(), tuple(p.data_ptr() for p in self.policy.model.parameters())
        if now != self.valid:
            self.graphs.clear()
            self.met.clear()
            self.valid, self.shared = now, None

    def _record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.shared is None:
            self.shared = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.policy.device)
        return record(step, *self.shared)


def can_record(given: Tensor) -> bool:
    """True if steps on this tensor's device can be recorded."""
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
    except BaseException:
        torch.cuda.set_stream(main)
        generator = torch.cuda.default_generators[side.device.index]
        generator.graphsafe_set_state(generator.clone_state())  # torch leaves it capturing, and then it refuses to draw
        raise
    finally:
        torch.cuda.set_stream(main)  # after an error the capture's own context does not
        main.wait_stream(side)
    return graph.replay, out
