"""The default engine: the policy itself, in this process."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import torch
from torch import Tensor

from skillsd.engines.engine import Adapter, Completion, Request, Session, Version
from skillsd.engines.step import HEAD, MAX_FED_TOKENS, WIDTHS, Stepper, bucket
from skillsd.policy import Policy, decoding_kernels

STRIDE = 8  # steps before `step` returns, if no row's turn ends sooner
PREFILL, CUDA_PREFILL = 4096, 16384  # most tokens, padding included, of one forward over several rows: they stay in a CPU's cache
ADMIT = 0.125  # rows wait until they are this share of all that decode: one forward for several
AHEAD = 1  # steps asked for before the tokens of the last one are known
NOTHING = Request(-1, (), 0, 0, 1)


class InProcessEngine:
    """The default engine: a hand loop over the policy itself, one KV cache kept across turns.

    Args:
        policy: Who acts.
        cuda_graphs: On a GPU, decode in a few static shapes that are recorded as CUDA graphs; the cache then lives as long as the
            engine. Elsewhere, and where the model cannot be captured or is sharded, it changes nothing.
        kernels: Decode with `policy.decoding_kernels` where it can serve the model; the log says why where it can't.
    """

    def __init__(self, policy: Policy, cuda_graphs: bool = True, kernels: bool = True) -> None:
        self.policy = policy
        self.fused = decoding_kernels(policy) if kernels else None
        self.static = cuda_graphs and policy.device.type == "cuda" and not policy.sharded
        self._kept: tuple[Stepper, weakref.ref[InProcessSession] | None] | None = None
        self._failed = False

    def open(self, temperature: float, adapter: Adapter = "student") -> Session:
        """The stepper with its graphs goes from one session to the next; one that opens while another lives has its own, without."""
        assert not isinstance(adapter, Version), "this engine makes none"
        if self._failed:  # what the error's traceback held is free by now
            self._failed = False
            _free()
        stepper, user = self._kept or (None, None)
        busy = user is not None and user() is not None
        if stepper is not None and not stepper.static:
            self.static = False
        if stepper is None or busy or not self.static:
            stepper = Stepper(self.policy, self.static and not busy, self.fused, self.policy.cache_budget)
        session = InProcessSession(self.policy, stepper, temperature, adapter, self._closed)
        if stepper.static:
            stepper.check()
            self._kept = stepper, weakref.ref(session)
        elif not busy:
            self._kept = None
        return session

    def _closed(self, session: InProcessSession, failed: bool) -> None:
        budget = self.policy.cache_budget
        if failed or (budget is not None and not budget.keep):
            self._kept, self._failed = None, failed
            if not failed:
                _free()
        elif self._kept is not None and self._kept[1] is not None and self._kept[1]() is session:
            self._kept = self._kept[0], None

    def snapshot(self, adapter: str) -> Adapter:
        return adapter

    def close(self) -> None:
        self._kept = None


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@dataclass(eq=False)
class _Row:
    """A row in the cache. `seen` tokens are there, `ids` were sampled in this turn, the last of them not in the cache yet."""

    name: int
    slot: int
    seen: int = 0
    prompt: _Prompt | None = None
    shared: int = 0  # tokens of it
    feed: list[int] = field(default_factory=list)
    request: Request = NOTHING
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    launched: int = 0  # tokens asked for in this turn
    turns: int = 0

    @property
    def length(self) -> int:
        """Its tokens in the cache once all that was asked for is there. `seen` lags behind: it counts what was looked at."""
        return self.seen + self.launched - max(0, len(self.ids) - 1)


@dataclass(eq=False)
class _Prompt:
    """The first tokens of several rows, in a slot of their own."""

    slot: int
    length: int
    users: int = 0


class InProcessSession(Session):
    """Rows live in slots of a cache.

    With kernels a row may be in any slot, may join at any time, and rows with one prompt share its keys and values. Without them the
    running rows are kept at the cache's front, so that a finished one costs nothing, and turns begin together.

    On a GPU the next step is asked for before the tokens of the last are looked at: a row that turns out to have stopped has taken one step
    for nothing, and the GPU never waits.
    """

    def __init__(
        self, policy: Policy, stepper: Stepper, temperature: float, adapter: str | None,
        closed: Callable[[InProcessSession, bool], None] = lambda session, failed: None,
    ) -> None:  # fmt: skip
        self.policy, self.stepper, self.temperature, self.adapter = policy, stepper, temperature, adapter
        self.closed = closed
        budget = stepper.budget
        self.prefill = budget.prefill if budget else CUDA_PREFILL if policy.device.type == "cuda" else PREFILL
        self.continuous = stepper.fused is not None
        self.stop_ids = frozenset(policy.stop_ids)
        self.device = policy.device
        self.rows: dict[int, _Row] = {}
        self.order: list[_Row] = []  # slot -> row, without kernels
        self.free: list[int] = []  # slots below `slots` that are in nobody's use, a heap
        self.slots = 0
        self.prompts: dict[tuple[int, ...], _Prompt] = {}
        self.waiting: list[_Row] = []
        self.active: list[_Row] = []
        self.launches: deque[tuple[list[tuple[_Row, int]], Callable[[], tuple[list[int], list[float]]]]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active)

    def submit(self, requests: Sequence[Request]) -> None:
        if not self.continuous and len(self.rows) < len(self.order):  # all that was forgotten at once: moves cost
            self._front([row for row in self.order if row.turns >= 0])
            del self.order[len(self.rows) :]
            self.slots = len(self.order)
        for r in requests:
            row = self.rows.get(r.row)
            if row is None:
                row = self.rows[r.row] = _Row(r.row, self._slot())
                if not self.continuous:
                    self.order.append(row)
            row.feed = [*row.ids[-1:], *r.new_ids]
            row.request, row.ids, row.logprobs, row.launched = r, [], [], 0
            row.turns += 1
            self.waiting.append(row)

    def forget(self, rows: Iterable[int]) -> None:
        gone = [self.rows.pop(n) for n in rows if n in self.rows]
        for row in gone:
            row.turns = -1
            unused = []
            if row.prompt is not None:
                row.prompt.users -= 1
                if not row.prompt.users:
                    unused = [row.prompt.slot]
                    heappush(self.free, row.prompt.slot)
                    self.prompts = {k: p for k, p in self.prompts.items() if p.users}
            if not math.isfinite(sum(row.logprobs)):  # nan would reach the slot's next row: a weight of 0 times nan is nan
                self.stepper.cache.wipe([row.slot, *unused])
            if self.continuous:
                heappush(self.free, row.slot)

    def close(self, failed: bool = False) -> None:
        del self.stepper  # and with it the cache, whoever holds on to the session
        self.closed(self, failed)

    def step(self) -> list[tuple[int, Completion]]:
        finished: list[tuple[int, Completion]] = []
        with self.policy.acting(self.adapter):
            for _ in range(STRIDE if self.continuous else sys.maxsize):
                self._launch()
                if not self.launches:
                    break
                finished += self._collect()
                if finished and self.continuous:
                    break
        return finished

    def _launch(self) -> None:
        """Ask for steps: the one that is looked at next, and some after it."""
        share = ADMIT if self.continuous else 1
        if self.waiting and len(self.waiting) >= share * (len(self.waiting) + len(self.active)):
            self._feed()
        while len(self.launches) <= (AHEAD if self.stepper.static else 0):
            going = [row for row in self.active if row.launched < row.request.limit]
            if not going:
                break
            self._decode(going)

    def _slot(self) -> int:
        if self.free:
            return heappop(self.free)
        self.slots += 1
        return self.slots - 1

    def _feed(self) -> None:
        rows, self.waiting = self.waiting, []
        if self.continuous:
            self._share(rows)
            rows.sort(key=lambda row: len(row.feed))  # neighbours of a forward are of about one length
        else:
            rows = self._front(rows)
        self._forward(rows)
        self.active += rows

    def _share(self, rows: list[_Row]) -> None:
        """Rows that begin with one prompt have all but its last token in common."""
        alike: dict[tuple[int, ...], list[_Row]] = {}
        for row in rows:
            if not row.seen and len(row.feed) > 1:
                alike.setdefault(tuple(row.feed), []).append(row)
        made = []
        max_prompts = len(self.rows) // 2 if self.stepper.budget else sys.maxsize  # what `CacheBudget.slots` counts on
        for ids, several in alike.items():
            prompt = self.prompts.get(ids)
            if prompt is None:
                if len(several) < 2 or len(self.prompts) >= max_prompts:
                    continue
                prompt = self.prompts[ids] = _Prompt(self._slot(), len(ids) - 1)
                made.append(_Row(-1, prompt.slot, feed=list(ids[:-1])))
            for row in several:
                row.prompt, row.shared, row.seen, row.feed = prompt, prompt.length, prompt.length, list(ids[-1:])
                prompt.users += 1
        if made:
            made.sort(key=lambda row: len(row.feed))
            self._forward(made, used=False)

    def _forward(self, rows: list[_Row], used: bool = True) -> None:
        """Feed rows; what is drawn after them is looked at if it is `used`."""
        sizes = [len(row.feed) for row in rows]
        width, parts = max(sizes), spans(sizes, self.prefill)
        if self.stepper.static and width <= WIDTHS[-1]:
            fixed = next(w for w in WIDTHS if w >= width)
            if fixed * bucket(len(rows), 8) <= min(self.prefill, MAX_FED_TOKENS):
                width, parts = fixed, [(0, len(rows))]
        longest = max(row.seen + n - row.shared for row, n in zip(rows, sizes, strict=True))
        result = self.stepper.feed(_packed(rows, width), parts, longest, self.temperature, self.adapter)
        for row, n in zip(rows, sizes, strict=True):
            row.seen += n
            row.launched = 1
        if used:
            self.launches.append(([(row, row.turns) for row in rows], fetch(result)))

    def _decode(self, going: list[_Row]) -> None:
        if not self.continuous:
            going = self._front(going)
        longest = max(row.length - row.shared for row in going)
        result = self.stepper.decode([row.slot for row in going], longest, self.temperature, self.adapter)
        for row in going:
            row.launched += 1
        self.launches.append(([(row, row.turns) for row in going], fetch(result)))

    def _collect(self) -> list[tuple[int, Completion]]:
        launched, wait = self.launches.popleft()
        finished = []
        for (row, turn), token, logp in zip(launched, *wait(), strict=True):
            if row.turns != turn or len(row.ids) >= row.request.limit or (row.ids and row.ids[-1] in self.stop_ids):
                continue  # it had stopped already
            if row.ids:
                row.seen += 1
            row.ids.append(token)
            row.logprobs.append(logp)
            stopped = token in self.stop_ids
            if stopped or len(row.ids) >= row.request.limit:
                finished.append((row.name, Completion(row.ids, row.logprobs, stopped)))
        if finished:
            names = {name for name, _ in finished}
            self.active = [row for row in self.active if row.name not in names]
        return finished

    def _front(self, rows: list[_Row]) -> list[_Row]:
        """Without kernels: put these rows in the first slots, with as few moves as there are; they come back in the order of slots."""
        wanted = {row.slot for row in rows}
        holes = [i for i in range(len(rows)) if i not in wanted]
        late = [row.slot for row in rows if row.slot >= len(rows)]
        if not holes:
            return self.order[: len(rows)]
        into, source = [*holes, *late], [*late, *holes]  # they change places
        longest = max(row.length for row in self.order)
        self.stepper.plan(self.slots, longest)
        self.stepper.move(into, source, longest)
        before = list(self.order)
        for i, j in zip(into, source, strict=True):
            self.order[i] = before[j]
            self.order[i].slot = i
        return self.order[: len(rows)]


def fetch(result: Tensor) -> Callable[[], tuple[list[int], list[float]]]:
    """Begin to copy a step's result to the host; what is returned waits for it."""
    if result.device.type != "cuda":
        tokens, logps = result.tolist()
        return lambda: ([int(t) for t in tokens], logps)
    host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    host.copy_(result, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> tuple[list[int], list[float]]:
        copied.synchronize()
        tokens, logps = host.tolist()
        return [int(t) for t in tokens], logps

    return wait


def _packed(rows: Sequence[_Row], width: int) -> Tensor:
    """The rows' next steps in the columns of `step.HEAD`, int64 [n, HEAD + width], padded with 0.

    By way of an array: five times as fast as a tensor of lists.
    """
    flat = array("q")
    for row in rows:
        r, owner = row.request, row.prompt.slot if row.prompt else row.slot
        flat.extend([row.seen, len(row.feed), row.slot, row.shared, owner, r.key, r.position, *row.feed])
        flat.extend([0] * (width - len(row.feed)))
    return torch.frombuffer(flat, dtype=torch.int64).view(-1, HEAD + width)


def spans(lengths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Runs [a, b) of neighbours whose padded size is at most `budget`: a long prompt that joins does not widen everybody's forward."""
    out, first, width = [], 0, 0
    for i, n in enumerate(lengths):
        if i > first and max(width, n) * (i + 1 - first) > budget:
            out.append((first, i))
            first, width = i, 0
        width = max(width, n)
    return [*out, (first, len(lengths))]
