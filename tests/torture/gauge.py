"""What a process holds, written down as it trains: resident memory, open files, threads, CPU seconds an iteration."""

from __future__ import annotations

import csv
import os
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L

COLUMNS = ("iteration", "resident_kib", "files", "threads", "seconds", "yardstick")


def yardstick() -> float:
    """CPU seconds of something that is always the same: what else a shared machine does slows both."""
    start = time.process_time()
    sum(i * i for i in range(200_000))
    return time.process_time() - start


class Gauge(L.Callback):
    """Appends a line to gauge.csv in the run folder every `every` iterations. Linux alone.

    Args:
        every: Iterations between two lines; `seconds` is their mean, of all the process's threads, `yardstick` is what it is now.
    """

    def __init__(self, every: int = 20) -> None:
        super().__init__()
        self.every, self.last = every, time.process_time()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = time.process_time()
        with self._file(trainer).open("w", newline="") as f:
            csv.writer(f).writerow(COLUMNS)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every:
            return
        now = time.process_time()
        resident = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
        held = len(os.listdir("/proc/self/fd")), threading.active_count()
        row = (trainer.global_step, resident, *held, (now - self.last) / self.every, yardstick())
        with self._file(trainer).open("a", newline="") as f:
            csv.writer(f).writerow(row)
        self.last = time.process_time()

    def _file(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "gauge.csv"
