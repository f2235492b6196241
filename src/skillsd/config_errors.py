"""Which key of a configuration is wrong, and why: what the parser says, in one line, and what it does not say."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from skillsd.errors import ConfigError

_CLASSES = ("logger", "strategy", "profiler", "summariser", "context", "loss", "advantage", "multiplier", "gate")
"""Keys that take a class path: the parser's errors leave out the `init_args` under them."""
_SHOWN = "the command's `--help` and `--print_config` show what is accepted"

MAX_LISTED = 30
"""Most names that a message lists."""


def leaves(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """What a nested configuration holds, by dotted key: all that is no mapping, a list of mappings by number."""
    listed = isinstance(config, list | tuple) and any(isinstance(x, Mapping) for x in config)
    inner = dict(enumerate(config)) if listed else config
    if not isinstance(inner, Mapping) or not inner:
        yield key, config
        return
    for name, value in inner.items():
        yield from leaves(value, f"{key}.{name}" if key else str(name))


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` of the known names that are spelled most like this one, the nearest first; none if all are far from it."""
    return difflib.get_close_matches(name, list(known), n, 0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest name as a question in brackets, with a space in front; "" if all are far from it."""
    found = nearest(name, known, 1)
    return f" (did you mean {found[0]}?)" if found else ""


def unknown_key(message: str) -> str:
    """The dotted key that the parser does not know; "" if its message is about something else, or about an argument of a class."""
    if _key(message):
        return ""
    if found := re.search(r"Group '(.+?)' does not accept option '(.+?)'", message):
        return f"{found[1]}.{found[2]}"
    found = re.match(r"unrecognized arguments: --([\w.]+)", message) or re.search(r"ption '([\w.]+)'(?: is not accepted)?", message)
    return found[1] if found else ""


def no_such_key(key: str, known: Iterable[str], command: str) -> str:
    """What to say of a key that a command does not know, without where it stands.

    Args:
        key: Dotted.
        known: All keys of the command, dotted.
        command: Its name.
    """
    known = [k for k in known if not k.endswith(".help")]  # the parser's own
    group = key.rpartition(".")[0]
    beside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == group]
    cure = f"{group} has {', '.join(beside)}." if group and 0 < len(beside) <= MAX_LISTED else f"skillsd {command} --help lists all keys."
    return f"there is no key {key}{did_you_mean(key, known)}: {cure}"


def unknown_argument(message: str) -> tuple[str, str] | None:
    """The key of an argument that a class does not take, and what to say of it; None if the message is about something else."""
    found = re.search(r"Problem with given class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", message)
    kind = found and imported(found[1])
    if not found or kind is None:
        return None
    path, name = found.groups()
    taken = [p.name for p in inspect.signature(kind).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    said = f"{path} has no argument {name}{did_you_mean(name, taken)}: it takes {', '.join(taken) or 'none'}."
    return f"{_key(message)}.init_args.{name}", said


def refuse_nulls(config: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """jsonargparse takes a null for "not given", whatever the key's type; the class would get it, and fail now or in the middle of a run.

    Args:
        config: The configuration of a subcommand, nested; its class paths have been imported.
        types: The classes behind its keys at the top.

    Raises:
        ConfigError: a null for a parameter whose type takes none.
    """
    for name, kind in types.items():
        for key, hint in _nulls(config.get(name), kind, name):
            raise ConfigError(f"{key} is null and takes none: give {_named(hint)}, or leave it out.")


def refuse_shapes(config: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """jsonargparse takes a list for a class's arguments, and anything for `init_args` where a key's type is open; both fail later.

    Args:
        config, types: As for `refuse_nulls`.

    Raises:
        ConfigError: what stands there is no mapping.
    """
    for name in types:
        if not isinstance(config.get(name, {}), Mapping | None):
            raise ConfigError(f"{name} is no mapping: give its arguments by name.")
    for key in _odd(config, ""):
        raise ConfigError(f"{key} is no mapping: give the class's arguments by name, or leave it out.")


def _odd(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _odd(item, f"{key}[{i}]")
    elif isinstance(value, Mapping):
        if "class_path" in value and not isinstance(value.get("init_args"), Mapping | None):
            yield f"{key}.init_args"
        for name, inner in value.items():
            yield from _odd(inner, f"{key}.{name}".lstrip("."))


def _nulls(value: Any, hint: Any, key: str) -> Iterator[tuple[str, Any]]:
    if value is None and _refuses_none(hint):
        yield key, hint
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _nulls(item, Any, f"{key}[{i}]")
    elif isinstance(value, Mapping):
        try:
            kind = imported(value["class_path"]) if "class_path" in value else _plain(hint)
            hints = get_type_hints(kind.__init__)
            defaults = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}
        except (AttributeError, ImportError, KeyError, NameError, TypeError, ValueError):
            return  # no class, or one whose types cannot be read
        if "class_path" in value:
            value, key = value.get("init_args"), f"{key}.init_args"
        for name, inner in value.items() if isinstance(value, Mapping) else ():
            if name in hints and not (inner is None and defaults.get(name) is None):
                yield from _nulls(inner, hints[name], f"{key}.{name}")


def imported(path: str) -> Any:
    """A class by its path; None if the parser has not taken it: nothing is imported here."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def lacks(given: Any, protocol: Any) -> list[str]:
    """What a class has not of a Protocol's methods; of an object also the attributes that are annotated there.

    A method that is inherited from the Protocol itself is none: it does nothing.
    """
    methods = {n: f for n, f in vars(protocol).items() if inspect.isfunction(f) and (n == "__call__" or not n.startswith("_"))}
    kind = given if inspect.isclass(given) else type(given)
    found = {n: next((vars(k)[n] for k in kind.__mro__ if n in vars(k)), None) for n in methods}
    attributes = () if kind is given else inspect.get_annotations(protocol)
    return sorted([n for n, f in methods.items() if found[n] in (None, f)] + [n for n in attributes if not hasattr(given, n)])


def _plain(hint: Any) -> Any:
    """The class whose parameters stand under a key without a class path; of `X | None` it is X."""
    return next((x for x in (hint, *get_args(hint)) if inspect.isclass(x) and x is not NoneType and get_origin(x) is None), None)


def _refuses_none(hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return all(map(_refuses_none, get_args(hint)))
    if get_origin(hint) is Literal:
        return None not in get_args(hint)
    return inspect.isclass(get_origin(hint) or hint) and hint not in (NoneType, object, Any)


def _named(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return f"its value, of type {hint.__name__ if inspect.isclass(hint) and get_origin(hint) is None else hint}"


def reading(error: BaseException) -> str:
    """The key whose value jsonargparse could not read; "" if its frames do not say it."""
    return _dests(error, {"_check_value_key": "action"})[-1]


def specifying(error: BaseException) -> str:
    """The key of a dataclass whose `class_path` jsonargparse refused, without those above it; "" if it refused something else."""
    return _dests(error, {"resolve_subclass_spec": "self"})[-1]


def refusing(error: BaseException, config: Mapping[str, Any]) -> str:
    """The key whose class refused its arguments; "" if jsonargparse's frames do not say it. Its text never does.

    Args:
        error: What came out of jsonargparse's `instantiate`.
        config: The configuration of a subcommand, nested.
    """
    named: list[str] = []
    node: Any = config
    for name in ".".join(_dests(error, {"instantiate_classes": "self", "group_instantiate_class": "group"})[1:]).split("."):
        if isinstance(node, Mapping) and "class_path" in node:
            named.append("init_args")
            node = node.get("init_args") or {}
        named.append(name)
        node = node.get(name) if isinstance(node, Mapping) else None
    return ".".join(named)


def _dests(error: BaseException, holders: Mapping[str, str]) -> list[str]:
    """Keys that jsonargparse was at when it raised, from the outermost, after a "". `holders`: function -> its local with the key."""
    found = [""]
    at: BaseException | None = error
    while at is not None:
        for frame, _ in traceback.walk_tb(at.__traceback__):
            if frame.f_globals.get("__name__", "").startswith("jsonargparse."):
                dest = getattr(frame.f_locals.get(holders.get(frame.f_code.co_name, "")), "dest", None)
                found += [dest] if isinstance(dest, str) else []
        at = at.__cause__
    return found


def parser_error(message: str, under: str = "") -> str:
    """The line of a nested parser error that says what is wrong, with the key it is about; `under` is the end of it that the text lacks."""
    noise = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Given value",
        "Expected a <class 'NoneType'>",
        "Problem with given",
        "Parser key",
    )
    key = _key(message)
    if under and not f".{key}".endswith(f".{under}"):
        key = f"{key}.{'init_args.' * (key in _CLASSES)}{under}".lstrip(".")
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    lines = ["its class_path is no text" if line.startswith("unhashable type") else line for line in lines]
    lines = [re.sub(r" (Add the import path to|To accept subclasses use) .*set_parsing_settings.*", "", line) for line in lines]
    lines = [re.sub(r"(Got value: (?:True|False))$", r"\1: YAML takes yes, no, on, off for it: write a text in quotes", x) for x in lines]
    lines = [re.sub(r"^Unable to load config 'null'$", "null is no value: give its keys, or leave it out", line) for line in lines]
    lines = [re.sub(r"^Unable to load config '(.+)'$", r"\1 is no mapping: give its keys", line) for line in lines]
    lines = [re.sub(r"^functools\..* must be a mapping, not (\w+)$", r"its value is no mapping, but \1: give its keys", x) for x in lines]
    lines = [re.sub(r"^Group '(.+)' does not accept option '(.+)'", r"no key \1.\2 is known", line) for line in lines]
    if key in _CLASSES:
        lines = [line.replace("no key ", f"no key {key}.init_args.") for line in lines]
    said = list(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))
    said = [line for line in said if not line.startswith("Expected a path but ")] or said  # a class may also be given as a file
    said = _with_value([_untyped(line) for line in said], message)
    head = f"{key}: " if key else ""
    if message.startswith("unrecognized arguments: "):
        return f"{message.removeprefix('unrecognized arguments: ')}: there is no such key ({_SHOWN})"
    if not said:  # a short error stands on the key's own line
        return (message.strip() or "it gave no message").splitlines()[0].removeprefix("Parser key ")
    fix = "" if (": " in said[0] and not key) or said[0].endswith("lists them)") else f" ({_SHOWN})"
    return head + "; ".join(said) + fix


def _untyped(line: str) -> str:
    """A parser's line about a type, without Python's notation."""
    line = re.sub(r"^Expected a <class '(?:[\w.]+\.)?(\w+)'>", r"Expected: \1", line)
    line = re.sub(r"^Expected a typing\.Literal\[(.+?)\]", r"Expected one of \1", line)
    line = re.sub(r"^Expected:? (.+)\. Got value: None$", r"it is null and takes none: give \1, or leave it out", line)
    return re.sub(
        r"^Expected a dot import path string: (.+)", r"\1 is the name of no class: give its path (`skillsd config` lists them)", line
    )


def _with_value(lines: list[str], message: str) -> list[str]:
    """The lines with those that name a type made one, which also says the value that was given."""
    kinds = [line.removeprefix("Expected: ") for line in lines if re.fullmatch(r"Expected: \w+", line)]
    given = re.search(r"^ *Given value: (.{1,200})", message, re.MULTILINE)
    if not kinds or given is None:
        return lines
    return [f"Expected: {' or '.join(kinds)}. Got value: {given[1]}", *(x for x in lines if not re.fullmatch(r"Expected: \w+", x))]


def _key(message: str) -> str:
    """The full name of the key that a nested parser error is about: of several branches the first."""
    path: list[str] = []
    depth = -1
    for line in message.splitlines():
        found = re.search(r'Parser key "([^"]+)"', line)
        if found and found.start() > depth:
            path, depth = [*path, *[found[1]] * (path[-1:] != [found[1]])], found.start()  # one may be named twice
    under = [f"{name}.init_args" if name.split(".")[-1] in _CLASSES else name for name in path[:-1]]
    return ".".join([*under, *path[-1:]])
