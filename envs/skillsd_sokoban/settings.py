"""Checks of the environment's keyword arguments. Every error names the key and says what to do."""

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from skillsd_sokoban.level import SYMBOLS
from skillsd_sokoban.splits import buckets

SOURCES: dict[str, dict[str, dict[str, Any]]] = {
    "solver": {"all": {"lengths": [4, 30]}},
    "reverse_play": {"all": {"depth": 15}},
    "boxoban": {"all": {}},
}
"""Source -> its default difficulties."""


def whole(key: str, value: Any, low: int, high: int) -> int:
    """`value` as an int in [low, high]."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value <= high:
        raise ValueError(f"{key} = {value!r}: give a whole number from {low} to {high}")
    return int(value)


def one_of(key: str, value: Any, known: Any) -> Any:
    if value not in known:
        raise ValueError(f"{key} = {value!r}: unknown; choose one of {', '.join(map(repr, known))}")
    return value


def number(key: str, value: Any) -> float:
    """`value` as a finite float >= 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{key} = {value!r}: give a number, 0 or more")
    return float(value)


def mapping(key: str, value: Any) -> Mapping:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"{key} = {value!r}: give a mapping with names as keys")
    return value


def check_difficulties(source: str, difficulties: Any) -> dict[str, dict]:
    """Plain copy of `difficulties`, the source's default for None."""
    if difficulties is None:
        difficulties = SOURCES[source]
    if not mapping("difficulties", difficulties):
        raise ValueError("difficulties is empty: name at least one, such as {'all': " + str(SOURCES[source]["all"]) + "}")
    wanted = {"solver": "lengths", "reverse_play": "depth", "boxoban": "files"}[source]
    out = {}
    for name, given in difficulties.items():
        key = f"difficulties[{name!r}]"
        if unknown := set(mapping(key, given)) - {wanted}:
            raise ValueError(f"{key}: unknown key {sorted(unknown)[0]!r}; source {source!r} takes {wanted!r} only")
        if source == "boxoban":
            if not isinstance(given.get("files", "*"), str):
                raise ValueError(f"{key}['files'] = {given['files']!r}: give a pattern such as 'medium/*'")
            out[name] = dict(given)
        elif wanted not in given:
            raise ValueError(f"{key}: {wanted!r} is missing; source {source!r} needs it, such as {SOURCES[source]['all']}")
        elif source == "reverse_play":
            out[name] = {"depth": whole(f"{key}['depth']", given["depth"], 2, 300)}
        else:
            band = given["lengths"]
            if not isinstance(band, list | tuple) or len(band) != 2:
                raise ValueError(f"{key}['lengths'] = {band!r}: give [shortest, longest] in moves")
            low = whole(f"{key}['lengths'][0]", band[0], 1, 10_000)
            out[name] = {"lengths": [low, whole(f"{key}['lengths'][1]", band[1], low, 10_000)]}
    return out


def check_splits(splits: Any, difficulties: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Plain copy of `splits`; None means 96 training and 64 test levels of the first difficulty."""
    if splits is None:
        first = next(iter(difficulties))
        splits = {"train": {first: 96}, "test": {first: 64}}
    if not mapping("splits", splits):
        raise ValueError("splits is empty: name at least one, such as {'train': {'all': 96}}")
    out: dict[str, dict[str, int]] = {}
    for name, given in splits.items():
        counts = {}
        for difficulty, count in mapping(f"splits[{name!r}]", given).items():
            if difficulty not in difficulties:
                raise ValueError(
                    f"splits[{name!r}]: unknown difficulty {difficulty!r}; add it to difficulties or use one of {list(difficulties)}"
                )
            counts[difficulty] = whole(f"splits[{name!r}][{difficulty!r}]", count, 1, 1_000_000)
        if not counts:
            raise ValueError(f"splits[{name!r}] is empty: give the number of levels, such as {{'all': 64}}")
        for other in out:
            if buckets(other) == buckets(name):
                raise ValueError(f"splits: the names {other!r} and {name!r} own the same levels; rename one of them")
        out[name] = counts
    return out


def check_path(source: str, path: Any, difficulties: Mapping[str, Any]) -> str | None:
    """The path of Boxoban levels, checked to hold what the difficulties ask for."""
    if source != "boxoban":
        if path is not None:
            raise ValueError(f"path = {path!r}: only source 'boxoban' reads files; leave path out or set source='boxoban'")
        return None
    if path is None or not Path(path).exists():
        raise ValueError(f"path = {path!r}: not found; source 'boxoban' needs a .txt file of levels or a folder of them")
    root = Path(path)
    names = [p.relative_to(root).as_posix() for p in root.rglob("*.txt")] if root.is_dir() else [root.name]
    for name, given in difficulties.items():
        if not any(fnmatch(file, given.get("files", "*")) for file in names):
            raise ValueError(
                f"difficulties[{name!r}]: no .txt file under {path} matches {given.get('files', '*')!r}; correct files or path"
            )
    return str(root)


def check_separator(separator: Any) -> str:
    if not isinstance(separator, str) or "\n" in separator or set(separator) & set(SYMBOLS):
        raise ValueError(f"separator = {separator!r}: give a text without line breaks and without any of {SYMBOLS}, such as '' or ' '")
    return separator
