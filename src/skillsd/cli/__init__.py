"""The command line: fit, pretrain, validate, export, play, serve, show, view, report, skills, study, config, doctor."""

from __future__ import annotations

import gc
import logging
import os
import select
import sys
import warnings
from io import TextIOWrapper

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType
from transformers.utils import logging as transformers_logging

from skillsd import __version__, parallel
from skillsd.bounded import visible
from skillsd.callbacks.run_config import SaveRunConfig
from skillsd.class_paths import config
from skillsd.cli.arguments import CONFIG, arguments, find, packaged, resolve
from skillsd.cli.configured import CLI, EXPERIMENT, PRETRAINING
from skillsd.cli.owner import RunOwner
from skillsd.cli.values import correct_jsonargparse
from skillsd.config_errors import did_you_mean
from skillsd.diagnosis import explain, report, where
from skillsd.doctor import doctor, rows
from skillsd.errors import ConfigError, redacted
from skillsd.methods import expanded
from skillsd.signals import guarded
from skillsd.trainer import Trainer

__all__ = ["CLI", "main"]

TITLE = (
    "Train multi-turn LLM agents with Skill-SD. Begin with: skillsd fit -c sokoban. "
    "Look at a run: skillsd show, skillsd view; hand it on: skillsd report. Take its skills to another: skillsd skills. "
    "Methods x seeds and a report: skillsd study. Installed: skillsd doctor. vLLM on another GPU for rollouts: skillsd serve. "
    "Classes by key: skillsd config"
)
COMMANDS = ("fit", "pretrain", "validate", "export", "play", "serve", "show", "view", "report", "skills", "study", "config", "doctor")
CALLS_ANY = ["lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function", "pytorch_lightning"]
"""Class paths that are refused before they are imported, beside jsonargparse's own list (os, subprocess, pickle, ...): the callback calls
any function a file names."""


def quiet() -> None:
    """Leave the terminal to the progress bar and the table."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    known = ("num_workers", "eval mode at the start", "activation_checkpointing", "transfer_batch_to_device", "manual optimization")
    for text in (
        *known,
        "args parameter",
        "litlogger",
        "treespec",
        "no last checkpoint available",
        "dirpath has changed",
        "exists and is not empty",
        "The AccumulateGrad node's stream",  # DDP is made beside the stream that trains; the engine waits for both
    ):
        warnings.filterwarnings("ignore", message=f"(?s).*{text}")


def main(args: ArgsType = None) -> int:
    """Run a command. What is the user's business (`diagnosis.explain`) prints one line and returns 2; SKILLSD_DEBUG=1 shows the traceback
    instead. Our own faults are raised.
    """
    _print_anything()
    argv = list(sys.argv[1:] if args is None else args)  # type: ignore[arg-type]
    argv = argv or ["--help"]
    quiet()
    correct_jsonargparse()
    sys.excepthook = report
    set_parsing_settings(import_path_denylist=CALLS_ANY, instantiate_subclass_spec_in_any=False, docstring_parse_attribute_docstrings=True)
    with guarded() as guard:
        try:
            _check_folder()
            code = _run(argv)
            if guard.failed:
                raise guard.failed[0]
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except BrokenPipeError:
            if not _unread():
                raise
            return 1
        except Exception as e:
            line = explain(e)
            if os.environ.get("SKILLSD_DEBUG") == "1" or line is None:
                raise
            print(f"{parallel.name()}error: {redacted(line)}", file=sys.stderr)
            _unwritten()
            return 2
        except (KeyboardInterrupt, SystemExit) as e:
            if isinstance(e, SystemExit) and not isinstance(e.__context__, KeyboardInterrupt):
                if place := where(e).user:
                    print(f"error: {place} ended the program: sys.exit() is not for code that others call", file=sys.stderr)
                    return 2
                raise
            return 128 + guard.signal  # Lightning makes an exit of an interruption
        finally:
            gc.unfreeze()


def _run(argv: list[str]) -> int:
    if argv == ["--version"]:
        print(f"skillsd {__version__}")
        return 0
    match argv[0]:  # commands without a configuration; what they import is slow (pandas, matplotlib), so late
        case "config":  # it imports nothing that a file names
            config(argv[1:], lambda name: expanded(find(name).config))
        case "doctor":
            doctor(argv[1:])
        case "show":
            from skillsd.analysis.show import show

            show(argv[1:])
        case "view":
            from skillsd.analysis.view import view

            view(argv[1:])
        case "report":
            from skillsd.analysis.report import report as make_report

            make_report(argv[1:], lambda: rows(network=False))
        case "skills":
            from skillsd.analysis.skills import skills

            skills(argv[1:])
        case "study":
            from skillsd.study import study

            return study(resolve(argv).args[1:], packaged)
        case _:
            run_configured(argv)
    return 0


def run_configured(argv: list[str]) -> None:
    """fit, pretrain, validate, export, play, serve: what a configuration describes."""
    if argv[0] == "play" and not any(a.flag in ("", "-c", "--config") for a in arguments(argv[1:])):
        argv = ["play", "-c", "sokoban", *argv[1:]]
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise ConfigError(f"{visible(argv[0])} is no command{did_you_mean(argv[0], COMMANDS)}: skillsd {', '.join(COMMANDS)}.")
    if argv[0] in CONFIG and (command := next((x for x in argv if x in COMMANDS), "")):
        raise ConfigError(f"{argv[0]} stands before the command: skillsd {command} {' '.join(argv[:2])} ...")
    request = resolve(argv)
    model, data = PRETRAINING if argv[0] == "pretrain" else EXPERIMENT
    with RunOwner() as owner:
        CLI(
            request=request,
            owner=owner,
            model_class=model,
            datamodule_class=data,
            trainer_class=Trainer,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "skillsd", "exit_on_error": False, "description": TITLE},
        )


def _check_folder() -> None:
    """Raises ConfigError if the present folder has been removed, which libraries say in odd ways."""
    try:
        os.getcwd()
    except FileNotFoundError as e:
        raise ConfigError("the present folder is gone: change to one that is there (cd).") from e


def _print_anything() -> None:
    """A terminal that cannot show a character gets its code: a name or a picture is no reason to end."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _unwritten() -> None:
    """Keep the interpreter's last flush quiet where stdout takes no more: a full disk, say."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _unread() -> bool:
    """Return whether stdout was closed at its other end (`| head`); then the interpreter's last flush is kept quiet."""
    poll = select.poll()
    poll.register(1, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return closed
