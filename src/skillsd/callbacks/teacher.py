"""Teacher weights: Algorithm 1, line 1."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L

from skillsd.errors import ConfigError


class TeacherSync(L.Callback):
    """Keeps the teacher adapter: a copy of the student every k iterations, an average, or frozen at the start.

    Args:
        mode: `sync` copies the student after every k-th update, `ema` averages after each, `frozen` leaves it where it began.
        every: Iterations between two copies (k).
        rate: Share of the student in each EMA step, theta_bar <- (1 - rate) theta_bar + rate theta.
    """

    def __init__(self, mode: Literal["sync", "ema", "frozen"] = "sync", every: int = 1, rate: float = 0.05) -> None:
        super().__init__()
        if every < 1:
            raise ConfigError(f"teacher.every is {every}: give at least 1 iteration.")
        if not 0 < rate <= 1:
            raise ConfigError(f"teacher.rate is {rate}: give a share above 0 and up to 1.")
        self.mode, self.every, self.rate = mode, every, rate

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        policy: Any = pl_module.policy
        # At the end of iteration i - 1, not at the start of i: the batch is rolled out in between, maybe by the teacher.
        if self.mode == "ema":
            if not (outputs or {}).get("skipped"):  # or the student has not moved: nor does its average
                policy.ema(self.rate)
        elif self.mode == "sync" and trainer.global_step % self.every == 0:
            policy.sync()
