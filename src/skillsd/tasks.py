"""Where tasks come from: a JSONL file, or an environment's own list."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skillsd.errors import ConfigError
from skillsd.trajectory import Task


def read_tasks(path: str | Path, split: str, key: str) -> list[Task]:
    """The tasks of one split in a JSONL file; keys of a line other than those of a Task are options of `reset`.

    Args:
        path: The file.
        split: Its split.
        key: The configuration's key that names the split, for errors.

    Raises:
        ConfigError: There is no such file, a line is no task, a task_id comes twice, or the split has no task.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"data.init_args.tasks_file: no file {path}: check the path.")
    tasks: dict[str, Task] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # of bytes: text has further line ends, which JSON strings may hold
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            name, within, difficulty, scenario = (_label(key, raw.pop(key, None)) for key in ("task_id", "split", "difficulty", "scenario"))
            if not name or not within:
                raise KeyError("task_id" if within else "split")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
            raise ConfigError(f"data.init_args.tasks_file: {path}:{number} needs a JSON object with task_id and split ({e}).") from e
        if within != split:
            continue
        if name in tasks:
            raise ConfigError(f"data.init_args.tasks_file: {path}:{number} repeats the task_id {name} of split {split}.")
        tasks[name] = Task(name, split, difficulty, raw, scenario)
    if not tasks:
        raise ConfigError(f"data.init_args.{key}: {path} has no task of split {split}.")
    return list(tasks.values())


def tasks_of(listed: Any, split: str) -> list[Task]:
    """An environment's list as tasks. TypeError for an entry that is none, or a task_id that comes twice."""
    tasks: dict[str, Task] = {}
    for raw in listed:
        if not isinstance(raw, Mapping) or not isinstance(name := raw.get("task_id"), str) or not name:
            raise TypeError(f"tasks() must give dicts with a task_id as str, not {raw!r:.80}")
        if name in tasks:
            raise TypeError(f"tasks() lists the task_id {name!r:.80} twice: its episodes would be copies")
        difficulty, scenario = (_label(key, raw.get(key)) for key in ("difficulty", "scenario"))
        tasks[name] = Task(name, split, difficulty, scenario=scenario)
    return list(tasks.values())


def _label(key: str, value: Any) -> str:
    """A text or number as text, "" for None. TypeError for anything else, which has no name."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise TypeError(f"{key} is {value!r:.80}, not a str")
    return "" if value is None else str(value)
