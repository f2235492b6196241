"""The reader of configuration files: what it takes, and what it says of a file that it does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from skillsd.config_file import as_yaml, check_value, dump_config, parse_config, read_config
from skillsd.errors import ConfigError

REFUSED: dict[str, tuple[bytes, list[str]]] = {
    "a tab": (b"trainer:\n\tmax_epochs: 1\n", ["line 2", "tab", "spaces"]),
    "an open bracket": (b"trainer: {max_epochs: 1\nskills: {}\n", ["line 2", "line 1", "close"]),
    "an open quote": (b'trainer: "a\nskills: {}\n', ["line 1", "quote"]),
    "a deeper line": (b"trainer:\n  max_epochs: 1\n    max_steps: 2\n", ["line 3", "indent"]),
    "a line between two depths": (b"trainer:\n    max_epochs: 1\n  max_steps: 2\n", ["line 3", "indent"]),
    "a key twice": (b"trainer: {}\nskills: {}\ntrainer: {}\n", ["trainer", "line 1", "line 3"]),
    "a key twice, deep": (b"model:\n  optimizer: {lr: 1,\n    lr: 2}\n", ["model.optimizer.lr", "line 2", "line 3"]),
    "no space after a colon": (b"trainer: {max_epochs:3}\n", ["line 1", "trainer.max_epochs:3", "colon"]),
    "a key that YAML takes for true": (b"a: 1\non: 1\n", ["line 2", "on", "quotes"]),
    "a number for a key": (b"3: {}\n", ["3", "quotes"]),
    "no anchor": (b"trainer: *x\n", ["line 1", "anchor"]),
    "two documents": (b"a: 1\n---\nb: 1\n", ["line 2", "---"]),
    "a percent sign": (b"a: %x\n", ["line 1", "quotes"]),
    "a tag": (b"a: !!python/object:os.system {}\n", ["line 1", "!"]),
    "a list": (b"[1, 2]\n", ["list", "mapping"]),
    "a text": (b"just text\n", ["mapping"]),
    "nothing": (b"", ["empty"]),
    "a comment": (b"# nothing\n", ["empty"]),
    "Latin-1": (b"a: 1\nb: L\xf6we\n", ["line 2", "UTF-8"]),
    "a null byte": (b"a: 1\nb: \0\n", ["line 2", "text"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_file_line_and_cure(tmp_path: Path, name: str) -> None:
    content, parts = REFUSED[name]
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as e:
        read_config(path)
    said = str(e.value)
    assert said.startswith(str(path)) and "\n" not in said and all(part in said for part in parts), said


def test_a_folder_and_a_missing_file_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match=str(path)):
            read_config(path)


TAKEN: dict[str, tuple[bytes, Any]] = {
    "a number without a dot": (b"a: 1e-4", 1e-4),
    "the same in quotes": (b'a: "1e-4"', "1e-4"),
    "a byte order mark, and lines of Windows": (b"\xef\xbb\xbfa: {b: 7}\r\n", {"b": 7}),
    "an anchor and a merge": (b"base: &x {b: 1, c: 2}\na: {<<: *x, c: 3}\n", {"b": 1, "c": 3}),
    "a date": (b"a: 2026-11-30", "2026-11-30"),
    "null": (b"a: ~", None),
    "YAML's true": (b"a: on", True),
    "an umlaut": ("a: Löse".encode(), "Löse"),
    "JSON": (b'{"a": [1, null]}', [1, None]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_valid_yaml_is_read(tmp_path: Path, name: str) -> None:
    content, value = TAKEN[name]
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    assert read_config(path)["a"] == value


def test_what_is_written_is_read_back() -> None:
    value = {
        "a": None,
        "b": [1, True, "no", "1e-4", 1e-5, math.inf, "x\ny: 'z' \"q\" #"],
        "u": "http://a://b",
        "e": {},
        "l": [],
        "ß\0": "\u2028",
    }
    for text in (as_yaml(value), dump_config(value)):
        assert parse_config(text, "x") == value
    assert yaml.safe_load(as_yaml(value)) == value and "://" not in as_yaml(value) and "\n" not in as_yaml(value)
    assert as_yaml(None) == "null"


def test_a_flags_value() -> None:
    for text in ("{a} {b}: c", "[", "{a: 1}", "text", "{a: 1, b: {c: 1}}"):
        check_value(text, "--x")
    with pytest.raises(ConfigError, match=r"--x: the key b\.a stands twice"):
        check_value("{b: {a: 1, a: 2}}", "--x")
