"""Rollouts that go on while the main thread trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from skillsd.rollout.collector import Collector
from skillsd.timeouts import Threads

T = TypeVar("T")


class Background:
    """One thread that plays one rollout after another, with environments of its own.

    Args:
        collector: What it plays with; nobody else may use it.
    """

    def __init__(self, collector: Collector) -> None:
        self.collector, self._threads = collector, Threads(1, name="rollout", failures=False)

    def submit(self, play: Callable[[Collector], T]) -> Future[T]:
        """Queue a rollout; its result, or what it raised."""
        return self._threads.submit(partial(play, self.collector))

    def close(self) -> None:
        """Drop what has not begun, wait for what has (its engine is closed by now, or it takes as long as it takes), and close all."""
        self._threads.close()
        self.collector.close()
