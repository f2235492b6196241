"""`skillsd config`: the keys that take a class, the base class each must be a subclass of, and what there is to choose from.

A class path names code that the user chooses to run: its module is imported, and the class is refused, before it is called, unless it is a
subclass of the key's base (of a Protocol: has its methods). So read what `skillsd config -c FILE` says of a file that came from
elsewhere: it imports nothing. What jsonargparse refuses by itself (os, subprocess, pickle, ...) is not even imported.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from skillsd.config_errors import did_you_mean, imported, lacks
from skillsd.errors import Parser, no_module
from skillsd.methods import merge

_OBJECTIVE = "model.objective"
_SIGNALS = tuple(
    f"skillsd.objective.{name}"
    for name in (
        "UnweightedK3",
        "GapAdvantage",
        "GapMultiplier",
        "GatedLogRatio",
        "FullReverseKL",
        "TopKJSD",
        "SampledReverseKL",
        "TwoViewKL",
    )
)
_SUMMARISERS = ("RulesSummariser", "BaseSummariser", "OpenAISummariser")
_CONTEXTS = ("BankContext", "NoContext", "ShuffledContext", "HindsightContext", "SiblingContext", "GroundTruthContext")
_CALLBACKS = ("EnvStepBudget", "PeerWatch", "ProgressLog")


COMPLETE = {
    "skillsd.skills.Summariser": "skillsd.skills.SynchronousSummariser",
    "skillsd.skills.PrivilegedContext": "skillsd.skills.GroupContext",
}
"""For each Protocol, a class to inherit from that has most of it."""


class Key(NamedTuple):
    """A key that takes a class: the base classes (any of them), and the class paths that come with skillsd."""

    name: str
    bases: tuple[str, ...]
    shipped: tuple[str, ...] = ()


KEYS = (
    Key(f"{_OBJECTIVE}.loss", ("skillsd.objective.Signal",), _SIGNALS),
    Key(f"{_OBJECTIVE}.advantage", ("skillsd.objective.Signal",), _SIGNALS),
    Key(f"{_OBJECTIVE}.multiplier", ("skillsd.objective.Signal",), _SIGNALS),
    Key(
        f"{_OBJECTIVE}.gate",
        ("skillsd.objective.Gate",),
        tuple(f"skillsd.objective.{name}" for name in ("OutcomeGate", "PositiveGate", "SigmoidGate", "TraceGate")),
    ),
    Key("skills.summariser", ("skillsd.skills.Summariser",), tuple(f"skillsd.skills.{name}" for name in _SUMMARISERS)),
    Key("skills.context", ("skillsd.skills.PrivilegedContext",), tuple(f"skillsd.skills.{name}" for name in _CONTEXTS)),
    Key("trainer.callbacks", ("lightning.pytorch.Callback",), tuple(f"skillsd.callbacks.{name}" for name in _CALLBACKS)),
    Key("trainer.logger", ("lightning.pytorch.loggers.Logger",), ("skillsd.callbacks.TrackioLogger",)),
    Key("trainer.accelerator", ("lightning.pytorch.accelerators.Accelerator",)),
    Key("trainer.strategy", ("lightning.pytorch.strategies.Strategy",)),
    Key("trainer.profiler", ("lightning.pytorch.profilers.Profiler",)),
    Key("trainer.plugins", ("lightning.fabric.plugins.ClusterEnvironment",)),
)
ENVIRONMENT = "data.env"
"""Names no class, but a module too: `module:Id-v0`."""
KNOWN = ("skillsd", "lightning")
"""What comes from elsewhere is marked."""


def refused_class(message: str) -> str:
    """Why jsonargparse refused a class that a key names, and what to do; "" if its message is about something else.

    It has imported the class, or found that it cannot; nothing is imported here.
    """
    wanted = re.search(
        r"does not (?:implement protocol|correspond to a subclass of) (\w+)|class, but .*is (?:abstract|a protocol)", message
    )
    given = wanted and re.search(r"Given value: .*?(\w+(?:\.\w+)+)", message[wanted.end() :])
    if wanted and given:
        path, kind = given[1], imported(given[1])
        full = next((base for key in KEYS for base in key.bases if base.rpartition(".")[2] == wanted[1]), wanted[1])
        return _lacking(path, kind, full) if full else _abstract(path, kind)
    if found := re.search(r"No module named '([\w.]+)'", message):
        return no_module(found[1])
    return ""


def unknown_class(key: str, message: str) -> str:
    """What to say where a key names a class that is not there; "" if the message is about something else, or skillsd has no such class."""
    shipped = next((k.shipped for k in KEYS if k.name == key), ())
    found = re.search(r"has no attribute '(\w+)'|Expected a dot import path string: (\w+)", message)
    if not found or not shipped:
        return ""
    name, ours = found[1] or found[2], [path.rpartition(".")[2] for path in shipped]
    own = re.search(r"module '([\w.]+)' has no attribute", message)
    if own and not own[1].startswith(("skillsd.", "lightning.")):  # a module of the user's, which has been imported
        module = sys.modules.get(own[1])
        classes = [n for n, kind in vars(module).items() if inspect.isclass(kind) and kind.__module__ == own[1]] if module else []
        return f"{own[1]} has no class {name}{did_you_mean(name, classes)}: it has {', '.join(classes) or 'none'}."
    package = shipped[0].rpartition(".")[0]
    return f"there is no class {name}{did_you_mean(name, ours)}: give the path of one, {package}.X with X one of {', '.join(ours)} say."


def _abstract(path: str, kind: Any) -> str:
    missing = " and ".join(sorted(getattr(kind, "__abstractmethods__", ()))) or "what it declares"
    return f"{path} lacks {missing}: write what is missing, or name a class that has it."


def _lacking(path: str, kind: Any, full: str) -> str:
    base, source = imported(full), COMPLETE.get(full, full)
    if not inspect.isclass(kind):
        return f"{path} is no class: name one that inherits from {source}."
    if not getattr(base, "_is_protocol", False):
        return f"{path} is no subclass of {full}: inherit from it."
    if missing := lacks(kind, base):
        return f"{path} lacks {' and '.join(missing)}: inherit from {source}, or write what is missing."
    for method, wanted in vars(base).items():
        if inspect.isfunction(wanted) and (method == "__call__" or not method.startswith("_")):
            has, wants = (", ".join(inspect.signature(f).parameters) for f in (getattr(kind, method), wanted))
            if has != wants:
                return f"{path}.{method} takes ({has}) and should take ({wants}): name its parameters so. Annotations are not compared."
    return ""


def config(args: Sequence[str], read: Callable[[str], Mapping[str, Any]]) -> None:
    """Print the table. Nothing that a file names is imported.

    Args:
        args: What follows `skillsd config`.
        read: The name of a configuration -> what it says.

    Raises:
        ConfigError: unknown arguments, or a file that is no configuration.
    """
    about = "Show which classes each key takes. The resolved configuration: skillsd fit -c FILE --print_config"
    parser = Parser(prog="skillsd config", description=about)
    parser.add_argument("named", nargs="*", metavar="FILE_OR_RUN", help="as -c")
    parser.add_argument("-c", "--config", action="append", default=[], metavar="FILE", help="show what the file selects; several: overlays")
    given = parser.parse_args(args)
    files = [*given.named, *given.config]
    chosen: dict[str, Any] = {}
    for name in files:
        merge(chosen, read(name))
    found = dict(selected(chosen))
    keys = {key.name: key for key in KEYS}
    rows = [("KEY", "BASE CLASS: IT OR A SUBCLASS; OF A PROTOCOL, ITS METHODS", "IN THESE FILES" if files else "COMES WITH SKILLSD")]
    for name in [*keys, *(name for name in found if name not in keys)]:
        key = keys.get(name, Key(name, ("gymnasium.Env, as module:Id" if name == ENVIRONMENT else "the parameter's type",)))
        paths = [f"{path}{_mark(path)}" for path in found.get(name, ())] if files else key.shipped
        rows += zip_longest([name], key.bases, paths or ["-"], fillvalue="")
    widths = [max(len(row[at]) for row in rows) for at in (0, 1)]
    for row in rows:
        print(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip())
    print("\nThe resolved configuration: skillsd fit -c FILE --print_config")


def _mark(path: str) -> str:
    package = path.replace(":", ".").split(".")[0]
    foreign = package != path and package not in KNOWN and not package.startswith("skillsd_")
    return "  <- neither skillsd's nor Lightning's: a run imports it" if foreign else ""


def selected(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """The class paths of a configuration by key, wherever they stand."""
    takes = {key.name for key in KEYS} | {ENVIRONMENT}
    for key, value in config.items():
        name = f"{prefix}{key}"
        items = value if isinstance(value, list) else [value]
        paths = [str(item["class_path"]) for item in items if isinstance(item, Mapping) and "class_path" in item]
        paths += [item for item in items if isinstance(item, str) and name in takes]
        if paths:
            yield name, paths
        for at, item in enumerate(items):
            if isinstance(item, Mapping):
                yield from selected(item, f"{name}[{at}]." if isinstance(value, list) else f"{name}.")
