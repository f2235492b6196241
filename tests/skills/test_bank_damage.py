"""A changed byte or a lost row of the file is named, when it is opened or at the latest when it is read; nothing else is ever told."""

import random
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from skillsd.skills import SkillBank, bank_file

TASKS = ("t1", "t2", "t3", "none")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A bank with all that one can hold: live and dropped skills, uses, merges; and long texts, which lie on pages of their own."""
    from tests.skills.conftest import _skill

    path, rng = tmp_path_factory.mktemp("whole") / "bank.sqlite", random.Random(0)
    with SkillBank(path, capacity=4, booking="gap") as bank:
        for iteration in range(12):
            for task_id in TASKS[:3]:
                long = 3000 if rng.random() < 0.1 else 20
                bank.insert([_skill(rng.choice("abcdefghij") * long, task_id, rng.random(), iteration) for _ in range(3)], iteration)
            bank.record_use(rng.randint(1, 8), iteration, reward=rng.random(), gap=rng.gauss(0, 1))
        n = bank._ledger.tally.skills
        assert bank.stats()["merged"] > 3 and bank.stats()["dropped"] > 3
    return path, n


def everything(path, n):
    with SkillBank(path, read_only=True) as bank:
        return repr(
            (
                bank.booking, bank.position, bank.stats(), bank.tasks(), [bank.get(i) for i in range(1, n + 1)],
                [(bank.skills(t), bank.retrieve(t)) for t in TASKS],
            )
        )  # fmt: skip


def rewound(path):
    """What a writer makes of it: half of the log is undone, which reads that half."""
    with SkillBank(path, capacity=4, booking="gap") as bank:
        bank.cut(6)
        n = bank._ledger.tally.skills
    return everything(path, n)


@pytest.mark.parametrize("table", ["state", "task"])
def test_a_row_of_an_earlier_moment_is_seen(tmp_path, make_skill, table):
    """As many rows as there should be, each with a CRC that fits: the sum over them tells."""
    path = tmp_path / "bank.sqlite"
    with SkillBank(path) as bank:
        bank.insert([make_skill("a"), make_skill("b")], 0)
    with closing(sqlite3.connect(path)) as db:
        (early, *_) = db.execute(f"SELECT * FROM {table}").fetchall()
    with SkillBank(path) as bank:
        bank.record_use(early[3] if table == "state" else 1, 1)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"REPLACE INTO {table} VALUES ({', '.join('?' * len(early))})", early)
    with pytest.raises(ValueError, match=rf"damaged \(rows of its table '{table}' are missing or doubled"), SkillBank(path) as bank:
        bank.skills("t1")


def test_a_schema_that_is_no_text(tmp_path, whole):
    """SQLite repeats the bytes in its message, which Python then cannot read."""
    path = tmp_path / "bank.sqlite"
    path.write_bytes(whole[0].read_bytes().replace(b"PRIMARY KEY CHECK", b"PRIMARY K\xf7Y CHECK"))
    for read_only in (True, False):
        with pytest.raises(ValueError, match=r"bank\.sqlite: the file is damaged .* It was left as it is"):
            SkillBank(path, capacity=4, booking="gap", read_only=read_only)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_flipped_bytes_are_named_or_change_nothing(tmp_path, whole, monkeypatch, large):
    """`large`: too large to be checked as a whole when opened."""
    source, n = whole
    path = tmp_path / "bank.sqlite"
    if large:
        monkeypatch.setattr(bank_file, "WHOLE_CHECK_BYTES", 0)
    shutil.copy(source, path)
    right, right_cut = everything(path, n), rewound(path)
    data, rng, named = source.read_bytes(), random.Random(5), 0
    for i in range(500):
        changed = bytearray(data)
        at = rng.randrange(100) if i % 10 == 0 else rng.randrange(len(data))
        for k in range(at, min(len(data), at + rng.choice([1, 1, 1, 2, 16]))):
            changed[k] ^= rng.randrange(1, 256)
        path.write_bytes(changed)
        read = False
        try:
            assert everything(path, n) == right, at
            read = True
            assert rewound(path) == right_cut, at
        except (ValueError, OSError) as error:
            assert "bank.sqlite" in str(error), at
            named += 1
        if not read:
            assert path.read_bytes() == changed, at  # left as it is
        for sidecar in tmp_path.glob("bank.sqlite-*"):
            sidecar.unlink()
    assert 150 < named < 500


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ("DELETE FROM state WHERE rowid_ = 2", "skills"),
        ("DELETE FROM task WHERE task_id = 't2'", "open"),
        ("DELETE FROM skill WHERE skill_id = 3", "get"),
        ("DELETE FROM skill WHERE skill_id = (SELECT max(skill_id) FROM skill)", "open"),
        ("DELETE FROM event WHERE seq = (SELECT max(seq) FROM event)", "open"),
        ("DELETE FROM event WHERE seq = 30", "cut"),
        ("UPDATE event SET gap = gap + 1 WHERE kind = 'use'", "cut"),
        ("UPDATE event SET total_before = NULL WHERE kind = 'use'", "cut"),
        ("UPDATE skill SET golden_workflow = 'another' WHERE skill_id = 3", "get"),
        ("UPDATE skill SET source_iteration = 1.5 WHERE skill_id = 3", "get"),
        ("UPDATE state SET uses = 7 WHERE task_id = 't2'", "skills"),
        ("UPDATE state SET uses = 7 WHERE task_id = 't2'", "insert"),
        ("DELETE FROM state WHERE rowid_ = 2", "insert"),
        ("UPDATE task SET live = live - 1 WHERE task_id = 't2'", "open"),
        ("UPDATE tally SET live = live - 1", "open"),
        ("DELETE FROM tally", "open"),
        ("UPDATE setting SET value = 'x'", "open"),
        ("CREATE TABLE copy AS SELECT * FROM event; DROP TABLE event; ALTER TABLE copy RENAME TO event", "open"),
    ],
)
def test_a_changed_row_of_a_large_bank_is_named_when_it_is_read(tmp_path, whole, monkeypatch, change, read):
    monkeypatch.setattr(bank_file, "WHOLE_CHECK_BYTES", 0)
    path = tmp_path / "bank.sqlite"
    shutil.copy(whole[0], path)
    with sqlite3.connect(path) as db:
        change = change.replace("rowid_ = 2", "task_id = 't2' AND dropped = 0 AND skill_id % 2 = (SELECT max(skill_id) FROM state "
                                "WHERE task_id = 't2' AND dropped = 0) % 2")  # fmt: skip
        db.executescript(change)
    db.close()
    named = pytest.raises(ValueError, match=r"bank\.sqlite: .*(damaged|no such).*left as it is")
    if read == "open":
        with named:
            SkillBank(path, read_only=True)
        return
    with SkillBank(path, capacity=4, booking="gap") as bank:
        for name, call in (
            ("skills", lambda: bank.skills("t2")), ("get", lambda: bank.get(3)), ("cut", lambda: bank.cut(0)),
            ("insert", lambda: bank.insert([replace(bank.skills("t1")[0], task_id="t2")], 20)),
        ):  # fmt: skip
            if name == read:
                position, size = bank.position, len(bank)
                with named:
                    call()
                assert (bank.position, len(bank)) == (position, size)
        assert bank.skills("t1") and bank.insert([bank.skills("t1")[0]], 20)  # the rest is as good as ever


def test_a_task_without_its_rows_is_not_told_as_empty(tmp_path, whole):
    path = tmp_path / "bank.sqlite"
    shutil.copy(whole[0], path)
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM state WHERE task_id = 't2' AND dropped = 0")
    db.close()
    with pytest.raises(ValueError, match=r"damaged \(its table 'state' holds"):
        SkillBank(path, read_only=True)


def test_a_row_that_is_gone_is_named(tmp_path, make_skill):
    path = tmp_path / "bank.sqlite"
    with SkillBank(path) as bank:
        bank.insert([make_skill("a"), make_skill("b")], 0)
        bank._ledger._db.execute("DELETE FROM skill WHERE skill_id = 1")
        with pytest.raises(ValueError, match=r"damaged \(a row of its table 'skill' is missing\)"):
            bank.get(1)


def test_a_row_that_should_not_be_there_is_not_written_over(tmp_path, make_skill):
    path = tmp_path / "bank.sqlite"
    with SkillBank(path) as bank:
        bank.insert([make_skill("a")], 0)
        bank._ledger._db.execute("INSERT INTO skill SELECT 2, task_id, 'x', 'x', 'x', 0, 0, 0.0, 0.0, 0 FROM skill")
        with pytest.raises(ValueError, match="UNIQUE constraint failed"):
            bank.insert([make_skill("b")], 0)
        assert bank._ledger._db.execute("SELECT golden_workflow FROM skill WHERE skill_id = 2").fetchone() == ("x",)


def test_a_hole_in_the_log_of_a_large_file_is_seen_by_who_reads_it(tmp_path, make_skill, monkeypatch):
    path = tmp_path / "bank.sqlite"
    with SkillBank(path) as bank:
        bank.insert([make_skill(text) for text in "abcd"], 0)
        assert [(e.seq, e.kind, e.skill_id) for e in bank.events()] == [(i, "insert", i) for i in range(1, 5)]
    monkeypatch.setattr(bank_file, "WHOLE_CHECK_BYTES", 0)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM event WHERE seq = 2")
    told = []
    with SkillBank(path, read_only=True) as bank, pytest.raises(ValueError, match="rows of its table 'event' are missing"):
        told.extend(e.seq for e in bank.events())
    assert told == [1]  # nothing from behind it


@pytest.mark.parametrize(
    "statement",
    ["CREATE TRIGGER t AFTER INSERT ON event BEGIN DELETE FROM skill; END", "CREATE VIEW v AS SELECT 1", "CREATE TABLE more (x)",
     "CREATE INDEX i ON event (abs(seq))"],
)  # fmt: skip
def test_a_bank_that_brings_statements_along_is_refused(tmp_path, make_skill, statement):
    path = tmp_path / "bank.sqlite"
    with SkillBank(path) as bank:
        bank.insert([make_skill("a")], 0)
    with closing(sqlite3.connect(path)) as db:
        db.execute(statement)
        db.commit()
    for read_only in (True, False):
        with pytest.raises(ValueError, match="damaged"), SkillBank(path, read_only=read_only):
            pass
