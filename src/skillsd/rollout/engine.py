"""Engines: token prompts in, sampled tokens and their log-probs out. They know no environment and no reward."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Container, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from skillsd.policy import Policy
from skillsd.rollout.step import HEAD, WIDTHS, Stepper, bucket

PREFILL, CUDA_PREFILL = 4096, 16384  # most tokens, padding included, of one forward over several rows: they stay in a CPU's cache


class Request(NamedTuple):
    """One row's next turn.

    Args:
        row: Names the trajectory; a new name begins one.
        new_ids: Ids to append after everything the row has seen or sampled.
        key: Noise key of the trajectory (`noise.stream_key`).
        position: Index of the first token to sample, counted after the prompt: the noise counter.
        limit: Most tokens to sample, at least 1.
    """

    row: int
    new_ids: Sequence[int]
    key: int
    position: int
    limit: int


class Completion(NamedTuple):
    """What was sampled for one row: ids, their log-probs (nats), and whether the last id is a stop token."""

    token_ids: list[int]
    logprobs: list[float]
    stopped: bool


class Session(Protocol):
    """Trajectories in progress."""

    def turn(self, requests: Sequence[Request]) -> list[Completion]:
        """Sample one turn for each request, in their order. A row that is left out is finished and is forgotten."""


class Engine(Protocol):
    """Opens sessions. `temperature` 0 is greedy."""

    def open(self, temperature: float, adapter: str | None = "student") -> Session:
        """A session that samples from one adapter of the policy, or from the untouched base (None)."""


class InProcessEngine:
    """The default engine: a hand loop over the policy itself, one KV cache kept across turns.

    Args:
        policy: Who acts.
        cuda_graphs: On a GPU, decode in a few static shapes that are recorded as CUDA graphs; the cache then lives as long as the
            engine. Elsewhere, and where the model cannot be captured, it changes nothing.
    """

    def __init__(self, policy: Policy, cuda_graphs: bool = True) -> None:
        self.policy = policy
        self.static = cuda_graphs and policy.device.type == "cuda"
        self._kept: tuple[Stepper, weakref.ref[InProcessSession]] | None = None

    def open(self, temperature: float, adapter: str | None = "student") -> Session:
        """The stepper with its graphs goes from one session to the next; one that opens while another lives has its own, without."""
        stepper, user = self._kept or (None, None)
        busy = user is not None and user() is not None
        if stepper is not None and not stepper.static:
            self.static = False
        if stepper is None or busy or not self.static:
            stepper = Stepper(self.policy, self.static and not busy)
        session = InProcessSession(self.policy, stepper, temperature, adapter)
        if stepper.static:
            stepper.check()
            self._kept = stepper, weakref.ref(session)
        elif not busy:
            self._kept = None
        return session


class InProcessSession:
    """Rows live in slots of a cache; the running ones are kept at its front, so a finished one costs nothing."""

    def __init__(self, policy: Policy, stepper: Stepper, temperature: float, adapter: str | None) -> None:
        self.policy, self.stepper, self.temperature, self.adapter = policy, stepper, temperature, adapter
        self.stop_ids = frozenset(policy.stop_ids)
        self.device = policy.device
        self.rows: list[int] = []  # slot -> row
        self.seen: dict[int, int] = {}  # row -> tokens in its cache
        self.pending: dict[int, int] = {}  # row -> its last sampled id, not in the cache yet

    def turn(self, requests: Sequence[Request]) -> list[Completion]:
        with self.policy.acting(self.adapter):
            return self._turn(requests)

    def _turn(self, requests: Sequence[Request]) -> list[Completion]:
        wanted = {r.row: r for r in requests}
        self._forget_all_but(wanted)
        for row in wanted:
            if row not in self.seen:
                self.rows.append(row)
                self.seen[row] = 0
        out: dict[int, tuple[list[int], list[float]]] = {row: ([], []) for row in wanted}
        feed = {row: [*([self.pending[row]] if row in self.pending else []), *r.new_ids] for row, r in wanted.items()}
        running = len(self.rows)
        while running:
            rows, order = self.rows[:running], list(range(running))
            steps = [[self.seen[row], len(feed[row]), wanted[row].key, wanted[row].position + len(out[row][0]), *feed[row]] for row in rows]
            tokens, logps = self._step(steps)
            for slot in reversed(range(running)):
                row, token = rows[slot], tokens[slot]
                out[row][0].append(token)
                out[row][1].append(logps[slot])
                self.seen[row] += len(feed[row])
                self.pending[row], feed[row] = token, [token]
                if token in self.stop_ids or len(out[row][0]) >= wanted[row].limit:
                    running -= 1
                    order[slot], order[running] = order[running], order[slot]
            self._arrange(order)
        return [Completion(*out[r.row], stopped=out[r.row][0][-1] in self.stop_ids) for r in requests]

    def _forget_all_but(self, wanted: Container[int]) -> None:
        order, kept = list(range(len(self.rows))), len(self.rows)
        gone = [row for row in self.rows if row not in wanted]
        for slot in reversed(order[:]):
            if self.rows[slot] not in wanted:
                kept -= 1
                order[slot], order[kept] = order[kept], order[slot]
        self._arrange(order[:kept])
        del self.rows[kept:]
        for row in gone:
            del self.seen[row], self.pending[row]

    def _arrange(self, order: Sequence[int]) -> None:
        """Slot i gets what slot order[i] held: all moves of a step at once."""
        if into := [i for i, j in enumerate(order) if i != j]:
            self.rows[: len(order)] = [self.rows[j] for j in order]
            self.stepper.cache.move(into, [order[i] for i in into], max(self.seen.values()))

    def _step(self, steps: Sequence[Sequence[int]]) -> tuple[list[int], list[float]]:
        """Feed the rows in the first slots and draw a token for each. See `Stepper` for what a step holds; these are ragged."""
        sizes = [s[1] for s in steps]
        longest = max(s[0] + s[1] for s in steps)
        budget = CUDA_PREFILL if self.device.type == "cuda" else PREFILL
        width = next((w for w in WIDTHS if w >= max(sizes)), None)
        if self.stepper.plan(len(self.rows), longest) and width is not None and width * bucket(len(steps), 8) <= budget:
            result = self.stepper.fixed(_packed(steps, width), longest, self.temperature, self.adapter)
        else:
            heads, logits = [], []
            for a, b in spans(sizes, budget):
                packed = _packed(steps[a:b], max(sizes[a:b])).to(self.device)
                logits.append(self.stepper.forward(packed, a, max(s[0] + s[1] for s in steps[a:b])))
                heads.append(packed[:, :HEAD])
            result = self.stepper.draw(torch.cat(heads), torch.cat(logits), self.temperature)
        tokens, logps = result.tolist()
        return [int(t) for t in tokens], logps


def _packed(steps: Sequence[Sequence[int]], width: int) -> Tensor:
    """int64 [n, HEAD + width], padded with 0. By way of an array: five times as fast as a tensor of lists."""
    flat, full = array("q"), HEAD + width
    for s in steps:
        flat.extend(s)
        flat.extend([0] * (full - len(s)))
    return torch.frombuffer(flat, dtype=torch.int64).view(-1, full)


def spans(lengths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Runs [a, b) of neighbours whose padded size is at most `budget`: a long prompt that joins does not widen everybody's forward."""
    out, first, width = [], 0, 0
    for i, n in enumerate(lengths):
        if i > first and max(width, n) * (i + 1 - first) > budget:
            out.append((first, i))
            first, width = i, 0
        width = max(width, n)
    return [*out, (first, len(lengths))]
