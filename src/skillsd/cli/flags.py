"""Which parameters of Lightning's Trainer a run takes, and which key of skillsd stands for each of the others.

A parameter is in `WORKS` (a test runs with it) or in `REFUSED` (another value than the one that changes nothing is refused while files and
flags are read, and neither `--help` nor `--print_config` shows it). One that a later Lightning adds is in neither and is refused: nobody
knows yet what it does to a run.
"""

from __future__ import annotations

import inspect
from argparse import SUPPRESS, ArgumentTypeError
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any, NamedTuple, get_args, get_type_hints

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from skillsd.errors import ConfigError
from skillsd.trainer import Trainer


class Refusal(NamedTuple):
    """A parameter that is not taken: values that change nothing, and what to set instead."""

    neutral: tuple[Any, ...]
    cure: str


WORKS = (
    "accelerator", "strategy", "devices", "num_nodes", "logger", "callbacks", "max_epochs", "min_epochs", "max_steps", "min_steps",
    "max_time", "limit_val_batches", "check_val_every_n_epoch", "log_every_n_steps", "enable_checkpointing", "enable_progress_bar",
    "enable_model_summary", "deterministic", "benchmark", "inference_mode", "profiler", "detect_anomaly", "plugins", "default_root_dir",
)  # fmt: skip
"""`plugins` may be cluster environments alone, `strategy` one device and DDP: both are checked when the Trainer is made."""
DEFAULTS = {"devices": 1, "log_every_n_steps": 1, "enable_model_summary": False}
"""Where skillsd's default is not Lightning's."""
MINIMA = {"check_val_every_n_epoch": 1, "log_every_n_steps": 0, "min_epochs": 0, "min_steps": 0}
"""The smallest value of numbers that Lightning does not look at."""
ALWAYS = {"num_sanity_val_steps": 0}
"""What the Trainer is given although it is in `REFUSED`, since Lightning's own default is another."""

_FEWER = "train on fewer tasks with data.tasks_file or the environment's splits, or end the run with trainer.max_steps"
_CLIP = "set model.optimizer.gradient_clip_norm (in pre-training model.gradient_clip_norm)"
REFUSED = {
    "precision": Refusal(
        (None, "32-true", "32", 32),
        "the base computes in model.policy.dtype, adapters and loss in float32 (in pre-training see model.bf16)",
    ),
    "fast_dev_run": Refusal((False, 0), "for a short try set trainer.max_steps and panel.enabled=false, in a run folder of its own"),
    "limit_train_batches": Refusal((None, 1.0), f"an epoch visits every task once: {_FEWER}"),
    "overfit_batches": Refusal((0, 0.0), _FEWER),
    "limit_test_batches": Refusal((None, 1.0), "no command tests: held-out tasks are the panel, data.panel_split"),
    "limit_predict_batches": Refusal((None, 1.0), "no command predicts: skillsd play shows an episode"),
    "val_check_interval": Refusal((None, 1.0), "set panel.every, in iterations"),
    "num_sanity_val_steps": Refusal((None, 0), "panel.before plays the panel before training"),
    "accumulate_grad_batches": Refusal(
        (1,),
        "an update takes all of data.batch_tasks x group_size, model.micro_batch_tokens at a time (in pre-training set data.batch_size)",
    ),
    "gradient_clip_val": Refusal((None,), _CLIP),
    "gradient_clip_algorithm": Refusal((None,), f"gradients are clipped by their norm: {_CLIP}"),
    "use_distributed_sampler": Refusal((True,), "ranks share out an iteration's tasks by themselves: leave it out"),
    "barebones": Refusal((False,), "switch off what is not wanted: log.enabled, panel.enabled, adapter.enabled, trainer.logger"),
    "sync_batchnorm": Refusal((False,), "the base is frozen, and so are its statistics: leave it out"),
    "reload_dataloaders_every_n_epochs": Refusal((0,), "tasks are listed once, when a run begins: leave it out"),
    "enable_autolog_hparams": Refusal((True,), "loggers get the settings from the record: set trainer.logger or log.enabled"),
    "model_registry": Refusal((None,), "nothing is uploaded: `skillsd export` writes the adapter"),
}
_OPTIMIZER = Refusal((None,), "the optimizer is AdamW, under model.optimizer (in pre-training model.lr and the like)")
NO_TRAINER = {"optimizer": _OPTIMIZER, "lr_scheduler": _OPTIMIZER._replace(cure="set model.optimizer.schedule and warmup_steps")}
"""Arguments that LightningCLI adds for modules which leave their optimizer to it."""
_NEW = "it is new in this Lightning, and not known to work with skillsd: leave it out"

HELP = {
    "trainer.default_root_dir": "The run folder, on a disk of this machine or one that is mounted. Default: the present folder.",
    "trainer.logger": "A logger or several, beside TensorBoard in the run folder; null (or true) is TensorBoard alone, false is none.",
    "trainer.limit_val_batches": "How much of the panel Lightning's validation plays: a share, or a number of batches of 4 x "
    "data.rollout.max_rows episodes. null: all of it under `validate`, nothing in a fit, where panel.every plays it.",
    "ckpt_path": "A checkpoint, or `last`: the run folder's newest that is whole.",
}
"""Instead of Lightning's texts, where they do not hold for skillsd."""
CKPT_PATH = {
    "fit": "To go on from: `last` begins anew where no checkpoint was ever written. Default: a new run, or `last` where the run "
    "folder itself is named (skillsd fit RUN).",
    "validate": "Default: the same, if the run folder has one. null: the agent as it starts.",
}
"""What a command makes of it besides."""

SEEDS = 2**32
"""Run seeds, from 0: what NumPy takes."""


class _NotTaken(ArgumentTypeError, ValueError):
    """Both, so that the parser shows the text whether the value comes from a flag or from a file."""


def trainer_parameters() -> dict[str, Any]:
    """The parameters of the installed Lightning's Trainer, with its defaults."""
    return {name: p.default for name, p in inspect.signature(L.Trainer).parameters.items()}


def refusals() -> dict[str, Refusal]:
    """Key -> why it is not taken, for the installed Lightning."""
    given = trainer_parameters()
    new = {name: Refusal((default,), _NEW) for name, default in given.items() if name not in WORKS and name not in REFUSED}
    return {f"trainer.{name}": r for name, r in ({k: v for k, v in REFUSED.items() if k in given} | new).items()} | NO_TRAINER


def add_trainer_arguments(parser: LightningArgumentParser) -> None:
    """Add what works to the parser, and what does not as keys that refuse their value and are shown nowhere."""
    refused = refusals()
    skip = {key.removeprefix("trainer.") for key in refused}
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True, skip=skip)
    parser.set_defaults({f"trainer.{name}": value for name, value in DEFAULTS.items()})
    for key, refusal in refused.items():
        parser.add_argument(f"--{key}", type=_refusing(refusal), default=SUPPRESS, help=SUPPRESS)


def settings_groups(kind: type) -> dict[str, type]:
    """The parameters of a class that are `a dataclass | None`, each with its dataclass."""
    hints = get_type_hints(inspect.getattr_static(kind, "__init__"))
    return {name: part for name, hint in hints.items() for part in get_args(hint) if isinstance(part, type) and is_dataclass(part)}


def add_with_groups(parser: LightningArgumentParser, kind: type, key: str) -> None:
    """Add a class's parameters below `key`. One that is `a dataclass | None` gets a key for each of its settings, which `--help` lists and
    `--print_config` writes out; jsonargparse would hide them behind the null.
    """
    groups = settings_groups(kind)
    for name, part in reversed(groups.items()):
        parser.add_class_arguments(part, f"{key}.{name}", fail_untyped=False, sub_configs=True)
    parser.add_class_arguments(kind, key, fail_untyped=False, sub_configs=True, skip=set(groups))


def correct_help(parser: LightningArgumentParser, command: str) -> None:
    """Put HELP in the place of Lightning's texts, in the parser of a command, and one line in the place of a page of flags."""
    parser.usage = f"skillsd {command} -c FILE_OR_RUN [-c OVERLAY ...] [--KEY=VALUE ...]"
    for action in parser._actions:
        if action.dest in HELP and (action.dest != "ckpt_path" or command in CKPT_PATH):
            action.help = f"{HELP[action.dest]} {CKPT_PATH[command] if action.dest == 'ckpt_path' else ''}".strip()


def check_values(config: Mapping[str, Any]) -> None:
    """Refuse what Lightning takes and a run stumbles over later.

    Args:
        config: The parameters of the Trainer.

    Raises:
        ConfigError: a number is too small, or the run folder is an address.
    """
    folder = config.get("default_root_dir")
    if "://" in str(folder):
        raise ConfigError(f"trainer.default_root_dir: {folder} is an address: name a folder of this machine, or one that is mounted.")
    for name, minimum in MINIMA.items():
        value = config.get(name)
        if (value is None and name == "check_val_every_n_epoch") or (value is not None and value < minimum):
            raise ConfigError(f"trainer.{name} is {'null' if value is None else value}: give at least {minimum}, or leave it out.")


def add_seed(parser: LightningArgumentParser) -> None:
    """Add the run seed. Lightning's own takes a random one, and none, with which no run could be repeated."""
    help = f"Run seed, 0 to {SEEDS - 1}: every draw of the run follows from it."
    parser.add_argument("--seed_everything", type=_Seed(), default=0, help=help)


class _Seed:
    """The parser's type of a run seed; `--help` shows a function with its address."""

    def __call__(self, value: Any) -> int:
        given = yaml.safe_load(value) if isinstance(value, str) else value
        if type(given) is not int or not 0 <= given < SEEDS:
            raise _NotTaken(f"give a whole number from 0 to {SEEDS - 1}; it is what makes a run repeatable.")
        return given

    def __repr__(self) -> str:
        return "int"


def _refusing(refusal: Refusal) -> Callable[[Any], Any]:
    """A type of the parser that takes the values that change nothing."""

    def take(value: Any) -> Any:
        given = value
        with suppress(yaml.YAMLError):
            given = yaml.safe_load(value) if isinstance(value, str) else value  # flags come as text
        if any(given == x and type(given) is type(x) for x in refusal.neutral):  # 1 batch is not all of them, 1.0
            return given
        raise _NotTaken(f"not for skillsd: {refusal.cure}.")

    return take
