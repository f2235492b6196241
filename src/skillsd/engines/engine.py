"""What an engine is: token prompts in, sampled tokens and their log-probs out. It knows no environment and no reward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self, TypeAlias

import torch


class CacheFull(RuntimeError):
    """More rows are in progress than there is memory for.

    Args:
        message: One line for the log.
        rows: How many are sure to fit, of the length that the memory plan counts on.
    """

    def __init__(self, message: str, rows: int) -> None:
        super().__init__(message)
        self.rows = rows


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


@dataclass(eq=False)
class Version:
    """An adapter as it was once, in files. Its name is of the run and the content: the same on every rank, and after a resume."""

    name: str
    folder: Path


Adapter: TypeAlias = "str | Version | None"
"""Who acts: an adapter of the policy by its name, one as it was when `Engine.snapshot` was called, or None for the untouched base."""


class Session(ABC):
    """Trajectories in progress. A context manager: at its end the memory that others need is given back.

    Attributes:
        continuous: True if a row may join while others are in the middle of a turn. If not, the rows of a turn are given together.
    """

    continuous = False

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> None:
        """Begin a turn for each. Raises CacheFull, as `step` does."""

    @abstractmethod
    def step(self) -> list[tuple[int, Completion]]:
        """Go on with what was submitted. Returns the rows whose turn has ended, with what was sampled; [] where none has."""

    @abstractmethod
    def forget(self, rows: Iterable[int]) -> None:
        """Drop rows that are finished, or that nobody waits for."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """True while a turn goes on."""

    @abstractmethod
    def close(self, failed: bool = False) -> None:
        """End the session. After a failure the next one begins with nothing of this one's."""

    def turn(self, requests: Sequence[Request]) -> list[Completion]:
        """One turn for each request, all of it, in their order."""
        self.submit(requests)
        found: dict[int, Completion] = {}
        while self.busy:
            found.update(self.step())
        return [found[r.row] for r in requests]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=kind is not None)


class Engine(Protocol):
    """Opens sessions."""

    def open(self, temperature: float, adapter: Adapter = "student") -> Session:
        """A session that samples from one adapter, or from the untouched base. `temperature` 0 is greedy."""

    def snapshot(self, adapter: str) -> Adapter:
        """An adapter as it is now, for sessions that are opened later. An engine that decodes with the weights in training knows only
        their present state, and returns the name: its rollouts end before the next update (`data.rollout.staleness` is 0)."""

    def close(self) -> None:
        """End it for good."""


def complete(engine: Engine, requests: Sequence[Request], temperature: float, adapter: Adapter, max_rows: int) -> list[Completion | None]:
    """One turn for each of many requests, in their order: `max_rows` at one time, and fewer where those do not fit into the memory.

    Returns:
        A completion for each; None for a row that does not fit even alone.
    """
    found: dict[int, Completion] = {}
    parts = deque(requests[i : i + max_rows] for i in range(0, len(requests), max_rows))
    alone: set[int] = set()  # rows that have had their try
    while parts:
        part, full = parts.popleft(), False
        try:
            with engine.open(temperature, adapter) as session:
                found |= {r.row: completion for r, completion in zip(part, session.turn(part), strict=True)}
        except (CacheFull, torch.OutOfMemoryError):
            full = True  # go on outside: the exception holds on to the session
        if full and len(part) > 1:
            parts.extendleft([part[len(part) // 2 :], part[: len(part) // 2]])
        elif full and part[0].row not in alone:  # an earlier session may have left the cache in another shape
            alone.add(part[0].row)
            parts.appendleft(part)
    return [found.get(r.row) for r in requests]
