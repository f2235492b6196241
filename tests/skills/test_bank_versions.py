"""A file that was made when the schema was new stays readable; one of another version is refused."""

import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

import pytest

from skillsd.skills import Skill, SkillBank, bank_file

DATA = Path(__file__).parent / "data"
SETTINGS = {"capacity": 2, "booking": "next_visit"}  # of the file


def old_bank(path, version):
    db = sqlite3.connect(path)
    db.executescript((DATA / f"bank_v{version}.sql").read_text(encoding="utf-8"))
    db.close()
    assert path.read_bytes()[60:64] == version.to_bytes(4, "big")


def told(bank, n):
    return {
        "position": bank.position, "stats": bank.stats(), "skills": [asdict(bank.get(i)) for i in range(1, n + 1)],
        "tasks": {t: [s.skill_id for s in bank.skills(t)] for t in bank.tasks()},
    }  # fmt: skip


def test_a_file_of_this_version_stays_readable(tmp_path, make_skill):
    """It was made when the version was new. If this fails, what is stored has changed: that takes a new version."""
    path = tmp_path / "bank.sqlite"
    old_bank(path, bank_file.SCHEMA_VERSION)
    expected = json.loads((DATA / f"bank_v{bank_file.SCHEMA_VERSION}.json").read_text(encoding="utf-8"))
    skills = [Skill(**skill) for skill in expected["skills"]]
    with SkillBank(path, **SETTINGS) as bank:
        assert told(bank, len(skills)) == expected
        known = skills[expected["tasks"]["t1"][0] - 1]
        assert bank.insert([known], 9) == [known.skill_id]  # a duplicate is found by what is stored of its texts
        assert bank.cut(9) == 1 and told(bank, len(skills)) == expected
        assert bank.cut(0, expect=0) == expected["position"]


@pytest.mark.parametrize("version", [bank_file.SCHEMA_VERSION - 1, bank_file.SCHEMA_VERSION + 1])
@pytest.mark.parametrize("read_only", [False, True])
def test_another_version_is_refused_before_sqlite_opens_it(tmp_path, version, read_only):
    """SQLite would play a log beside it into the file, and make files of its own."""
    path = tmp_path / "bank.sqlite"
    old_bank(path, bank_file.SCHEMA_VERSION)
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    path.with_name("bank.sqlite-wal").write_bytes(b"another")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"bank\.sqlite: .*version {version}"):
        SkillBank(path, **SETTINGS, read_only=read_only)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
