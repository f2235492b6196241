"""Rollouts that go on while the main thread trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from skillsd.engines.engine import Engine
from skillsd.rollout.collector import Collector

T = TypeVar("T")


class Background:
    """One thread that plays one rollout after another, with environments of its own.

    Args:
        collector: What it plays with; nobody else may use it.
    """

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self._jobs: SimpleQueue[tuple[Future[Any], Engine, Callable[[Collector], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="rollout", daemon=True)  # one that hangs does not keep the process
        self._thread.start()

    def submit(self, engine: Engine, play: Callable[[Collector], T]) -> Future[T]:
        """Queue a rollout through this engine; its result, or what it raised."""
        future: Future[T] = Future()
        self._jobs.put((future, engine, play))
        return future

    def close(self) -> None:
        """Drop what has not begun, wait for what has (its engine is closed by now, or it takes as long as it takes), and close all."""
        with suppress(Empty):
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    job[0].cancel()
        self._jobs.put(None)
        self._thread.join()
        self.collector.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, self.collector.engine, play = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(play(self.collector))
                except BaseException as e:
                    future.set_exception(e)
