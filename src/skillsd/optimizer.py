"""AdamW on the student's adapter: its settings and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from skillsd.errors import ConfigError

MAX_RATE = 1e30
"""Largest learning rate and weight decay: AdamW refuses a factor beyond float32 in the middle of a run."""


@dataclass
class OptimizerSettings:
    """AdamW on the student's adapter."""

    lr: float = 2e-5
    """Learning rate after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 0
    """Iterations over which the learning rate grows linearly."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine to 0 at the run's end."""
    schedule_steps: int | None = None
    """Iterations at which the cosine reaches 0, for runs that another limit ends; null is the run's length."""
    gradient_clip_norm: float = 1.0
    """Largest gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        if not all(x >= 0 for x in (self.lr, self.weight_decay, self.warmup_steps, self.gradient_clip_norm)):  # nan is neither
            raise ConfigError("model.optimizer: lr, weight_decay, warmup_steps and gradient_clip_norm must be 0 or more.")
        if max(self.lr, self.weight_decay) > MAX_RATE:
            raise ConfigError(f"model.optimizer: lr and weight_decay must be at most {MAX_RATE:g}: AdamW computes in float32.")
        if self.schedule_steps is not None and self.schedule_steps < 1:
            raise ConfigError(f"model.optimizer.schedule_steps is {self.schedule_steps}: give at least 1 iteration, or null.")

    def factor(self, run_steps: float) -> Callable[[int], float]:
        """What the learning rate is multiplied with at an iteration (0-based), in a run of `run_steps` iterations."""
        total = max(1, self.schedule_steps or run_steps)

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if self.schedule == "cosine" else 1.0

        return factor

    def apply(self, optimizer: Any, schedule: Any) -> None:
        """Make lr and weight decay hold, whatever a checkpoint brought along: "set a smaller lr" must help."""
        schedule.base_lrs = [self.lr]
        lr = self.lr * schedule.lr_lambdas[0](schedule.last_epoch)
        for group in optimizer.param_groups:
            group.update(initial_lr=self.lr, lr=lr, weight_decay=self.weight_decay)
