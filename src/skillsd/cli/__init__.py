"""The command line. `main` chooses the command and imports what it needs alone: torch and Lightning take seconds."""

from __future__ import annotations

import gc
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

from skillsd import __version__
from skillsd.bounded import visible
from skillsd.cli.arguments import ALONE, CONFIG, CONFIGURED, arguments, find, packaged, resolve
from skillsd.config_errors import did_you_mean
from skillsd.diagnosis import explain, report, where
from skillsd.errors import ConfigError, redacted
from skillsd.signals import guarded

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType

__all__ = ["main"]

GROUPS = {
    "train": {
        "fit": "train an agent, or go on with a run: skillsd fit -c sokoban",
        "pretrain": "clone demonstrations into a model or adapter, before any reward",
        "study": "methods x seeds as resumable runs, with statistics and a report",
        "serve": "start vLLM on another GPU, for the rollouts of a fit",
    },
    "look": {
        "show": "how a run goes, in the terminal; its trajectories, tasks and skills",
        "view": "the same in the browser, live: boards, tokens, skills",
        "play": "one episode, turn by turn, of a run's agent or of the environment's own solution",
        "validate": "play the held-out tasks with a run's last checkpoint",
    },
    "share": {
        "report": "a run as one HTML file and as Markdown",
        "export": "the trained adapter as a PEFT folder",
        "skills": "export, import or search a run's skills",
    },
    "set up": {
        "doctor": "what is installed, what is missing, and how to get it",
        "config": "which classes each key takes, and which a file selects",
    },
}
"""The commands by what they are for, with a line each."""
COMMANDS = tuple(command for group in GROUPS.values() for command in group)
FROM_HERE = (*CONFIGURED, "study", "view", "report")
"""Commands that import what a configuration names: a class or an environment of one's own may lie in the present folder."""


def overview() -> str:
    """What `skillsd --help` prints."""
    lines = ["usage: skillsd COMMAND ...", "", "Train multi-turn LLM agents with Skill-SD. Begin with: skillsd fit -c sokoban"]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {command:9} {line}" for command, line in commands.items())]
    return "\n".join([*lines, "", "skillsd COMMAND --help says more; skillsd --version."])


def main(args: ArgsType = None) -> int:
    """Run a command. What is the user's business (`diagnosis.explain`) prints one line and returns 2; SKILLSD_DEBUG=1 shows the traceback
    instead. Our own faults are raised.
    """
    _print_anything()
    argv = list(sys.argv[1:] if args is None else args)  # type: ignore[arg-type]
    argv = argv or ["--help"]
    sys.excepthook = report
    with guarded() as guard:
        try:
            _check_folder()
            with _this_folder_importable() if argv[0] in FROM_HERE else nullcontext():
                code = _run(argv, announce=args is None)
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
            print(f"{_rank()}error: {redacted(line)}", file=sys.stderr)
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


def _run(argv: list[str], announce: bool) -> int:
    command, args = argv[0], argv[1:]
    if argv == ["--version"]:
        print(f"skillsd {__version__}")
        return 0
    if argv in (["--help"], ["-h"]):
        print(overview())
        return 0
    match command:
        case "config":  # it imports nothing that a file names
            from skillsd.class_paths import config
            from skillsd.methods import expanded

            config(args, lambda name: expanded(find(name).config))
        case "doctor":
            from skillsd.doctor import doctor

            doctor(args)
        case "show":
            from skillsd.analysis.show import show

            show(args)
        case "view":
            from skillsd.analysis.view import view

            view(args)
        case "report":
            from skillsd.analysis.report import report as make_report

            make_report(args, _checks)
        case "skills":
            from skillsd.analysis.skills import skills

            skills(args)
        case "study":
            from skillsd.cli.values import prepare_parsers
            from skillsd.study import study

            prepare_parsers()
            return study(resolve(argv).args[1:], packaged)
        case _:
            _run_configured(argv, announce)
    return 0


def _checks() -> list[dict[str, str]]:
    from skillsd.doctor import rows

    return rows(network=False)


def _run_configured(argv: list[str], announce: bool) -> None:
    """Run fit, pretrain, validate, export, play or serve: what a configuration describes.

    What is wrong with the names on the command line is said before torch and Lightning are imported.
    """
    command = argv[0]
    if command == "play" and not any(a.flag in ("", *CONFIG) for a in arguments(argv[1:])):
        argv = ["play", "-c", "sokoban", *argv[1:]]
    if command in CONFIG and (later := next((x for x in argv if x in COMMANDS), "")):
        raise ConfigError(f"{command} stands before the command: skillsd {later} {' '.join(argv[:2])} ...")
    if command not in COMMANDS:
        what = "flag" if command.startswith("-") else "command"
        raise ConfigError(f"{visible(command)} is no {what}{did_you_mean(command, COMMANDS)}: skillsd {', '.join(COMMANDS)}.")
    request = resolve(argv)
    if announce and not request.flags.keys() & set(ALONE) and not _is_later_rank():
        print(f"skillsd {__version__}: importing PyTorch and Lightning ...", file=sys.stderr, flush=True)
    from skillsd.cli.launch import launch

    launch(request)


def _is_later_rank() -> bool:
    """Return whether a launcher's variables give this process another rank than 0: rank 0 speaks for all."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _rank() -> str:
    """What stands in front of this rank's lines, "" unless there are several."""
    parallel: Any = sys.modules.get("skillsd.parallel")  # a command without torch has one rank
    return str(parallel.name()) if parallel is not None else ""


@contextmanager
def _this_folder_importable() -> Iterator[None]:
    """Put the present folder behind all packages on the path: no file in it takes the place of one."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


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
