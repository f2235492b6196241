"""Skills that a bank holds before its run begins: events of `BEFORE`, which every fresh start of the run keeps."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from skillsd.skills.bank import SkillBank
from skillsd.skills.skill import Skill
from skillsd.skills.tables import BEFORE


def counted(path: Path) -> tuple[int, int]:
    """How many of a bank's events are imports, and how many a run's; (0, 0) without a file. Raises ValueError if it cannot be read."""
    if not path.is_file():
        return 0, 0
    with SkillBank(path, read_only=True) as bank:
        return bank.imported, bank.position - bank.imported


def in_use(path: Path) -> bool:
    """True if another process has the bank open: whoever closes it last takes its -wal file away, also one that a killed run has left."""
    if not path.is_file():
        return False
    with closing(sqlite3.connect(path)) as db:
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return path.with_name(f"{path.name}-wal").exists()


def cut_to_imported(path: Path) -> int:
    """Leave in a bank what was imported, or nothing done if that is nothing.

    Returns:
        How many events were imported.

    Raises:
        ValueError: It cannot be read.
    """
    imported, of_run = counted(path)
    if imported and of_run:
        with SkillBank(path, read_only=True) as bank:
            value_estimate = bank.value_estimate
        with SkillBank(path, value_estimate=value_estimate) as bank:
            bank.cut(BEFORE + 1, expect=imported)
    return imported


def earlier(skills: Iterable[Skill]) -> list[Skill]:
    """The same skills, made before iteration 0: they are neither newer than a run's own, nor is one of its trajectories taken for their
    source. Which of them are newer than others stays."""
    skills = list(skills)
    past = max((skill.source_iteration + 1 for skill in skills), default=0)
    return [replace(skill, source_iteration=skill.source_iteration - max(0, past)) for skill in skills]
