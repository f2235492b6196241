"""Command-line arguments before they are parsed: what is named on them (a file, a packaged file, a run folder), and in which order."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from skillsd import conf_dir
from skillsd.config_errors import leaves, nearest
from skillsd.config_file import as_yaml, check_value, parse_config, read_config, read_whole
from skillsd.errors import ConfigError
from skillsd.files.paths import PATH_KEYS, read_path
from skillsd.files.run_folder import CHECKPOINTS, COMMAND_KEYS, CONFIG_FILE, FILES
from skillsd.methods import read_method, settings_of, without_method

SWITCHES = ("--skill", "--overwrite", "--only_report", "--steal_lock")
"""Flags that mean true where no value follows."""
ALONE = ("-h", "--help", "--print_config", "--version")
"""Flags that take no value."""
CONFIG = ("-c", "--config")
CONFIGURED = ("fit", "pretrain", "validate", "export", "play", "serve")
"""Commands that a configuration describes."""
EXAMPLES = {"model": "model.optimizer", "data": "data.rollout"}
"""The keys whose settings are a class's arguments, each with a key below it."""


class Argument(NamedTuple):
    """A flag, and its value if it has one; what belongs to no flag has the flag ""."""

    flag: str
    value: str | None


class Named(NamedTuple):
    """A configuration by the name it was given."""

    name: str
    config: dict[str, Any]
    run: Path | None = None
    """The run folder whose configuration it is."""
    file: str = ""
    """The file that names the method whose settings these are."""


@dataclass
class Request:
    """What a command line asks for."""

    args: list[str]
    """For the parser: the command, flags, and each configuration as a text."""

    @property
    def command(self) -> str:
        return self.args[0]

    run: Path | None = None
    """The run folder that is named."""
    flags: dict[str, str | None] = field(default_factory=dict)
    configs: list[Named] = field(default_factory=list)
    """What the files say, in their order."""

    def key_of(self, class_path: str) -> str:
        """The key that takes a class path in one of the files or flags; "" if none does."""
        for named in self.configs:
            for key, value in leaves(named.config):
                if value == class_path:
                    return key.removesuffix(".class_path")
        return next((f.removeprefix("--").removesuffix(".class_path") for f, value in self.flags.items() if value == class_path), "")

    def place_of(self, key: str) -> str:
        """Where a key is given: the last file that has it, or its flag. The key of a list's item is without its number."""
        for named in reversed(self.configs):
            if any(re.sub(r"\.\d+(?=\.)", "", f"{found}.").startswith(f"{key}.") for found, _ in leaves(named.config)):
                return named.name if named.run is None else str(named.run / CONFIG_FILE)
        return f"--{key}"

    def naming(self, key: str) -> str:
        """A key with the file that gives it, or as the flag that it was given with."""
        place = self.place_of(key)
        return place if place == f"--{key}" else f"{place}: {key}"


def arguments(args: Sequence[str]) -> list[Argument]:
    """Flags with their values; `-c X`, `-cX`, `--config X` and `--config=X` are one."""
    found: list[Argument] = []
    left = list(args)
    while left:
        arg = left.pop(0)
        flag, sign, value = arg.partition("=")
        flag = flag.replace("--steal-lock", "--steal_lock")
        if not _is_flag(arg):
            found.append(Argument("", arg))
        elif sign:
            found.append(Argument(flag, value))
        elif re.match(r"-c.", arg):
            found.append(Argument("-c", arg[2:]))
        elif flag in SWITCHES:
            found.append(Argument(flag, left.pop(0) if left and left[0] in ("true", "false") else "true"))
        elif flag not in ALONE and left and not _is_flag(left[0]):
            found.append(Argument(flag, left.pop(0)))
        else:
            found.append(Argument(flag, None))
    return found


def _is_flag(arg: str) -> bool:
    return re.match(r"-(?:-?[A-Za-z])", arg) is not None and " " not in arg.partition("=")[0]


def resolve(args: Sequence[str]) -> Request:
    """Read what the command line names, and hand it to the parser in its place.

    A run folder stands for its config.yaml, with the folder where it is now; so does the config.yaml by its path. What is named without
    `-c` comes before all else.

    Args:
        args: The command and what follows it.

    Raises:
        ConfigError: a name stands for nothing, for two runs, or for a file that cannot be read; or an overlay stands alone or first.
    """
    command, *rest = args
    if command.startswith("-"):  # of the program, as --help
        return Request(list(args))
    given = arguments(rest)
    given = [Argument("-c", a.value) for a in given if not a.flag] + [a for a in given if a.flag]
    out, named = [command], list[Named | Argument]()
    for flag, value in given:
        if flag in CONFIG and value is not None and "://" not in value:
            found = find(value)
            named.append(found)
        else:
            if value is not None and value[:1] in ("{", "["):
                check_value(value, flag)
            named.append(Argument(flag, value))
    if command in CONFIGURED:
        _check_command(command, named)
        named = put_method(named)
    for x in named:
        if isinstance(x, Named):
            out.append(f"--config={as_yaml(x.config)}")
        else:
            out.append(x.flag if x.value is None else f"{x.flag}={x.value}")
    runs = {x.run for x in named if isinstance(x, Named) and x.run is not None}
    if len(runs) > 1:
        raise ConfigError(f"{' and '.join(map(str, sorted(runs)))} are two runs: name one.")
    flags = {x.flag: x.value for x in named if isinstance(x, Argument)}
    if command in CONFIGURED and not any(f in ALONE or f.endswith(".help") for f in flags):
        check_order(command, named)
    if command == "study" and (other := next((x for x in named if isinstance(x, Named) and x.config.keys() & EXAMPLES.keys()), None)):
        raise ConfigError(
            f"{other.name} is no study: it says {', '.join(other.config)}. Name it among the study's `configs` (conf/study/)."
        )
    return Request(out, next(iter(runs), None), flags, [x for x in named if isinstance(x, Named)])


def find(name: str) -> Named:
    """The configuration that a name stands for: a run folder, a file, or a file that comes with skillsd; or it is one itself.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if name.lstrip().startswith("{") or "\n" in name or ": " in name:
        return Named("--config", parse_config(name, "--config"))
    path = read_path(name, "config")
    if path.is_dir() and (path / CONFIG_FILE).is_file():
        return of_run(path)
    if path.name == CONFIG_FILE and path.is_file() and is_run(path.parent):
        return of_run(path.parent)
    file = Path(packaged(name))
    if file.is_dir():
        raise ConfigError(f"{name} is a folder, and no run's (it has no {CONFIG_FILE}): name a configuration file, or a run folder.")
    if not file.exists():
        known = [str(p.relative_to(conf_dir()).with_suffix("")) for p in sorted(conf_dir().rglob("*.yaml"))]
        near = nearest(name.removeprefix("conf/").removesuffix(".yaml"), known) or ["sokoban", "appworld"]
        raise ConfigError(f"{name}: there is no such file or run folder, and none of that name comes with skillsd: {', '.join(near)} do.")
    return Named(name, read_whole(file, name))


def packaged(name: str) -> str:
    """The path of a configuration file: as it stands, or of the one that comes with skillsd where there is none."""
    path = read_path(name, "config")
    if path.is_file():
        return str(path)
    relative = name.removeprefix("conf/")
    for candidate in (relative, f"{relative}.yaml"):
        if (conf_dir() / candidate).is_file():
            return str(conf_dir() / candidate)
    return str(path)


def is_run(folder: Path) -> bool:
    """Return whether a run has left anything there but its config.yaml, which may be anybody's."""
    return (folder / CHECKPOINTS).exists() or any((folder / name).exists() for name in FILES if name != CONFIG_FILE)


def of_run(folder: Path) -> Named:
    """A run's configuration: without what its command alone was given, and with the run folder that is named.

    Paths below the folder that it had (a logger's, a checkpoint's) follow `trainer.default_root_dir`, also that of a later flag.
    """
    config = read_config(folder / CONFIG_FILE)
    config = {k: v for k, v in config.items() if k not in COMMAND_KEYS and not (v is None and k in ("optimizer", "lr_scheduler"))}
    trainer = config.get("trainer") or {}
    was = trainer.get("default_root_dir") if isinstance(trainer, dict) else None
    if isinstance(was, str):
        config = {k: v if k in EXAMPLES else _following(v, was.rstrip("/"), 1) for k, v in config.items()}
    if isinstance(trainer, dict):
        config["trainer"] = {**(config.get("trainer") or {}), "default_root_dir": str(folder)}
    return Named(str(folder), config, folder)


def put_method(named: Sequence[Named | Argument]) -> list[Named | Argument]:
    """Put the settings of the last method that is named in front of who names it, and take those of earlier ones out of earlier files.

    Raises:
        ConfigError: it is no method, or a file has settings of an older version.
    """
    for x in named:
        if isinstance(x, Named):
            _refuse_init_args(x)
    at = next((i for i in reversed(range(len(named))) if _method(named[i]) is not None), None)
    if at is None or (isinstance(source := named[at], Named) and source.run is not None):
        return list(named)  # what a run was is written out in its configuration
    given = _method(source)
    method, label = read_method(given), given if isinstance(given, str) else "of your own"
    out: list[Named | Argument] = []
    for i, x in enumerate(named):
        if i == at:
            out.append(Named(f"method {label}", {"method": given, **settings_of(method)}, file=x.name if isinstance(x, Named) else ""))
        if isinstance(x, Named):
            config = {key: value for key, value in x.config.items() if key != "method"}
            if i < at:
                config, gone = without_method(config, method)
                if gone and x.run is None:
                    print(f"method {label} replaces {', '.join(gone)} of -c {x.name}.", file=sys.stderr)
            out.append(x._replace(config=config))
        elif x.flag != "--method":
            out.append(x)
    return out


def _method(x: Named | Argument) -> Any:
    if isinstance(x, Named):
        return x.config.get("method")
    if x.flag != "--method" or x.value is None:
        return None
    return parse_config(x.value, "--method") if x.value.startswith("{") else x.value


def _check_command(command: str, named: Sequence[Named | Argument]) -> None:
    """Refuse an experiment for `pretrain`, a pre-training for the other commands, and a flag for a part of a method."""
    for x in named:
        if isinstance(x, Argument) and x.flag.startswith("--method."):
            part, _, rest = x.flag.removeprefix("--method.").partition(".")
            key = {"objective": "model.objective", "actor": "data.actor"}.get(part, part)
            raise ConfigError(f"{x.flag[2:]}: a method is replaced whole; one setting of it is --{key}{'.' * bool(rest)}{rest}.")
        if isinstance(x, Named):
            data = x.config.get("data")
            pretraining = isinstance(data, Mapping) and "demonstrations" in data
            if pretraining and command != "pretrain":
                raise ConfigError(f"{x.name} describes a pre-training: skillsd pretrain -c {x.name}.")
            if command == "pretrain" and "method" in x.config:
                raise ConfigError(f"{x.name} describes an experiment: skillsd fit -c {x.name}.")


def _refuse_init_args(x: Named) -> None:
    for key, example in EXAMPLES.items():
        node = x.config.get(key)
        if isinstance(node, str) or (isinstance(node, Mapping) and node.keys() & {"class_path", "init_args"}):
            raise ConfigError(
                f"{x.name}: {key}.class_path and {key}.init_args are no keys of this version: write the settings directly under `{key}:`, "
                f"{example} say."
            )


def _names_environment(config: Mapping[str, Any]) -> bool:
    """It is an experiment: others change one."""
    data = config.get("data")
    return isinstance(data, Mapping) and "env" in data


def _following(node: Any, was: str, depth: int, key: str = "") -> Any:
    if isinstance(node, dict):
        return {k: _following(v, was, depth + 1, k) for k, v in node.items()}
    if isinstance(node, list):
        return [_following(v, was, depth + 1) for v in node]
    names_path = isinstance(node, str) and key in PATH_KEYS
    return f"${{{'.' * depth}trainer.default_root_dir}}{node[len(was) :]}" if names_path and f"{node}/".startswith(f"{was}/") else node


# -- the order ------------------------------------------------------------------------------------------------------------------------


def check_order(command: str, named: Sequence[Named | Argument]) -> None:
    """Refuse an overlay that stands alone; say which settings a later file sets again.

    Raises:
        ConfigError: nothing says which environment is played.
    """
    if not any(x.flag == "--data.env" if isinstance(x, Argument) else _names_environment(x.config) for x in named):
        names = " ".join(f"-c {x.name}" for x in named if isinstance(x, Named) and not x.name.startswith("method "))
        if names:
            raise ConfigError(
                f"data.env is missing: {names} changes an experiment, and says nowhere which environment is played: name the "
                f"experiment first, -c sokoban {names} say."
            )
        raise ConfigError(f"data.env is missing: name an experiment (skillsd {command} -c sokoban) or a run folder.")
    for i, x in enumerate(named):
        if isinstance(x, Named) and _names_environment(x.config):
            continue  # an experiment is there to be changed
        later = [y for y in named[i + 1 :] if isinstance(y, Named) and (isinstance(x, Argument) or _names_environment(y.config))]
        later = [y for y in later if isinstance(x, Argument) or y.name != x.file]  # a file may set one part of its method again
        if lost := next(((key, y.name) for y in later for key in _set_again(x, y)), None):
            what = x.flag if isinstance(x, Argument) else x.name if x.name.startswith("method ") else f"-c {x.name}"
            print(f"{what} stands before -c {lost[1]}, which sets {lost[0]} again: what comes last counts.", file=sys.stderr)


def _set_again(x: Named | Argument, later: Named) -> Iterator[str]:
    after = dict(leaves(later.config))
    before = {x.flag.removeprefix("--"): x.value} if isinstance(x, Argument) else dict(leaves(x.config))
    for key, value in before.items():
        if key in after and str(after[key]) != str(value):
            yield key
