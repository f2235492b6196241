"""Equal experience: a run ends when it has used up its environment steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from skillsd.errors import ConfigError
from skillsd.trajectory import TrajectoryGroup


class EnvStepBudget(L.Callback):
    """Stops training after the iteration in which the environment steps (turns played) reach `steps`.

    Methods whose episodes end sooner get more iterations: set trainer.max_epochs high enough for the slowest, and
    optimizer.schedule_steps, or the cosine follows max_epochs.

    Args:
        steps: Environment steps of the whole run, >= 1.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        if steps < 1:
            raise ConfigError(f"trainer.callbacks: EnvStepBudget.steps is {steps}: give at least 1.")
        self.steps, self.used = steps, 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        # Before the update: at its end all callbacks know that it is the last, in whatever order they stand.
        groups: Sequence[TrajectoryGroup] = batch
        self.used += sum(len(t.turns) for g in groups for t in g.trajectories)
        trainer.should_stop = trainer.should_stop or self.used >= self.steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.used >= self.steps  # a finished run that is run again

    def state_dict(self) -> dict[str, Any]:
        return {"used": self.used}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.used = state_dict["used"]
