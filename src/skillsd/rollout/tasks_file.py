"""Tasks of a JSONL file instead of the environment's own."""

from __future__ import annotations

import json
from pathlib import Path

from skillsd.errors import ConfigError
from skillsd.trajectory import Task


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
            task = Task(
                str(raw.pop("task_id")), str(raw.pop("split")), str(raw.pop("difficulty", "")), raw, str(raw.pop("scenario", None) or "")
            )  # fmt: skip
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
