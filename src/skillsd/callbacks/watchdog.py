"""Several ranks: the end of one is the end of the run, soon and with a checkpoint; a slow one is waited for."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import lightning as L
from torch.distributed import distributed_c10d as c10d

from skillsd import parallel
from skillsd.errors import ConfigError

HEARTBEAT_S = 2.0
"""Seconds between two signs of life."""
LEFT, FAILED = 1 << 40, 1 << 41
"""Added to a rank's count of them when it ends, as it should or with an error."""
READY_S = 1800.0
"""Seconds in which a rank has to have read its tasks and tokenizer, after the first that has."""
GRACE_S = 10.0
"""Seconds in which a rank may end by itself, after another has, before it is ended: it may wait for ever in a collective."""


class PeerWatch(L.Callback):
    """Ends a run of several ranks when one of them is gone; every run has one.

    Each rank gives a sign of life every two seconds through the store by which the ranks met. One that gives none for `patience` seconds,
    or whose process has ended, is gone: the others write the last finished iteration (see RunCheckpoint) and end. A rank that is only
    slow goes on giving them, and is waited for.

    Args:
        patience: Seconds, above 5. Code that holds Python's lock for so long without a break looks as if it were gone.
    """

    _runs = 0  # of this process: keys of an earlier one are not looked at

    def __init__(self, patience: float = 30.0) -> None:
        super().__init__()
        if not patience > 5:
            raise ConfigError(f"trainer.callbacks: PeerWatch.patience is {patience}: give more than 5 seconds.")
        self.patience = patience
        self.over = threading.Event()
        self.watching = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if parallel.world() == 1 or self.watching:
            return
        PeerWatch._runs += 1
        self.watching, self.over = True, threading.Event()
        met: Any = c10d._get_default_store()
        self.store: Any = c10d.PrefixStore(f"skillsd/peers/{PeerWatch._runs}", met.clone())  # the main thread may hold the other for long
        self.seen = {r: (0, time.monotonic()) for r in range(parallel.world())}  # rank -> its count, and since when it is that
        self.failed: set[int] = set()
        self.children = getattr(trainer.strategy.launcher, "procs", [])
        for thread in threading.enumerate():  # Lightning's own would kill this process before it has saved anything
            if thread.name == "child-process-observer":
                thread._finished = True  # type: ignore[attr-defined]
        for name, loop in (("signs of life", self._exchange_heartbeats), ("peer watch", lambda: self._watch(trainer))):
            threading.Thread(target=loop, name=name, daemon=True).start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.watching:
            parallel.gather(None)  # together: the store goes with rank 0, and its end is no failure
        self._leave(LEFT)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leave(FAILED)

    def _leave(self, how: int) -> None:
        """Tell the others, and look after them no longer."""
        if self.watching:
            self.watching = False
            self.over.set()
            with suppress(RuntimeError):  # rank 0, which keeps the store, may have left before
                self.store.add(str(parallel.rank()), how)

    def _exchange_heartbeats(self) -> None:
        """Give signs of life, and take those of the others. When rank 0's process has ended, the store does not answer."""
        me = parallel.rank()
        while not self.over.is_set():
            try:
                count = {r: self.store.add(str(r), int(r == me)) for r in self.seen}
            except RuntimeError:
                if self.seen[0][0] < LEFT:
                    self.failed.add(0)
                return
            now = time.monotonic()
            self.failed |= {r for r, n in count.items() if n >= FAILED}
            self.seen |= {r: (n, now) for r, n in count.items() if n != self.seen[r][0] or n >= LEFT}
            self.over.wait(HEARTBEAT_S)

    def _watch(self, trainer: L.Trainer) -> None:
        last = time.monotonic()
        while not self.over.wait(HEARTBEAT_S):
            now, before = time.monotonic(), last
            last = now
            if now - before > 3 * HEARTBEAT_S:  # this process stood still itself, suspended perhaps: what it knows of the others is old
                self.seen |= {r: (n, now) for r, (n, _) in self.seen.items()}
            elif gone := self._lost_ranks(now):
                self._end(trainer, gone)
                return

    def _lost_ranks(self, now: float) -> list[int]:
        """Ranks whose process has ended, or that are silent. One that has not given a sign yet may still be getting ready."""
        me = parallel.rank()
        ended = {me + 1 + i for i, child in enumerate(self.children) if child.poll()}
        silent = {r for r, (n, since) in self.seen.items() if now - since > (self.patience if n else READY_S)}
        return sorted((ended | silent | self.failed) - {me})

    def _end(self, trainer: L.Trainer, gone: list[int]) -> None:
        """The main thread is asked first: it may be in the middle of something, or wait for ever."""
        if self.over.wait(3 * HEARTBEAT_S):  # the others' error is this rank's as well, and it says so better
            return
        who = "rank " + ", ".join(map(str, gone))
        saver: Any = trainer.checkpoint_callback
        if parallel.is_rank_zero() or 0 in gone:
            print(f"\n{parallel.name()}{who} has ended, or is silent for {self.patience:g} s: the run stops.", file=sys.stderr, flush=True)
        if parallel.is_rank_zero() and hasattr(saver, "rescue"):
            saver.rescue()
        os.kill(os.getpid(), signal.SIGTERM)
        if self.over.wait(GRACE_S):
            time.sleep(GRACE_S)
        os._exit(1)
