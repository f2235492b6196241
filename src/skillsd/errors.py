"""Bad input: the error of the house, what a parser's error comes to in one line, and what no line may hold: a secret."""

from __future__ import annotations

import os
import re
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

_SECRET_NAME = re.compile(r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_PIECE = 8  # characters of a secret in a row that are one too many
SURE = 12
"""Characters from which on the value of a secret is no word of a text."""
_CLASSES = ("logger", "strategy", "profiler", "summariser", "context", "loss", "advantage", "multiplier", "gate")
"""Keys that take a class path: the parser's errors leave out the `init_args` under them."""
SHOWN = "`skillsd SUBCOMMAND --help` and `--print_config` show what is accepted"
_held: dict[str, str] = {}


class ConfigError(ValueError):
    """Bad input. The command line prints its message alone and exits with code 2."""


class Parser(ArgumentParser):
    """Arguments of a command that takes no configuration: what it does not accept is a ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (`{self.prog} --help` shows what is accepted)")


def no_module(name: str) -> str:
    """What to do where a module that a configuration names is not found."""
    return f"there is no module {name} on the Python path: install it, or name its folder, as in PYTHONPATH=. skillsd ..."


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, from the last to the first, as a traceback shows them: at most 20."""
    at: BaseException | None = error
    seen: list[int] = []
    while at is not None and id(at) not in seen and len(seen) < 20:
        seen.append(id(at))
        yield at
        inner = at.exceptions[0] if isinstance(at, BaseExceptionGroup) else None
        at = inner or at.__cause__ or (None if at.__suppress_context__ else at.__context__)


def causes(error: BaseException) -> str:
    """All of `chain` in one line without secrets: `APIConnectionError: Connection error. <- ConnectError: refused`."""
    said: list[str] = []
    for e in chain(error):
        try:
            text = " ".join(str(e).split())
        except Exception:  # an error that cannot even say what it is
            text = ""
        if not said or not text or text not in said[-1]:
            said.append(f"{type(e).__name__}: {text}" if text else type(e).__name__)
    return redacted(" <- ".join(said))


def one_line(message: str, under: str = "") -> str:
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
    lines = [re.sub(r"^Group '(.+)' does not accept option '(.+)'", r"no key \1.\2 is known", line) for line in lines]
    if key in _CLASSES:
        lines = [line.replace("no key ", f"no key {key}.init_args.") for line in lines]
    said = list(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))
    said = [line for line in said if not line.startswith("Expected a path but ")] or said  # a class may also be given as a file
    said = [_plain(line) for line in said]
    head = f"{key}: " if key else ""
    if message.startswith("unrecognized arguments: "):
        return f"{message.removeprefix('unrecognized arguments: ')}: there is no such key ({SHOWN})"
    if not said:  # a short error stands on the key's own line
        return (message.strip() or "it gave no message").splitlines()[0].removeprefix("Parser key ")
    fix = "" if (": " in said[0] and not key) or said[0].endswith("lists them)") else f" ({SHOWN})"
    return head + "; ".join(said) + fix


def _plain(line: str) -> str:
    """A parser's line about a type, without Python's notation."""
    line = re.sub(r"^Expected a <class '(\w+)'>", r"Expected: \1", line)
    line = re.sub(r"^Expected a typing\.Literal\[(.+?)\]", r"Expected one of \1", line)
    return re.sub(
        r"^Expected a dot import path string: (.+)", r"\1 is the name of no class: give its path (`skillsd config` lists them)", line
    )


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


def hold_secret(name: str, value: str) -> None:
    """Note the value of the environment variable `name`, whatever it is called, as a key that skillsd uses: `redacted` and `without_keys`
    take it out. Short ones are words."""
    if len(value) >= 6:
        _held[value] = name


def hold_keys(config: Mapping[str, Any]) -> None:
    """Note the keys whose variables a configuration names (`api_key_env`, `servers_key_env`); dotted key -> value."""
    for key, value in config.items():
        if key.rpartition(".")[2] in ("api_key_env", "servers_key_env") and isinstance(value, str):
            hold_secret(value, os.environ.get(value, ""))


def read_key(variable: str, key: str) -> str:
    """An API key from an environment variable, noted as a secret; "" if there is none.

    Raises:
        ConfigError: no HTTP header carries it. `key` is the configuration's key that names the variable.
    """
    value = os.environ.get(variable, "")
    hold_secret(variable, value.strip())
    if not re.fullmatch(r"[!-~]*", value):
        raise ConfigError(
            f"{key}: the environment variable {variable} holds a blank, a line break or a character that is not ASCII, which no HTTP "
            "header carries: set it to the API key alone."
        )
    return value


def secrets() -> dict[str, str]:
    """Value -> name: what `hold_secret` noted, and the environment variables whose name ends in KEY, TOKEN, SECRET or PASSWORD."""
    named = {value: name for name, value in os.environ.items() if len(value) >= SURE and _SECRET_NAME.search(name)}
    return named | _held


def without_keys(text: str) -> str:
    """Data as it is, but for whole values of keys that skillsd itself uses. What else looks like a secret may be a word of the data, and
    so may a key of less than 12 characters, such as local servers are given (`ollama`)."""
    for value in sorted((v for v in _held if len(v) >= SURE), key=len, reverse=True):
        text = text.replace(value, f"[{_held[value]}]")
    return text


def redacted(text: str) -> str:
    """An error's text without secrets and without pieces of 8 characters or more of them: servers echo keys, whole or cut. Not for data:
    see `without_keys`."""
    for value, name in secrets().items():
        size = min(_PIECE, len(value))
        hits = {value[at : at + size] for at in range(len(value) - size + 1)}
        out, at, kept = [], 0, 0
        while at <= len(text) - size:
            if text[at : at + size] not in hits:
                at += 1
                continue
            end = at + 1
            while text[end : end + size] in hits:
                end += 1
            out += [text[kept:at], f"[{name}]"]
            at = kept = end + size - 1
        text = "".join([*out, text[kept:]])
    return text
