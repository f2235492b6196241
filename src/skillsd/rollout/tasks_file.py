"""Tasks of a JSONL file instead of the environment's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skillsd.errors import ConfigError
from skillsd.rollout.ask import label
from skillsd.trajectory import Task


def _word(value: Any, key: str) -> str:
    """A text or a number as text, "" for null; TypeError for what else there is in JSON, which has no name."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise TypeError(f"{key} is {value!r:.80}, not a text")
    return label(value)


def read_tasks(path: Path, split: str, key: str) -> list[Task]:
    """Tasks of one split from a JSONL file; other keys of a line go to `reset(options=...)`."""
    if not path.is_file():
        raise ConfigError(f"data.init_args.tasks_file: no file {path}: check the path.")
    tasks: dict[str, Task] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # of bytes: text has further line ends, which JSON strings may hold
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            name, within, difficulty, scenario = (_word(raw.pop(key, None), key) for key in ("task_id", "split", "difficulty", "scenario"))
            if not name or not within:
                raise KeyError("task_id" if within else "split")
            task = Task(name, within, difficulty, raw, scenario)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
            raise ConfigError(f"data.init_args.tasks_file: {path}:{number} needs a JSON object with task_id and split ({e}).") from e
        if task.split != split:
            continue
        if task.task_id in tasks:
            raise ConfigError(f"data.init_args.tasks_file: {path}:{number} repeats the task_id {task.task_id} of split {split}.")
        tasks[task.task_id] = task
    if not tasks:
        raise ConfigError(f"data.init_args.{key}: {path} has no task of split {split}.")
    return list(tasks.values())
