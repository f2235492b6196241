"""A file that was made when the schema was new stays readable; one of another version is refused."""

import json
import sqlite3
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

from skillsd.skills import Skill, SkillBank, bank_file

DATA = Path(__file__).parent / "data"
SETTINGS = {"capacity": 2, "value_estimate": "next_visit"}  # of the file


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "bank.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.executescript((DATA / "bank.sql").read_text(encoding="utf-8"))
    return path


def answers(bank, n):
    return {
        "position": bank.position, "stats": bank.stats(), "skills": [asdict(bank.get(i)) for i in range(1, n + 1)],
        "tasks": {t: [s.skill_id for s in bank.skills(t)] for t in bank.tasks()},
    }  # fmt: skip


def test_a_file_of_this_version_stays_readable(path):
    """If this fails, what is stored has changed: that takes a new version, and a new data/bank.sql."""
    expected = json.loads((DATA / "bank.json").read_text(encoding="utf-8"))
    skills = [Skill(**skill) for skill in expected["skills"]]
    with SkillBank(path, **SETTINGS) as bank:
        assert answers(bank, len(skills)) == expected
        known = skills[expected["tasks"]["t1"][0] - 1]
        assert bank.insert([known], 9) == [known.skill_id]  # a duplicate is found by what is stored of its texts
        assert bank.cut(9) == 1 and answers(bank, len(skills)) == expected
        assert bank.cut(0, expect=0) == expected["position"]


@pytest.mark.parametrize("version", [bank_file.SCHEMA_VERSION - 1, bank_file.SCHEMA_VERSION + 1])
@pytest.mark.parametrize("read_only", [False, True])
def test_another_version_is_refused_before_sqlite_opens_it(path, version, read_only):
    """SQLite would play a log beside it into the file, and make files of its own."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"PRAGMA user_version = {version}")
    path.with_name("bank.sqlite-wal").write_bytes(b"another")
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(ValueError, match=rf"bank\.sqlite: .*version {version}"):
        SkillBank(path, **SETTINGS, read_only=read_only)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
