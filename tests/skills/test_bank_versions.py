"""Files of every earlier version, made by its own code: brought to the present one by a writer, read as they are by a reader."""

import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.skills.test_bank import play

from skillsd.skills import Skill, SkillBank, bank_file
from skillsd.skills.ledger import Ledger

DATA = Path(__file__).parent / "data"
SETTINGS = {"capacity": 2, "booking": "next_visit"}  # of all the files


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


def version(path):
    with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as db:
        found = db.execute("PRAGMA user_version").fetchone()[0]
    db.close()
    return found


def tables(path):
    with sqlite3.connect(path) as db:
        found = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    db.close()
    return found


@pytest.mark.parametrize("earlier", range(1, bank_file.SCHEMA_VERSION))
def test_every_earlier_version_is_read_and_brought_up(tmp_path, make_skill, monkeypatch, earlier):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bank.sqlite"
    old_bank(path, earlier)
    expected = json.loads((DATA / f"bank_v{earlier}.json").read_text(encoding="utf-8"))
    n, before = len(expected["skills"]), path.read_bytes()
    with SkillBank(path, read_only=True) as view:
        assert told(view, n) == expected
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["bank.sqlite"]
    with pytest.raises(ValueError, match="booked as 'next_visit', not 'gap'"):
        SkillBank(path, booking="gap")
    assert path.read_bytes() == before
    with SkillBank(path, **SETTINGS) as bank:
        assert (tmp_path / "bank.sqlite-wal").stat().st_size == 0  # all of it is in the file
        assert told(bank, n) == expected
        play(bank, make_skill, 3, 8, 12)
        assert bank.cut(8, expect=expected["position"]) > 0 and told(bank, n) == expected
    assert version(path) == bank_file.SCHEMA_VERSION and tables(path) == {"setting", "event", "skill", "state", "task", "tally"}
    with SkillBank(path, **SETTINGS) as bank:
        assert told(bank, n) == expected
        bank.cut(0, expect=0)
        assert told(bank, 0)["stats"] == {"size": 0, "tasks": 0, "mean_uses": 0, "merged": 0, "dropped": 0}


def test_a_file_of_this_version_stays_readable(tmp_path, make_skill):
    """It was made when the version was new. If this fails, what is stored has changed: that takes a version and a migration."""
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


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("DELETE FROM event WHERE seq = 3", "event 4 cannot follow event 2"),
        ("DELETE FROM event WHERE seq = 12", "event 13 cannot follow event 11"),
        ("DELETE FROM skill WHERE skill_id = 3", "event 3 inserts skill 3, which is missing or out of order"),
        ("UPDATE event SET skill_id = 2 WHERE seq = 3", "event 3 inserts skill 2, which is missing or out of order"),
        ("UPDATE event SET kind = 'x' WHERE seq = 9", "does not add up: skill 7 was never inserted"),
        ("UPDATE event SET kind = 'x' WHERE seq = 57", "does not add up: skill 19 is dropped twice, or an event is of unknown kind 'x'"),
        ("UPDATE event SET kind = 'drop' WHERE seq = 8; UPDATE event SET skill_id = 6 WHERE seq = 8", "skill 6 is dropped twice"),
        ("UPDATE event SET iteration = 0 WHERE seq = 57", "an event of iteration 0 cannot follow one of 7"),
        ("UPDATE event SET reward = NULL WHERE kind = 'use'", "a use of skill 1 lacks the value"),
        ("UPDATE event SET reward = 9e999 WHERE kind = 'use'", "skill 1 must add up to a finite number, got inf"),
        ("UPDATE event SET skill_id = 999 WHERE kind = 'merge'", "skill 999 was never inserted"),
        ("DELETE FROM setting", "the booking setting is missing or unknown"),
    ],
)
def test_a_log_that_does_not_add_up_is_left_as_it_is(tmp_path, damage, why):
    path = tmp_path / "bank.sqlite"
    old_bank(path, 1)
    with sqlite3.connect(path) as db:
        db.executescript(damage)
    db.close()
    before = path.read_bytes()
    for read_only in (True, False):
        with pytest.raises(ValueError, match=rf"bank\.sqlite: .*{why}.*left as it is"):
            SkillBank(path, **SETTINGS, read_only=read_only)
        assert path.read_bytes() == before


def test_it_is_brought_up_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "bank.sqlite"
    old_bank(path, 1)
    before, settle = path.read_bytes(), Ledger.settle

    def full(ledger):
        settle(ledger)
        if ledger._db.execute("PRAGMA database_list").fetchone()[2]:  # not the copy that is looked at first
            raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Ledger, "settle", full)
    with pytest.raises(OSError, match="full"):
        SkillBank(path, **SETTINGS)
    assert path.read_bytes() == before
    monkeypatch.undo()
    SkillBank(path, **SETTINGS).close()
    assert version(path) == bank_file.SCHEMA_VERSION


def test_killed_after_the_last_page_and_before_the_checkpoint(tmp_path):
    """The file's own header then still says the earlier version; what counts lies in the WAL."""
    path, copy = tmp_path / "bank.sqlite", tmp_path / "copy" / "bank.sqlite"
    old_bank(path, 1)
    copy.parent.mkdir()
    hold = sqlite3.connect(path, isolation_level=None)
    hold.execute("BEGIN")
    hold.execute("SELECT count(*) FROM event").fetchone()  # keeps the checkpoint from going through
    with SkillBank(path, **SETTINGS) as bank:
        bank.insert(bank.skills("t1")[:1], 9)
        for name in ("bank.sqlite", "bank.sqlite-wal"):
            (copy.parent / name).write_bytes((path.parent / name).read_bytes())
        position = bank.position
    hold.close()
    assert copy.read_bytes()[60:64] == (1).to_bytes(4, "big")
    for read_only in (True, False):
        with SkillBank(copy, **SETTINGS, read_only=read_only) as bank:
            assert bank.position == position
