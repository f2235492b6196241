"""What a run folder from elsewhere may hold, read within bounds: YAML whose aliases multiply, templates, texts that forge a line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

import yaml

MAX_LEAVES = 100_000
"""Values of a configuration, each alias counted as what it stands for."""
MAX_DEPTH = 50
"""Mappings and lists within one another, in a configuration."""
MAX_FILLED_CHARS = 2_000_000
"""Longest text that a template gives, in characters."""

_PRECISION = re.compile(r"\.\d[f%]")


def check_yaml(root: yaml.Node) -> None:
    """Refuse a composed YAML document that is too deep, or whose aliases stand for too much, before anything of it is built.

    Raises:
        ValueError: It is.
    """
    _count(root, {}, 1)


def _count(node: yaml.Node, known: dict[int, tuple[int, int] | None], depth: int) -> tuple[int, int]:
    """How many values a node stands for, and how deep it is. `known` holds those seen before, None for those that are being counted."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 0
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ValueError("an alias stands for what it is a part of")
    else:
        known[id(node)] = None
        total = height = 0
        for part in node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]:
            count, below = _count(part, known, depth + 1)
            total, height = total + count, max(height, below)
            if total > MAX_LEAVES:
                raise ValueError(f"it holds more than {MAX_LEAVES} values, aliases counted as what they stand for")
        found = known[id(node)] = total + 1, height + 1
    if depth + found[1] > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} mappings and lists lie within one another")
    return found


def visible(text: str) -> str:
    """Text that a terminal may be given: all but printable characters, line ends and tabs is escaped (\\x1b, \\ud800)."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def one_line(text: str, most: int = 200) -> str:
    """A foreign name within a line that a terminal is given: `visible`, line ends and tabs escaped too, and at most `most` characters."""
    text = f"{text[:most]}..." if len(text) > most else text
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A template with its {names} replaced; {{ and }} are braces. Names stand alone, but a float may be given a precision of one digit, as
    in {completion:.0%}: what `str.format` could do beyond that (widths, attributes, indices) is refused.

    Raises:
        ValueError: There is no such name, braces do not match, or the text is longer than `MAX_FILLED_CHARS`.
    """
    out, length = [], 0
    for text, name, spec, conversion in Formatter().parse(template):
        value = ""
        if name is not None:
            plain = not conversion and (not spec or (isinstance(values.get(name), float) and _PRECISION.fullmatch(spec)))
            if name not in values or not plain:
                what = f"{name}{'!' if conversion else ''}{conversion or ''}{':' if spec else ''}{spec}"
                raise ValueError(f"{{{what[:80]}}} is none of {', '.join(f'{{{known}}}' for known in values)}, each without further signs")
            value = format(values[name], spec or "")
        out += [text, value]
        length += len(text) + len(value)
        if length > MAX_FILLED_CHARS:
            raise ValueError(f"the text is longer than {MAX_FILLED_CHARS} characters")
    return "".join(out)
