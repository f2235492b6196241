"""Configuration files as plain data: one reader for every command, whose errors name file, line and cure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from skillsd.bounded import MAX_DEPTH, check_yaml
from skillsd.errors import ConfigError

MAX_CHARS = 500_000
"""Longest configuration that is read, in characters."""


class _Loader(yaml.SafeLoader):  # not the one in C: brackets within brackets end its process
    """YAML 1.1 with two differences, both as jsonargparse has them: `1e-4` is a number, and a date is a text."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as the same: the text "1e-4" in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_FLOAT = re.compile(
    r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+(?:[eE][-+][0-9]+)?"
    r"|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_config(path: str | Path, name: str | None = None) -> dict[str, Any]:
    """What a configuration file says.

    Args:
        path: The file; it is read once.
        name: What messages call it; the path if it is not given.

    Raises:
        ConfigError: It cannot be read, is no UTF-8 text, no YAML or no mapping, or names a key twice.
    """
    name = name or str(path)
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise ConfigError(f"{name}: it cannot be read ({e.strerror}): check the path.") from e
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[: e.start].count(b"\n") + 1
        raise ConfigError(f"{name}, line {line}: it is no UTF-8 text ({e.reason}): name a YAML file, saved as UTF-8.") from e
    return parse_config(text, name)


def read_whole(path: Path, name: str | None = None) -> dict[str, Any]:
    """The same with the content of files beside it that are the values of `model:` or another key at the top."""
    config = read_config(path, name)
    for key, value in config.items():
        if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")) and (path.parent / value).is_file():
            config[key] = read_config(path.parent / value)
    return config


def parse_config(text: str, name: str) -> dict[str, Any]:
    """The same from a text.

    Args:
        text: YAML, or JSON.
        name: What messages call it.

    Raises:
        ConfigError: As `read_config`.
    """
    if len(text) > MAX_CHARS:
        raise ConfigError(f"{name}: it has {len(text):,} characters, and at most {MAX_CHARS:,} are read: name a configuration file.")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise ConfigError(f"{name} is empty: write keys into it, or leave it out.")
            _check(node, name)
            found = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as e:
        raise ConfigError(_explained(e, text, name)) from e
    except ConfigError:
        raise
    except RecursionError as e:
        raise ConfigError(f"{name}: more than {MAX_DEPTH} mappings and lists lie within one another: write it flatter.") from e
    except ValueError as e:
        raise ConfigError(f"{name}: {' '.join(str(e).split())}: write out what is meant.") from e
    if not isinstance(found, dict):
        kind = "a list" if isinstance(found, list) else "a single value"
        raise ConfigError(f"{name} is {kind}: a configuration is a mapping of keys to values, `trainer: {{max_epochs: 1}}` say.")
    if odd := [key for key in found if not isinstance(key, str)]:
        raise ConfigError(f"{name}: the key {odd[0]!r} is no text: check it, or write it in quotes.")
    return found


def check_value(text: str, name: str) -> None:
    """Refuse a flag's value that is a mapping or a list of YAML and names a key twice; a text may be anything.

    Raises:
        ConfigError: It does.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    except (yaml.YAMLError, RecursionError):
        return
    finally:
        loader.dispose()
    if isinstance(node, yaml.CollectionNode):
        _check(node, name)


def as_yaml(value: Any) -> str:
    """Plain data as a text that every YAML loader reads as the same data: texts in quotes, all else with its tag, in one line.

    It holds no "://", which jsonargparse takes for an address.
    """
    if value is None:
        return "null"
    text: str = yaml.dump(value, Dumper=_Dumper, default_style='"', default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.strip().replace("://", ":\\/\\/")


def dump_config(value: Any) -> str:
    """A configuration for people to read, which `read_config` reads back as the same."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return text


def _check(root: yaml.Node, name: str) -> None:
    """Refuse what unfolds beyond bounds, keys that stand twice, and keys that YAML takes for true, false or null."""
    check_yaml(root)
    seen: set[int] = set()

    def walk(node: yaml.Node, path: str) -> None:
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            return
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, path, name)
        pairs = node.value if isinstance(node, yaml.MappingNode) else enumerate(node.value)
        for key, value in pairs:
            walk(value, f"{path}.{key.value if isinstance(key, yaml.Node) else key}".lstrip("."))

    walk(root, "")


def _check_keys(node: yaml.MappingNode, path: str, name: str) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        line, full = key.start_mark.line + 1, f"{path}.{key.value}".lstrip(".")
        if key.tag in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"):
            raise ConfigError(f"{name}, line {line}: YAML takes the key {full} for a {key.tag.split(':')[-1]}: write it in quotes.")
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if (key.tag, key.value) in lines:
            was = lines[key.tag, key.value]
            raise ConfigError(f"{name}: the key {full} stands twice, in line {was} and in line {line}: write it once.")
        if ":" in key.value and not getattr(value, "value", None) and value.tag == "tag:yaml.org,2002:null":
            raise ConfigError(f"{name}, line {line}: {full} is a key without a value: write a space after its colon.")
        lines[key.tag, key.value] = line


def _explained(error: yaml.YAMLError, text: str, name: str) -> str:
    """File, line, what YAML says, and what is likely to mend it."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:  # a character that no YAML file may hold
        at = getattr(error, "position", 0)
        return f"{name}, line {text[:at].count(chr(10)) + 1}: it is no YAML ({' '.join(str(error).split())}): name a text file."
    problem, context = str(getattr(error, "problem", None) or "it is no YAML"), str(getattr(error, "context", None) or "")
    begun = getattr(error, "context_mark", None)
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return f"{name}, line {mark.line + 1}: a tab indents it, and YAML takes spaces alone: write spaces."
    cures = {
        "flow": "close every { and [, and write a text that holds one of them in quotes",
        "quoted scalar": "close the quote",
        "mapping values": "indent it as the keys beside it, and write a text that holds a colon and a space in quotes",
        "block": "indent it as the keys or items beside it",
        "alias": "an alias (*) needs its anchor (&) in a line above",
        "document": "one file is one configuration: take `---` out, or make two files and give both",
        "start any token": "write a text that begins with such a character in quotes",
        "tag": "values of configuration files are plain data: leave out what begins with `!`",
    }
    cure = next((cure for part, cure in cures.items() if part in f"{context} {problem}"), "check the line and the one above")
    since = f" (what begins in line {begun.line + 1} goes on until there)" if begun and begun.line != mark.line else ""
    return f"{name}, line {mark.line + 1}: {problem}{since}: {cure}."
