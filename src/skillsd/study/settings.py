"""What a study is: read from a YAML file and flags."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from jsonargparse import ArgumentParser, set_parsing_settings

from skillsd.errors import ConfigError
from skillsd.files.paths import read_path

BASE = "base"
"""The untrained agent's name in the report."""
STUDY_FLAGS = ("seed_everything", "trainer.default_root_dir", "ckpt_path", "config", "c", "overwrite")
"""Flags of `skillsd fit` that the study gives itself."""


@dataclass
class StudySettings:
    """A grid of methods and seeds, and how its cells are run."""

    configs: list[str] = field(default_factory=list)
    """Configuration files of every cell, found as `skillsd fit -c` finds them."""
    methods: dict[str, list[str]] = field(default_factory=dict)
    """Name of a method -> its overlays; [] is the experiment as it stands."""
    overlays: list[str] = field(default_factory=list)
    """Further files for every cell, after the method's."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Run seeds: every method with each."""
    baseline: str = "grpo"
    """The method that all others are compared with."""
    controls: dict[str, str] = field(default_factory=dict)
    """Control method -> the method it is a control of."""
    set: dict[str, str | bool | int | float | list | dict | None] = field(default_factory=dict)
    """Dotted key -> value, for every cell, as `skillsd fit --key=value`; the flag --set.KEY=VALUE adds to the file's."""
    folder: str = "runs/study"
    """The study folder: cells, results.csv, curves.csv, the report."""
    workers: int = 1
    """Cells that run at one time."""
    threads: int = 1
    """CPU threads of each cell (OMP_NUM_THREADS); another number gives sums of floats another order."""
    time_limit: float | None = None
    """Seconds after which running cells are interrupted; the same command continues them. null: none."""
    metric: Literal["success", "completion"] = "success"
    """What the report compares, on the panel after training."""
    only_report: bool = False
    """Run nothing: make the report of what is finished."""

    def __post_init__(self) -> None:
        self.folder = str(read_path(self.folder, "folder"))
        if not self.configs or not self.methods or not self.seeds:
            raise ConfigError("configs, methods, seeds: a study needs at least one of each: name its file (-c study/sokoban-nano).")
        for name in self.methods:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == BASE:
                raise ConfigError(f"methods: {name!r} names a folder: use letters, digits, '.', '_' and '-', and not {BASE!r}.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: {self.seeds} names a seed twice: it would count twice.")
        if self.baseline not in self.methods:
            raise ConfigError(f"baseline: {self.baseline} is not among methods ({', '.join(self.methods)}): name one of them.")
        for control, method in self.controls.items():
            if control == method or not {control, method} <= set(self.methods):
                raise ConfigError(f"controls: {control}: {method} must be two of methods ({', '.join(self.methods)}).")
        for name in ("workers", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give 1 or more.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise ConfigError(f"time_limit is {self.time_limit}: give seconds above 0, or null.")
        for key in self.set:
            if key in STUDY_FLAGS:
                raise ConfigError(f"set: {key} is the study's own business: leave it out.")
            if "." not in key:
                raise ConfigError(f"set: {key} is no dotted key: write trainer.max_epochs: 1, say.")

    def flags(self) -> dict[str, str]:
        """`set` as text for the command line: what is no string as JSON."""
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in self.set.items()}


def read_settings(args: Sequence[str]) -> StudySettings:
    """Parse what follows `skillsd study`.

    Raises:
        ConfigError, argparse.ArgumentError: bad input.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="skillsd study",
        exit_on_error=False,
        description="Fit every method with every seed, then compare them over seeds. The same command continues a study.",
    )
    parser.add_argument("-c", "--config", action="config", help="study file, e.g. study/sokoban-nano")
    parser.add_class_arguments(StudySettings)
    rest, more = _set_flags(args)
    try:
        given = parser.parse_args(rest)
    except UnicodeDecodeError as e:
        raise ConfigError(f"config: the study file is no UTF-8 text ({e}): write it as UTF-8.") from e
    settings = {f.name: given[f.name] for f in fields(StudySettings)}
    if empty := [name for name, value in settings.items() if value is None and name != "time_limit"]:
        raise ConfigError(f"{', '.join(empty)}: null is no value: give one, or leave the key out.")
    return StudySettings(**settings | {"set": settings["set"] | more})


def _set_flags(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Other arguments, and what --set.KEY=VALUE gives: the parser would take a dotted key for a nest of them."""
    rest: list[str] = []
    found: dict[str, str] = {}
    left = iter(args)
    for arg in left:
        key, equals, value = arg.removeprefix("--set.").partition("=")
        if arg.startswith("--set."):
            found[key] = value if equals else next(left, "")
        else:
            rest.append(arg)
    return rest, found
