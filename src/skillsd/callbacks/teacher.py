"""Teacher weights: Algorithm 1, line 1."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L

from skillsd.errors import ConfigError
from skillsd.policy import Policy


class TeacherSync(L.Callback):
    """Keeps the teacher adapter: a copy of the student every k iterations, an average, or frozen at the start.

    Args:
        mode: `sync` copies, `ema` averages after each update, `frozen` leaves it where it began.
        every: Iterations between two copies (k).
        rate: Share of the student in each EMA step, theta_bar <- (1 - rate) theta_bar + rate theta.
    """

    def __init__(self, mode: Literal["sync", "ema", "frozen"] = "sync", every: int = 1, rate: float = 0.05) -> None:
        super().__init__()
        if every < 1:
            raise ConfigError(f"TeacherSync.every is {every}: give at least 1 iteration.")
        if not 0 < rate <= 1:
            raise ConfigError(f"TeacherSync.rate is {rate}: give a share above 0 and up to 1.")
        self.mode, self.every, self.rate = mode, every, rate

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.mode == "sync" and trainer.global_step % self.every == 0:
            _policy(pl_module).sync()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.mode == "ema":
            _policy(pl_module).ema(self.rate)


def _policy(module: Any) -> Policy:
    return module.policy  # type: ignore[no-any-return]
