"""Engines: token prompts in, sampled tokens and their log-probs out. They know no environment and no reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from skillsd.policy import Policy
from skillsd.rollout.cache import SlotCache
from skillsd.rollout.noise import sample, uniforms

PREFILL = 4096  # most tokens, padding included, of one forward over several rows


@dataclass(frozen=True)
class Request:
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


@dataclass(frozen=True)
class Completion:
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
    """The default engine: a hand loop over the policy itself, one KV cache kept across turns."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def open(self, temperature: float, adapter: str | None = "student") -> Session:
        return InProcessSession(self.policy, temperature, adapter)


class InProcessSession:
    """Rows live in slots of a cache; the running ones are kept at its front, so a finished one costs nothing."""

    def __init__(self, policy: Policy, temperature: float, adapter: str | None) -> None:
        self.policy, self.temperature, self.adapter = policy, temperature, adapter
        self.stop_ids = frozenset(policy.stop_ids)
        self.cache = SlotCache(policy.base)
        self.rows: list[int] = []  # slot -> row
        self.seen: dict[int, int] = {}  # row -> tokens in its cache
        self.pending: dict[int, int] = {}  # row -> its last sampled id, not in the cache yet

    def turn(self, requests: Sequence[Request]) -> list[Completion]:
        with self.policy.acting(self.adapter):
            return self._turn(requests)

    def _turn(self, requests: Sequence[Request]) -> list[Completion]:
        wanted = {r.row: r for r in requests}
        for slot in reversed(range(len(self.rows))):
            if self.rows[slot] not in wanted:
                self._swap(slot, len(self.rows) - 1)
                gone = self.rows.pop()
                del self.seen[gone], self.pending[gone]
        for row in wanted:
            if row not in self.seen:
                self.rows.append(row)
                self.seen[row] = 0
        out: dict[int, tuple[list[int], list[float]]] = {row: ([], []) for row in wanted}
        feed = {row: [*([self.pending[row]] if row in self.pending else []), *r.new_ids] for row, r in wanted.items()}
        running = len(self.rows)
        while running:
            rows = self.rows[:running]
            feeds = [feed[row] for row in rows]
            logits = torch.cat([self._forward(a, feeds[a:b]) for a, b in spans([len(f) for f in feeds], PREFILL)])
            positions = torch.tensor([wanted[row].position + len(out[row][0]) for row in rows])
            u = uniforms(torch.tensor([wanted[row].key for row in rows]), positions).to(logits.device)
            ids, logps = (x.tolist() for x in sample(logits, u, self.temperature))
            for slot in reversed(range(running)):
                row, token = rows[slot], ids[slot]
                out[row][0].append(token)
                out[row][1].append(logps[slot])
                self.pending[row] = token
                feed[row] = [token]
                if token in self.stop_ids or len(out[row][0]) >= wanted[row].limit:
                    running -= 1
                    self._swap(slot, running)
        return [Completion(*out[r.row], stopped=out[r.row][0][-1] in self.stop_ids) for r in requests]

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
            self.cache.swap(a, b)

    def _forward(self, first: int, feeds: Sequence[Sequence[int]]) -> Tensor:
        """Append `feeds` to the rows in slots first, first + 1, ...; logits after each one's last token, [n, V]."""
        device, width = self.policy.device, max(map(len, feeds))
        rows = self.rows[first : first + len(feeds)]
        starts = torch.tensor([self.seen[row] for row in rows])
        ids = torch.tensor([[*f, *([0] * (width - len(f)))] for f in feeds])
        lengths = torch.tensor([len(f) for f in feeds])
        kwargs = self.cache.prepare(first, starts.to(device), lengths.to(device), width, int((starts + lengths).max()))
        hidden = self.policy.backbone(input_ids=ids.to(device), past_key_values=self.cache, use_cache=True, **kwargs).last_hidden_state
        for row, n in zip(rows, lengths.tolist(), strict=True):
            self.seen[row] += n
        last = hidden[torch.arange(len(feeds), device=device), (lengths - 1).to(device)]
        return self.policy.head(last)


def spans(lengths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Runs [a, b) of neighbours whose padded size is at most `budget`: a long prompt that joins does not widen everybody's forward."""
    out, first, width = [], 0, 0
    for i, n in enumerate(lengths):
        if i > first and max(width, n) * (i + 1 - first) > budget:
            out.append((first, i))
            first, width = i, 0
        width = max(width, n)
    return [*out, (first, len(lengths))]
