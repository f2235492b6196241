"""Tasks of a JSONL file, and what a task is called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skillsd.errors import ConfigError
from skillsd.trajectory import Task

KEYS = ("task_id", "split", "difficulty", "scenario")
"""Keys of an entry that describe the task. What else it holds are options of `reset`."""


def read_tasks(path: str | Path, split: str, key: str) -> list[Task]:
    """The tasks of one split in a JSONL file; keys of a line other than KEYS are options of `reset`.

    Args:
        path: The file.
        split: Its split.
        key: The configuration's key that names the split, for errors.

    Raises:
        ConfigError: There is no such file, a line is no task, a task_id comes twice, or the split has no task.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"data.tasks_file: no file {path}: check the path.")
    tasks: dict[str, Task] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # of bytes: text has further line ends, which JSON strings may hold
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            name, within, difficulty, scenario = (label(raw, key) for key in KEYS)
            if not name or not within:
                raise KeyError("task_id" if within else "split")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
            raise ConfigError(f"data.tasks_file: {path}:{number} needs a JSON object with task_id and split ({e}).") from e
        if within != split:
            continue
        if name in tasks:
            raise ConfigError(f"data.tasks_file: {path}:{number} repeats the task_id {name} of split {split}: give each task its own.")
        tasks[name] = Task(name, split, difficulty, {k: v for k, v in raw.items() if k not in KEYS}, scenario)
    if not tasks:
        raise ConfigError(f"data.{key}: {path} has no task of split {split}: name another split.")
    return list(tasks.values())


def label(raw: Mapping[str, Any], key: str) -> str:
    """A text or number of an entry as text, "" where there is none. TypeError for anything else, which has no name."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise TypeError(f"{key} is {value!r:.80}, not a str")
    return "" if value is None else str(value)
