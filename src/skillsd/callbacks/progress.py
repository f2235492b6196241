"""What a log says while a run goes on: plain lines, where no progress bar can be drawn."""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Callable
from math import inf, isinf
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar, Timer
from rich.console import Console

from skillsd import parallel
from skillsd.callbacks.budget import EnvStepBudget
from skillsd.callbacks.log import RunLog
from skillsd.errors import ConfigError
from skillsd.words import count, duration

WINDOW = 50
"""Iterations over which the seconds of one are averaged."""
WITHIN = 6
"""Lines within an iteration are so many times rarer than those between two."""


class ProgressLog(L.Callback):
    """A line an iteration where no progress bar is drawn: in a file, under nohup, in CI, in the cells of a study.

    It says how many iterations of how many are done, the share of episodes solved, the loss, the seconds of an iteration and the time
    left; a long rollout or panel says how many of its episodes are played. A run that is resumed says from where, on a terminal too.

    Args:
        every: Seconds between two lines, at least; the first and the last iteration always have one. null writes none of them.
    """

    def __init__(self, every: float | None = 10.0) -> None:
        super().__init__()
        if every is not None and not every >= 0:
            raise ConfigError(f"trainer.callbacks: ProgressLog.every is {every}: give 0 or more seconds, or null for no lines.")
        self.every, self.clock = every, time.monotonic
        self.latest, self.shown = -inf, ""
        self.ends: deque[float] = deque(maxlen=WINDOW + 1)  # when iterations ended; the first is when training began
        self.written = -1  # iteration of the latest line
        self.outputs: Any = None  # of the latest iteration

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.latest, self.shown, self.written = -inf, "", -1
        self.ends.clear()
        data: Any = getattr(trainer, "datamodule", None)
        drawn, bar = draws_bar(trainer), trainer.progress_bar_callback
        if hasattr(data, "progress") and parallel.is_rank_zero() and self.every is not None:
            data.progress = None if drawn else self.playing
        if isinstance(bar, RichProgressBar) and not drawn:
            bar.disable()  # of it a file would get the last state of each epoch, wrapped
        model = getattr(getattr(pl_module, "settings", None), "model", None)
        if model is not None and pl_module.policy is None:
            parallel.print_rank_zero(f"loading the model {model}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "progress"):
            data.progress = None

    def playing(self, what: str, played: int, n: int) -> None:
        """Say that so many of an iteration's or a panel's n episodes are played; called often."""
        if self.every is not None and played < n and self.clock() - self.latest >= WITHIN * self.every:
            self._say(f"{what}: {played} of {count(n, 'episode')} played")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        if step and (step >= total or _budget_left(trainer) == 0):
            parallel.print_rank_zero(f"all {count(step, 'iteration')} are done already")
            return
        if step:
            parallel.print_rank_zero(f"continuing from iteration {position(step, trainer)}")
        if any(isinstance(c, RunLog) for c in trainer.callbacks):  # type: ignore[attr-defined]
            folder = shlex.quote(str(Path(trainer.default_root_dir)))
            parallel.print_rank_zero(f"meanwhile: skillsd view {folder}, or skillsd show {folder}")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.ends:
            self.ends.append(self.clock())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ends.append(self.clock())
        self.outputs = outputs
        first = len(self.ends) == 2 and self.written < 0
        if first or (self.every is not None and self.clock() - self.latest >= self.every):
            self._line(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.ends and self.written != trainer.global_step:
            self._line(trainer)
        if self.ends and trainer.should_stop and trainer.global_step < trainer.estimated_stepping_batches:
            parallel.print_rank_zero(f"training ends after iteration {position(trainer.global_step, trainer)}: {_who_stopped(trainer)}")

    def _line(self, trainer: L.Trainer) -> None:
        if self.every is None or not parallel.is_rank_zero() or draws_bar(trainer) or len(self.ends) < 2:
            return
        seconds = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        left = time_left(trainer, seconds)
        parts = [*numbers(self.outputs), f"{seconds:.3g} s each"]
        if left is not None and trainer.global_step < trainer.estimated_stepping_batches and not trainer.should_stop:
            parts.append(f"about {duration(left)} left")
        self.written = trainer.global_step
        self._say(f"iteration {position(trainer.global_step, trainer)}: {', '.join(parts)}")

    def _say(self, text: str) -> None:
        self.latest = self.clock()
        if text != self.shown:
            self.shown = text
            parallel.print_rank_zero(text)


def draws_bar(trainer: L.Trainer, console: Callable[[], Console] = Console) -> bool:
    """Return whether a progress bar is seen: Lightning's default one draws nothing into a file."""
    bar: Any = trainer.progress_bar_callback
    if bar is None or bar.is_disabled:
        return False
    if isinstance(bar, RichProgressBar):
        c = console()
        return c.is_jupyter or (c.is_terminal and not c.is_dumb_terminal)
    return True


def numbers(outputs: Any) -> list[str]:
    """An iteration in words: of Skill-SD's the share solved and the loss, of another module the loss that it returned."""
    if isinstance(outputs, dict) and "metrics" in outputs:
        m = outputs["metrics"]
        failed = m["rollout/failed"]
        out = [] if failed == 1 else [f"solved {m['reward/success']:.3f}"]
        return [*out, *([f"{100 * failed:.3g}% of the episodes failed"] if failed else []), f"loss {m['loss/total']:.4g}"]
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return [] if loss is None else [f"loss {float(loss):.4g}"]


def position(step: int, trainer: Any) -> str:
    """How far a run is: `24 of 48`, `24 of at most 48` where something else may end it before, `24` where no end is known."""
    total = trainer.estimated_stepping_batches
    if isinf(total):
        return f"{step:,}"
    limits = any(isinstance(c, EnvStepBudget | Timer) for c in trainer.callbacks)
    return f"{step:,} of {'at most ' * limits}{int(total):,}"


def _who_stopped(trainer: Any) -> str:
    """Why a run ends before its last iteration, as far as that is known."""
    for c in trainer.callbacks:
        if isinstance(c, EnvStepBudget) and c.used >= c.steps:
            return f"{c.used:,} environment steps are played, of EnvStepBudget's {c.steps:,}"
        if isinstance(c, Timer) and (left := c.time_remaining()) is not None and left <= 0:
            return "its time is up (trainer.max_time, or a Timer)"
        if isinstance(c, EarlyStopping) and (c.stopped_epoch or c.wait_count >= c.patience):
            return f"EarlyStopping, by {c.monitor}"
    return "a callback asked for it"


def time_left(trainer: Any, seconds: float) -> float | None:
    """Seconds until the run ends, at so many an iteration: when its iterations, its environment steps or its time are used up."""
    step, total = trainer.global_step, trainer.estimated_stepping_batches
    lefts = [(total - step) * seconds, _budget_left(trainer) * seconds]
    lefts += [t for c in trainer.callbacks if isinstance(c, Timer) and (t := c.time_remaining()) is not None]
    first_limit = min(lefts)
    return None if isinf(first_limit) else max(0.0, float(first_limit))


def _budget_left(trainer: Any) -> float:
    """Iterations until a budget of environment steps is used up, at the run's mean so far; infinite without one."""
    step = trainer.global_step
    lefts = [max(0, c.steps - c.used) * step / c.used for c in trainer.callbacks if isinstance(c, EnvStepBudget) and c.used]
    return min(lefts, default=inf)
