"""Skills as JSON lines, to be moved between banks: one skill a line, which names its format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from skillsd.errors import ConfigError
from skillsd.skills.bank import SkillBank
from skillsd.skills.skill import FIELDS, Skill

FORMAT = "skillsd.skill.v1"
SOURCE = {"source_iteration": int, "source_member": int, "source_reward": float, "source_completion": float}
STATISTICS = ("skill_id", "uses", "mean_reward", "sources", "evicted")
"""Written to be read; another bank has its own."""
MAX_LINE = 2 << 20
"""Bytes of a line: three texts of `skill.MAX_CHARS`, each character escaped in twelve, and more."""
MAX_TASK_ID = 1000
"""Characters of a task's name."""


def to_lines(bank: SkillBank, evicted: bool = False) -> Iterator[str]:
    """The bank's skills by id as lines of ASCII, without line ends.

    Args:
        bank: Open as long as lines are asked for.
        evicted: Also those that it holds no longer, with the iteration in which they were evicted.

    Raises:
        ValueError: The bank is damaged.
    """
    gone: dict[int, int | None] = {}
    for event in bank.events():
        if event.kind in ("insert", "evict"):
            gone[event.skill_id] = event.iteration if event.kind == "evict" else None
    for skill_id, at in gone.items():
        if at is None or evicted:
            skill = bank.get(skill_id)
            names = ("task_id", *FIELDS, *SOURCE, *STATISTICS[:-1])
            yield json.dumps({"format": FORMAT} | {name: getattr(skill, name) for name in names} | ({} if at is None else {"evicted": at}))


def from_lines(lines: Iterable[bytes]) -> list[Skill]:
    """The skills of such lines, in their order, without their statistics. Blank lines are passed over; `source_*` may be left out.

    Raises:
        ConfigError: A line is no such skill, or one that may not enter a bank; it is named by its number from 1.
    """
    skills = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                skills.append(_skill(line))
            except (ValueError, RecursionError) as e:
                raise ConfigError(f"FILE: line {number}: {e}: mend it, or leave it out; nothing was imported.") from e
    return skills


def bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long to be a skill the beginning."""
    return iter(lambda: file.readline(MAX_LINE + 1), b"")


def _skill(line: bytes) -> Skill:
    if len(line) > MAX_LINE:
        raise ValueError(f"it has more than {MAX_LINE} bytes")
    try:
        found = json.loads(line)
    except ValueError as e:
        raise ValueError(f"it is no JSON ({e})") from e
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f'it is no skill (a JSON object with "format": "{FORMAT}")')
    names = set(found)
    if unknown := sorted(names - {"format", "task_id", *FIELDS, *SOURCE, *STATISTICS}):
        raise ValueError(f"unexpected: {unknown[0][:80]!a}")
    if missing := [name for name in ("task_id", *FIELDS) if name not in names]:
        raise ValueError(f"missing: {', '.join(missing)}")
    task_id = found["task_id"]
    if not isinstance(task_id, str) or not task_id:
        raise ValueError("task_id is no text")
    if len(task_id) > MAX_TASK_ID:
        raise ValueError(f"task_id has {len(task_id)} characters, more than {MAX_TASK_ID}")
    if not task_id.isprintable():  # a line end would forge lines of what is printed; a lone surrogate cannot be stored
        raise ValueError(f"task_id {task_id[:80]!a} holds what is no printable character")
    source = {name: _number(name, found[name], kind) for name, kind in SOURCE.items() if name in names}
    return Skill(**{name: found[name] for name in FIELDS}, task_id=task_id, **source).admitted()


def _number(name: str, value: Any, kind: type) -> Any:
    fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not fits or not abs(value) < 2**53:  # nan is not, either
        raise ValueError(f"{name} is no {'finite' if kind is float else 'whole'} number below 2**53")
    return kind(value)
