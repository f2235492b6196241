"""Bad input: the error that every check raises, an error's causes in one line, and what no line may hold: a secret."""

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
_held: dict[str, str] = {}


class ConfigError(ValueError):
    """Bad input. The command line prints its message alone and exits with code 2."""


class Parser(ArgumentParser):
    """Arguments of a command that takes no configuration: what it does not accept is a ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (`{self.prog} --help` shows what is accepted)")


def no_module(name: str) -> str:
    """What to do where a module that a configuration names is not found."""
    return f"there is no module {name}, neither here nor among the packages: install it, or call skillsd in its folder, or set PYTHONPATH."


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
