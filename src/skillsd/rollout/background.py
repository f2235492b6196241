"""Rollouts that go on while the main thread trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from skillsd.engines.engine import Engine
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

    def submit(self, engine: Engine, play: Callable[[Collector], T]) -> Future[T]:
        """Queue a rollout through this engine; its result, or what it raised."""

        def work() -> T:
            self.collector.engine = engine
            return play(self.collector)

        return self._threads.submit(work)

    def close(self) -> None:
        """Drop what has not begun, wait for what has (its engine is closed by now, or it takes as long as it takes), and close all."""
        self._threads.close()
        self.collector.close()
