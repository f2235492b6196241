"""fit, pretrain, validate, export, play, serve: from configuration files and flags to a Trainer that runs."""

from __future__ import annotations

import gc
import logging
import os
import re
from argparse import SUPPRESS, ArgumentError
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf.errors import OmegaConfBaseException

from skillsd import parallel
from skillsd.analysis.panel import print_report
from skillsd.callbacks import RunCheckpoint
from skillsd.callbacks.run_config import SaveRunConfig
from skillsd.class_paths import refused_class, unknown_class
from skillsd.cli.arguments import Request
from skillsd.cli.flags import ALWAYS, add_seed, add_trainer_arguments, add_with_groups, check_values, correct_help, settings_groups
from skillsd.cli.owner import RunOwner
from skillsd.cli.standard import STANDARD, check_trainer, complete, complete_pretraining
from skillsd.config_errors import (
    leaves,
    no_such_key,
    parser_error,
    reading,
    refuse_nulls,
    refuse_shapes,
    refusing,
    specifying,
    unknown_argument,
    unknown_key,
)
from skillsd.data import RolloutData
from skillsd.diagnosis import blame
from skillsd.errors import SURE, ConfigError, hold_keys, hold_secret, secrets, without_keys
from skillsd.files.checkpoint import read_checkpoint
from skillsd.files.paths import read_paths
from skillsd.files.run_folder import checkpoint_folder, read_record
from skillsd.files.run_start import starts_anew
from skillsd.methods import method_names
from skillsd.module import SkillSD
from skillsd.pretrain import Cloning, DemonstrationData
from skillsd.skills.callback import SkillBankCallback
from skillsd.strategy import check_strategy
from skillsd.trainer import describe_weights, last_checkpoint, named_checkpoint

log = logging.getLogger(__name__)

METHOD_HELP = "The method, replaced whole: a mapping of teacher, skills, objective and actor, a file with one, or one of"
KEY_VARIABLES = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Environment variables from which the libraries of a run take keys, whatever its configuration names."""
EXPERIMENT: tuple[type, type] = SkillSD, RolloutData
PRETRAINING: tuple[type, type] = Cloning, DemonstrationData
"""The classes whose parameters stand under `model` and `data`."""


class CLI(LightningCLI):
    """`skillsd SUBCOMMAND -c conf/x.yaml [-c overlay.yaml ...] [--key=value ...]`.

    Args:
        request: The command line. Only its subcommand's arguments are made: those of the others take longer than to read a configuration.
        owner: Holds the run folder of fit and validate until it is closed.
        **kwargs: As for LightningCLI.
    """

    def __init__(self, request: Request, owner: RunOwner, **kwargs: Any) -> None:
        self.request, self.owner = request, owner
        self.pretrains = request.command == "pretrain"
        self.classes = PRETRAINING if self.pretrains else EXPERIMENT
        self.standard = {} if self.pretrains else STANDARD
        self.chosen = False  # the checkpoint, by us
        super().__init__(args=request.args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that takes a flag by its whole name alone: `--trainer.max_epoch` is a mistake, and no short form."""
        return super().init_parser(**kwargs, allow_abbrev=False)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand != self.request.command:
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        correct_help(parser, subcommand)
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skip = {"model", "datamodule"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "pretrain": skip,
            "validate": {"model", "dataloaders", "datamodule"},
            "export": skip,
            "play": skip,
            "serve": skip,
        }

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_seed(parser)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, kind in zip(("model", "data"), self.classes, strict=True):
            add_with_groups(parser, kind, key)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, kind in self.standard.items():
            parser.add_lightning_class_args(kind, key)
        if not self.pretrains:
            parser.add_argument("--method", type=str | dict | None, default=None, help=f"{METHOD_HELP} {', '.join(method_names())}")
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="fit: discard an earlier run in the run folder, and skills that were imported into it",
        )
        parser.add_argument(
            "--steal_lock",
            type=bool,
            default=False,
            help="fit, validate: take the run folder from a process on another host, which is known to be dead",
        )
        add_trainer_arguments(parser)  # last: help opens with keys of skillsd
        parser.link_arguments("seed_everything", "data.seed", apply_on="parse")

    def _parse_ckpt_path(self) -> None:
        """Refuse a damaged checkpoint at once. Lightning would also take the class paths and settings that it holds."""
        given = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if given and Path(given).is_file():
            read_checkpoint(Path(given))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        safe = {"weights_only": True} if subcommand in ("fit", "validate") else {}  # null is false for a checkpoint at a URL
        return {**super()._prepare_subcommand_kwargs(subcommand), **safe}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Read files and flags; bytes, interpolations and circles that no reader takes give one line."""
        try:
            super().parse_arguments(parser, args)
        except ConfigError:
            raise
        except ArgumentError as e:
            line = parser_error(str(e), specifying(e))
            if denied := re.search(r"Importing '([\w.]+)' is not allowed", line):
                raise ConfigError(f"{self.request.key_of(denied[1]) or 'config'}: {denied[1]} is not allowed: name another class.") from e
            if line.startswith('"config": '):  # jsonargparse names the flag, not the key
                line = f"{reading(e) or 'config'}: its value cannot be read: {line[10:]}"
            if (key := unknown_key(str(e))) and not self.request.command.startswith("-"):
                known = [a.dest for a in self._parser(self.request.command)._actions if a.help != SUPPRESS]
                raise ConfigError(f"{self.request.place_of(key)}: {no_such_key(key, known, self.request.command)}") from e
            if argument := unknown_argument(str(e)):
                key, said = argument
                raise ConfigError(f"{self.request.naming(key)}: {said}") from e
            key = line.partition(": ")[0]
            said = blame(e) or refused_class(str(e)) or unknown_class(key, str(e))
            raise ConfigError(f"{key}: {said}" if said else line) from e
        except (ValueError, OmegaConfBaseException, RecursionError) as e:
            why = " ".join(str(e).split())
            if (key := reading(e)) and not isinstance(e, UnicodeDecodeError | OmegaConfBaseException):
                raise ConfigError(f"{key}: its value cannot be read: {why}") from e
            raise ConfigError(f"config: it cannot be read ({why}): write UTF-8, no ${{...}} but to a key that exists, no circles.") from e
        read_paths(self.config)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        nested = config.as_dict()
        refuse_secrets(dict(leaves(nested)))
        types = {"trainer": L.Trainer, "model": self.classes[0], "data": self.classes[1], **self.standard}
        refuse_shapes(nested, types)
        refuse_nulls(nested, types)
        groups = [(key, name) for key in ("model", "data") for name in settings_groups(types[key])]
        for key in (f"{part}.{name}" for part, name in groups if nested[part][name] is None):
            raise ConfigError(f"{self.request.naming(key)} is null: give its keys, or leave it out.")
        check_values(nested["trainer"])
        if config.get("weights_only") is False:
            raise ConfigError("weights_only is false: a checkpoint is read as data only, or it could run code: leave it out.")
        if self.subcommand != "serve" and config.get("ckpt_path") is None and "--ckpt_path" not in self.request.flags:
            config.ckpt_path = self._default_checkpoint(config)
        given = config.get("ckpt_path")
        if given is not None and given != "last" and "://" not in given and not Path(given).is_file():
            raise ConfigError(f"ckpt_path: no checkpoint at {given or 'an empty path'}: name one, `last`, or leave it out.")
        if given == "last" and self.subcommand == "validate":
            config.ckpt_path = str(named_checkpoint(Path(config.trainer.default_root_dir or "."), given))
        several = str(config.trainer.devices) != "1" or config.trainer.num_nodes > 1 or config.trainer.strategy != "auto"
        if given == "last" and config.trainer.enable_checkpointing is False:
            raise ConfigError("ckpt_path: last is a checkpoint, and trainer.enable_checkpointing is false: leave one of them out.")
        if not (several and config.trainer.plugins):  # a plugin may know the ranks from elsewhere
            parallel.settle(several)
        rank_zero_only.rank = parallel.rank()  # type: ignore[attr-defined]  # Lightning's was read from the environment when it was imported

    def _default_checkpoint(self, config: Any) -> str | None:
        """A run that is named is continued; other commands take the run folder's newest checkpoint, wherever there is one."""
        folder = Path(config.trainer.default_root_dir or ".")
        if self.pretrains:
            return None
        if self.subcommand == "fit":  # with another folder it is a new run, of the same settings
            return "last" if folder == self.request.run and not config.overwrite else None
        if config.get("policy", "model") != "model":
            return None
        self.chosen = (found := last_checkpoint(folder)) is not None
        return str(found) if found else None

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except ConfigError as e:
            if not (self.chosen and str(e).startswith("ckpt_path: ")) or subcommand == "export":
                raise
            raise ConfigError(f"{e} It is the run folder's own; --ckpt_path=null takes the agent as it starts.") from e

    def instantiate_classes(self) -> None:
        """Build everything; a class that refuses its arguments gives one line."""
        try:
            super().instantiate_classes()
        except ConfigError as e:
            if self.pretrains:  # which has the same settings under another key
                raise ConfigError(str(e).replace("data.rollout.", "model.rollout.")) from e
            raise
        except Exception as e:
            known = isinstance(e, ValueError | TypeError | ImportError | MisconfigurationException)
            said = "" if _ours(e) else blame(e)
            if not known and not said:
                raise
            key = refusing(e, self.config[self.subcommand].as_dict()) or "trainer"
            line = said or parser_error(str(e))
            raise ConfigError(line if _ours(e) or line.startswith(key) else f"{key}: {line}") from e

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        made = dict(zip(self._parser(self.subcommand).callback_keys, callbacks, strict=True))
        config = complete_pretraining(config) if self.pretrains else complete(config, made, str(self.subcommand))
        trainer = super()._instantiate_trainer({**config, **ALWAYS}, [])
        check_strategy(trainer.strategy)  # ranks of ddp_spawn and its like begin before any hook
        check_trainer(trainer, self.model)
        return trainer

    def before_fit(self) -> None:
        trainer: Any = self.trainer
        self._begin_fit()
        for callback in trainer.callbacks:
            if isinstance(callback, SkillBankCallback):
                callback.selection.check_summariser()
        trainer.skillsd_config = self.config[self.subcommand].as_dict()
        gc.collect()
        gc.freeze()  # modules and configuration stay: garbage collections in the rollout's loops need not walk over them
        self._remember()

    before_pretrain = before_fit

    def _begin_fit(self) -> None:
        config, folder = self.config[self.subcommand], Path(self.trainer.default_root_dir)
        ckpt_path, overwrite = config.get("ckpt_path"), bool(config.get("overwrite"))
        if config.trainer.default_root_dir is None:
            parallel.print_rank_zero(f"trainer.default_root_dir is not set: the run folder is {folder}")
        saver: Any = next((c for c in self.trainer.callbacks if isinstance(c, RunCheckpoint)), None)  # type: ignore[attr-defined]
        if parallel.is_rank_zero():
            self.owner.begin_fit(self.trainer, ckpt_path, overwrite, bool(config.get("steal_lock")), saver)
        if starts_anew(folder, ckpt_path, overwrite):
            self.config_init[self.subcommand].ckpt_path = None  # what is there is removed later: Lightning would take it
            if ckpt_path == "last":
                parallel.print_rank_zero(f"{folder} has no checkpoint yet: this run begins with its first iteration")
        elif saver is not None and saver.dirpath is None:
            saver.dirpath = str(checkpoint_folder(folder, read_record(folder)))

    def before_validate(self) -> None:
        trainer: Any = self.trainer
        if parallel.is_rank_zero():
            self.owner.take(trainer, bool(self.config["validate"].get("steal_lock")))
            self.owner.record()
        # The run's own TensorBoard record is training's: a validation would stand in it once more at step 0.
        trainer.loggers = [x for x in trainer.loggers if not isinstance(x, TensorBoardLogger)]
        if parallel.is_rank_zero():
            print(f"weights: {describe_weights(self.model, self.config['validate'].get('ckpt_path'))}", flush=True)
        self._remember()

    def _remember(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveRunConfig):
                callback.remember(self.trainer)

    def after_fit(self) -> None:
        if not self.trainer.global_step:
            parallel.print_rank_zero("no iteration was trained: trainer.max_epochs, max_steps or max_time leaves room for none.")
        if parallel.is_rank_zero():
            print_report(Path(self.trainer.default_root_dir))

    after_pretrain = after_fit

    def after_validate(self) -> None:
        if parallel.is_rank_zero():
            print_report(Path(self.trainer.default_root_dir))


def _ours(error: BaseException) -> bool:
    """Return whether a ConfigError, which names its key, is at the bottom of this error."""
    return isinstance(error, ConfigError) or (error.__cause__ is not None and _ours(error.__cause__))


def refuse_secrets(config: dict[str, Any]) -> None:
    """The configuration goes into the run folder, so it may name an environment variable that holds a key, and not hold the key.

    Raises:
        ConfigError: a value holds a key that skillsd or a library of its uses: that of a variable which an `api_key_env` names, or of one
            of KEY_VARIABLES. What another variable's name calls a secret may be a path or a word: it is warned of.
    """
    hold_keys(config)
    for name in KEY_VARIABLES:
        hold_secret(name, os.environ.get(name, ""))
    texts = {key: str(value) for key, value in config.items() if isinstance(value, str | list)}
    for key, text in texts.items():
        if (masked := without_keys(text)) != text:
            name = next(name for name in secrets().values() if f"[{name}]" in masked)
            raise ConfigError(
                f"{key} holds the value of the environment variable {name}, which would be written to the run folder: "
                "leave it out, or give the variable's name where a key asks for one (api_key_env)."
            )
    for secret, name in secrets().items():
        if len(secret) >= SURE and os.sep not in secret and (found := [key for key, text in texts.items() if secret in text]):
            log.warning("%s holds the value of the environment variable %s, and is written to the run folder.", found[0], name)
