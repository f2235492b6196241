"""When a rank counts as gone, by itself; tests/e2e/test_ranks_gone.py kills some."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from skillsd.callbacks import PeerWatch
from skillsd.callbacks import watchdog as module
from skillsd.callbacks.watchdog import FAILED, LEFT, READY_S
from skillsd.errors import ConfigError


class Store:
    """What the ranks have counted; `None` when rank 0, which keeps it, has ended."""

    def __init__(self, counts: dict[int, int] | None) -> None:
        self.counts = counts

    def add(self, key: str, n: int) -> int:
        if self.counts is None:
            raise RuntimeError("Connection reset by peer")
        self.counts[int(key)] += n
        return self.counts[int(key)]


def watching(counts: dict[int, int] | None, seen: dict[int, tuple[int, float]]) -> Any:
    """Rank 0 of three, or what is left of it."""
    watch: Any = PeerWatch(patience=30)
    watch.store, watch.seen, watch.failed, watch.children = Store(counts), seen, set(), []
    return watch


def once(watch: Any) -> None:
    """One round of signs of life."""
    watch.over = SimpleNamespace(is_set=iter([False, True]).__next__, wait=lambda s: None)
    watch._exchange_heartbeats()
    watch.over = threading.Event()


def test_a_patience_below_its_minimum_is_refused():
    with pytest.raises(ConfigError, match=r"PeerWatch.patience is 5: give more than 5 seconds"):
        PeerWatch(patience=5)


def test_a_rank_without_a_sign_of_life_is_lost():
    now = time.monotonic()
    watch = watching({0: 7, 1: 3, 2: 4}, {0: (7, now - 40), 1: (3, now - 40), 2: (3, now - 40)})
    once(watch)
    assert watch.store.counts == {0: 8, 1: 3, 2: 4}
    assert watch._lost_ranks(time.monotonic()) == [1]  # rank 2 has counted on; this one's own number is no matter


def test_one_that_gets_ready_has_longer():
    watch = watching(None, {0: (9, 100.0), 1: (0, 100.0), 2: (1, 100.0)})
    assert watch._lost_ranks(100.0 + 31) == [2] and watch._lost_ranks(101.0 + READY_S) == [1, 2]


def test_one_that_has_left_is_not_missed_and_one_that_has_failed_is():
    now = time.monotonic()
    watch = watching({0: 1, 1: LEFT + 5, 2: FAILED + 5}, {0: (1, now), 1: (LEFT + 5, now - 99), 2: (5, now)})
    once(watch)
    assert watch._lost_ranks(time.monotonic()) == [2]


@pytest.mark.parametrize("last, gone", [(5, {0}), (LEFT + 5, set())])
def test_a_store_that_does_not_answer(last, gone):
    """Rank 0 keeps it, and takes it along when it leaves."""
    now = time.monotonic()
    watch = watching(None, {0: (last, now), 1: (5, now)})
    once(watch)
    assert watch.failed == gone


def test_a_child_process_that_failed_is_lost(monkeypatch):
    """A child of Lightning's launcher is missed soon, whatever its number says. One that ended well ended together with this rank."""
    watch = watching(None, {0: (1, 0.0), 1: (1, 0.0), 2: (1, 0.0)})
    watch.children = [SimpleNamespace(poll=lambda: 0), SimpleNamespace(poll=lambda: -9)]
    assert watch._lost_ranks(0.0) == [2]


def test_a_process_that_stood_still_blames_nobody(monkeypatch):
    """After Ctrl-Z and fg, or a suspended job: what it knew of the others is old."""
    watch = watching(None, {0: (1, 0.0), 1: (1, 0.0), 2: (1, 0.0)})
    clock = iter([100.0, 102.0, 500.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.__next__))
    rounds = iter([False, True])
    watch.over = SimpleNamespace(wait=lambda s: next(rounds))
    ended: list[Any] = []
    watch._end = lambda trainer, gone: ended.append(gone)
    watch._watch(None)
    assert ended == [[1, 2]]  # two seconds after the last look: they are silent
    watch.seen, rounds, clock = {0: (1, 0.0), 1: (1, 0.0), 2: (1, 0.0)}, iter([False, True]), iter([100.0, 500.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.__next__))
    watch._watch(None)
    assert ended == [[1, 2]] and watch.seen[1] == (1, 500.0)
