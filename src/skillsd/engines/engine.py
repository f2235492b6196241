"""Engines: token prompts in, sampled tokens and their log-probs out. They know no environment and no reward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from skillsd.engines.cache import Room

STRIDE = 8  # steps before somebody else may speak, if no row's turn is over sooner


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


class Session(ABC):
    """Trajectories in progress.

    Attributes:
        continuous: Whether a row may join while others are in the middle of a turn. If not, the rows of a turn are given together.
    """

    continuous = False

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> None:
        """Begin a turn for each."""

    @abstractmethod
    def step(self) -> list[tuple[int, Completion]]:
        """Go on with what was submitted. Rows whose turn is over, with what was sampled; [] while there are none, or none is left."""

    @abstractmethod
    def forget(self, rows: Iterable[int]) -> None:
        """These rows are finished."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a turn is going on."""

    def turn(self, requests: Sequence[Request]) -> list[Completion]:
        """One turn for each request, all of it, in their order."""
        self.submit(requests)
        done: dict[int, Completion] = {}
        while self.busy:
            done.update(self.step())
        return [done[r.row] for r in requests]


class Engine(Protocol):
    """Opens sessions. `temperature` 0 is greedy.

    Attributes:
        room: What the rollout may take of the memory (`callbacks.memory`); None sets no limit.
    """

    room: Room | None

    def open(self, temperature: float, adapter: str | None = "student") -> Session:
        """A session that samples from one adapter of the policy, or from the untouched base (None)."""

    def most_rows(self, tokens: int) -> int:
        """How many rows of so many tokens are sure to find room at one time. With more a session may raise `CacheFull`."""

    def most_tokens(self) -> int:
        """The longest row that is sure to find room alone."""

    def release(self, everything: bool = False) -> None:
        """The rollout is over: give back memory that others need, or all, after an error too."""

    def close(self) -> None:
        """It is not used again."""
