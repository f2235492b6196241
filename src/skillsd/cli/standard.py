"""What every run has without being asked: its callbacks, in their order, and its logger.

Each callback has a key of its own at the top of a configuration, beside `trainer`, so that an experiment says what is special about it and
no more, and so that two files can set two keys of one callback without repeating a list. What Lightning has a switch for is switched off
there (`trainer.logger: false`, `trainer.enable_checkpointing: false`); `log`, `panel` and `adapter` have `enabled: false`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler

from skillsd import parallel
from skillsd.callbacks import AdapterExport, Diagnostics, MemoryPlan, Panel, PeerWatch, ProgressLog, RunCheckpoint, RunLog, TeacherSync
from skillsd.cli.flags import DEFAULTS
from skillsd.errors import ConfigError
from skillsd.module import SkillSD
from skillsd.pretrain import Cloning
from skillsd.skills.callback import SkillBankCallback

STANDARD: dict[str, type[L.Callback]] = {
    "teacher": TeacherSync,
    "skills": SkillBankCallback,
    "log": RunLog,
    "panel": Panel,
    "adapter": AdapterExport,
    "checkpoint": RunCheckpoint,
}
"""Key -> the callback that it sets."""
UNFIT: dict[type[L.Callback], str] = {
    BatchSizeFinder: "set data.batch_tasks",
    GradientAccumulationScheduler: "an update takes all of data.batch_tasks x group_size",
    LearningRateFinder: "set model.optimizer.lr",
    ModelPruning: "the base is frozen: set a smaller model.policy.lora.r",
    SpikeDetection: "updates that are not finite are skipped without it",
    StochasticWeightAveraging: "teacher.mode=ema averages the teacher, and the student stays as it is",
    WeightAveraging: "teacher.mode=ema averages the teacher, and the student stays as it is",
}
"""Lightning's callbacks that change training in ways for which this module is not made, and what to set instead."""
ACTING = ("teacher", "skills")
"""They change what training does; the others record it."""


def order_callbacks(
    made: dict[str, L.Callback], given: Sequence[L.Callback], switched_off: Sequence[str] = (), max_time: Any = None
) -> list[L.Callback]:
    """The callbacks of a run.

    What stops a run by the clock is first, so that all know which iteration is the last; then what acts (teacher, bank, the user's own),
    then what records it. Lightning puts checkpoints behind all others; the run's own is the first of those.

    Args:
        made: The standard callbacks by key; empty in pre-training.
        given: Those of `trainer.callbacks`. A subclass of a standard one takes its place.
        switched_off: Keys of those that the run goes without.
        max_time: As the Trainer takes it.

    Raises:
        ConfigError: a standard callback or one of UNFIT stands in the list, or two callbacks do the same.
    """
    made, own = dict(made), list(given)
    for callback in own if made else ():
        if cure := next((cure for kind, cure in UNFIT.items() if isinstance(callback, kind)), ""):
            raise ConfigError(f"trainer.callbacks: {type(callback).__name__} is not for skillsd: {cure}.")
    for key, kind in STANDARD.items():
        if any(type(c) is kind for c in own):
            raise ConfigError(f"trainer.callbacks: every run has one {kind.__name__}: give its settings under `{key}:` instead.")
        if replacing := [c for c in own if isinstance(c, kind)]:
            if len(replacing) > 1:
                raise ConfigError(
                    f"trainer.callbacks: {' and '.join(type(c).__name__ for c in replacing)} are both a {kind.__name__}: keep one."
                )
            if made:
                parallel.print_rank_zero(
                    f"{type(replacing[0]).__name__} of trainer.callbacks takes the place of `{key}:`, whose settings do not count."
                )
                made[key] = replacing[0]
                own.remove(replacing[0])
    made = {key: c for key, c in made.items() if key not in switched_off}
    timers = [c for c in own if isinstance(c, Timer)]
    if max_time is not None:
        if timers:
            raise ConfigError("trainer.max_time: trainer.callbacks has a Timer already: keep one of the two.")
        timers = [Timer(max_time)]
    own = [c for c in own if c not in timers]
    acting = [c for key, c in made.items() if key in ACTING]
    recording = [c for key, c in made.items() if key not in ACTING]
    first_of_checkpoints = [c for c in recording if isinstance(c, RunCheckpoint)]
    recording = [c for c in recording if c not in first_of_checkpoints]
    diagnostics = [Diagnostics()] if made else []
    watch = [] if any(isinstance(c, PeerWatch) for c in own) else [PeerWatch()]
    lines = [] if any(isinstance(c, ProgressLog) for c in own) else [ProgressLog()]
    return [*timers, *acting, *diagnostics, *lines, *first_of_checkpoints, *own, *recording, MemoryPlan(), *watch]


def complete(config: dict[str, Any], made: dict[str, L.Callback], command: str) -> dict[str, Any]:
    """The Trainer's arguments of an experiment, with what every run has.

    Args:
        config: The arguments as they were given.
        made: The standard callbacks by key.
        command: `fit`, `validate`, ...

    Raises:
        ConfigError: see `order_callbacks`; or plugins that a run cannot have.
    """
    off = [key for key in made if not getattr(made[key], "enabled", True)]
    if config["enable_checkpointing"] is False:
        off.append("checkpoint")
    if command == "fit" and off:
        parallel.print_rank_zero(_unrecorded(off))
    if command == "validate":
        off = [key for key in off if key != "panel"]  # it is what a validation writes
    config = _complete(config, made, off)
    config["enable_checkpointing"] = config["enable_checkpointing"] is not False
    config["logger"] = _loggers(True if config["logger"] is None else config["logger"], config["default_root_dir"] or ".")
    if command == "fit":
        if config["limit_val_batches"] is None:
            config["limit_val_batches"] = 0  # the panel is played by its callback
    elif config["limit_val_batches"] == 0:
        config["limit_val_batches"] = None  # meant for a fit
    return config


def complete_pretraining(config: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's arguments of a pre-training: no teacher, bank, record or panel, no checkpoints, and a logger only if one is given.

    Raises:
        ConfigError: as `complete`; or checkpoints are asked for.
    """
    if config["enable_checkpointing"]:
        raise ConfigError("trainer.enable_checkpointing: pre-training writes its model when it ends, and no checkpoints: leave it out.")
    config = _complete(config, {}, ())
    return config | {"enable_checkpointing": False, "logger": _loggers(config["logger"] or False, config["default_root_dir"] or ".")}


def _complete(config: dict[str, Any], made: dict[str, L.Callback], off: Sequence[str]) -> dict[str, Any]:
    """What experiments and pre-training have in common."""
    config = config | {name: value for name, value in DEFAULTS.items() if config[name] is None}
    _check_plugins(config["plugins"])
    given = config["callbacks"] or []
    config["callbacks"] = order_callbacks(made, given if isinstance(given, list) else [given], off, config.pop("max_time", None))
    if config["accelerator"] == "auto" and not torch.cuda.is_available():
        config["accelerator"] = "cpu"  # Lightning would take others, which run none of this
    if config["profiler"] == "xla":
        raise ConfigError("trainer.profiler: xla profiles TPUs, which run no part of this: set it to simple, advanced or pytorch.")
    written = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}  # Lightning would log their tables, where nobody looks
    if config["profiler"] in list(written):
        config["profiler"] = written[config["profiler"]](filename="profile")
    return config


def _loggers(given: Any, folder: str) -> Any:
    """TensorBoard in the run folder, and beside it those that are given; False without any."""
    if given in (False, []):
        return False
    own = [] if given is True else given if isinstance(given, list) else [given]
    if any(isinstance(logger, TensorBoardLogger) for logger in own):
        return own
    return [TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False), *own]


def check_trainer(trainer: L.Trainer, model: L.LightningModule) -> None:
    """Refuse what a run on another device than a CPU or a CUDA GPU, or one without an end of its own, cannot have.

    Raises:
        ConfigError: an accelerator of another kind, or a cosine without a last step.
    """
    device = trainer.strategy.root_device.type
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"trainer.accelerator: {device} runs no part of this: set it to cpu, gpu or auto.")
    endless = trainer.max_epochs == -1 and trainer.max_steps == -1
    if endless and isinstance(model, Cloning):
        raise ConfigError(
            "trainer.max_epochs: the learning rate of pre-training falls to 0 at its end: give a number of epochs or max_steps."
        )
    if endless and isinstance(model, SkillSD) and model.optim.schedule == "cosine" and model.optim.schedule_steps is None:
        raise ConfigError(
            "model.optimizer.schedule_steps: a cosine falls to 0 at the run's last step, and this run has no end: set it, "
            "or trainer.max_epochs or max_steps, or take the schedule constant."
        )


def _check_plugins(plugins: Any) -> None:
    for plugin in plugins if isinstance(plugins, list) else [plugins]:
        if plugin is not None and not isinstance(plugin, ClusterEnvironment):
            name = plugin if isinstance(plugin, str) else type(plugin).__name__
            raise ConfigError(
                f"trainer.plugins: {name} is no cluster environment, and a run takes no other plugin: precision is "
                "model.policy.dtype, checkpoints are written by `checkpoint:`."
            )


def _unrecorded(off: Sequence[str]) -> str:
    lost = {
        "log": "no metrics.csv and no trajectories (log.enabled)",
        "panel": "no panel (panel.enabled)",
        "adapter": "no adapter at the end (adapter.enabled)",
        "checkpoint": "no checkpoints, so that it cannot be continued (trainer.enable_checkpointing)",
    }
    return "this run leaves " + ", ".join(lost[key] for key in lost if key in off) + "."
