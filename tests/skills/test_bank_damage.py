"""A changed byte or a lost row of the file is named, when it is opened or at the latest when it is read; no answer is ever wrong."""

import random
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
from tests.skills.conftest import _skill

from skillsd.skills import SkillBank, bank_file

TASKS = ("t1", "t2", "t3", "none")
SETTINGS = {"capacity": 4, "value_estimate": "gap"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A bank with all that one can hold: live and evicted skills, uses, merges; and long texts, which lie on pages of their own."""
    path, rng = tmp_path_factory.mktemp("whole") / "bank.sqlite", random.Random(0)
    with SkillBank(path, **SETTINGS) as bank:
        for iteration in range(12):
            for task_id in TASKS[:3]:
                long = 3000 if rng.random() < 0.1 else 20
                bank.insert([_skill(rng.choice("abcdefghij") * long, task_id, rng.random(), iteration) for _ in range(3)], iteration)
            bank.record_use(rng.randint(1, 8), iteration, reward=rng.random(), gap=rng.gauss(0, 1))
        stats = bank.stats()
        assert stats["merged"] > 3 and stats["evicted"] > 3
    return path, int(stats["size"] + stats["evicted"])


def everything(path, n):
    with SkillBank(path, read_only=True) as bank:
        return repr(
            (
                bank.value_estimate, bank.position, bank.stats(), bank.tasks(), [bank.get(i) for i in range(1, n + 1)],
                [(bank.skills(t), bank.retrieve(t)) for t in reversed(TASKS)],
            )
        )  # fmt: skip


def rewound(path):
    """What a writer makes of it: half of the log is undone, which reads that half."""
    with SkillBank(path, **SETTINGS) as bank:
        bank.cut(6)
        stats = bank.stats()
    return everything(path, int(stats["size"] + stats["evicted"]))


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_flipped_bytes_are_named_or_change_nothing(tmp_path, whole, monkeypatch, large):
    """`large`: too large for its structure to be checked when it is opened."""
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


def changed(whole, path, *statements):
    """A copy of the bank that somebody has written to."""
    shutil.copy(whole[0], path)
    with closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)
    return path


@pytest.mark.parametrize(
    "statements",
    [
        ("DELETE FROM event WHERE seq = (SELECT max(seq) FROM event)",),
        ("UPDATE event SET tasks = tasks - 1",),
        ("UPDATE head SET events = events - 1",),
        ("UPDATE head SET value_estimate = 'next_visit'",),
        ("DELETE FROM head",),
        ("CREATE TABLE copy AS SELECT * FROM event", "DROP TABLE event", "ALTER TABLE copy RENAME TO event"),
        ("CREATE TRIGGER t AFTER INSERT ON event BEGIN DELETE FROM skill; END",),  # our own statements would run those of others
        ("CREATE VIEW v AS SELECT 1",),
        ("CREATE TABLE more (x)",),
        ("CREATE INDEX i ON event (abs(seq))",),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_damage_that_is_named_when_the_bank_is_opened(tmp_path, whole, monkeypatch, statements, read_only):
    monkeypatch.setattr(bank_file, "WHOLE_CHECK_BYTES", 0)
    path = changed(whole, tmp_path / "bank.sqlite", *statements)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"bank\.sqlite"):
        SkillBank(path, **SETTINGS, read_only=read_only)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("statement", "call"),
    [
        ("DELETE FROM state WHERE evicted = 0 AND task_id = 't2'", "skills"),
        ("DELETE FROM state WHERE evicted = 0 AND task_id = 't2'", "tasks"),
        ("DELETE FROM state WHERE evicted = 0 AND task_id = 't2'", "insert"),
        ("UPDATE state SET task_id = 't2x' WHERE task_id = 't2'", "skills"),
        ("UPDATE state SET skills = '[]' WHERE task_id = 't2'", "skills"),
        ("UPDATE state SET skills = '[]' WHERE task_id = 't2'", "insert"),
        ("DELETE FROM state WHERE evicted > 0", "get an evicted one"),
        ("DELETE FROM skill", "get"),
        ("UPDATE skill SET golden_workflow = 'another'", "get"),
        ("UPDATE skill SET golden_workflow = x'00ff'", "get"),
        ("UPDATE skill SET source_iteration = 1.5", "get"),
        ("DELETE FROM event WHERE seq = 30", "cut"),
        ("DELETE FROM event WHERE seq = 30", "events"),
        ("UPDATE event SET gap = gap + 1 WHERE seq < 30", "cut"),
        ("UPDATE event SET total_before = NULL WHERE seq < 30", "events"),
        ("INSERT INTO event SELECT seq + 1000, iteration, kind, skill_id, 0, 0, 0, 0, 0, 0, 0, 0, checksum FROM event", "events"),
    ],
)
def test_damage_that_is_named_when_it_is_read(tmp_path, whole, monkeypatch, statement, call):
    monkeypatch.setattr(bank_file, "WHOLE_CHECK_BYTES", 0)
    path = changed(whole, tmp_path / "bank.sqlite", statement)
    with SkillBank(path, **SETTINGS) as bank:
        evicted = next(event.skill_id for event in SkillBank(whole[0], read_only=True).events() if event.kind == "evict")
        calls = {
            "skills": lambda: bank.skills("t2"), "tasks": bank.tasks, "get": lambda: bank.get(3), "cut": lambda: bank.cut(0),
            "get an evicted one": lambda: bank.get(evicted), "events": lambda: list(bank.events()),
            "insert": lambda: bank.insert([_skill(task_id="t2")], 20),
        }  # fmt: skip
        position, size = bank.position, len(bank)
        for _ in range(2):  # nothing of it is remembered
            with pytest.raises(ValueError, match=r"bank\.sqlite: .*damaged.*left as it is"):
                calls[call]()
        assert (bank.position, len(bank)) == (position, size)


def test_events_behind_a_missing_one_are_not_read(tmp_path, whole):
    seen = []
    path = changed(whole, tmp_path / "bank.sqlite", "DELETE FROM event WHERE seq = 3")
    with SkillBank(path, read_only=True) as bank, pytest.raises(ValueError, match="event"):
        seen.extend(event.seq for event in bank.events())
    assert seen == [1, 2]


def test_what_is_whole_of_a_damaged_bank_can_be_read(tmp_path, whole):
    path = changed(whole, tmp_path / "bank.sqlite", "DELETE FROM state WHERE evicted = 0 AND task_id = 't2'")
    with SkillBank(path, read_only=True) as bank, SkillBank(whole[0], read_only=True) as right:
        assert bank.skills("t1") == right.skills("t1") and list(bank.events()) == list(right.events())


def test_a_row_that_should_not_be_there_is_not_written_over(tmp_path, whole):
    n = whole[1]
    path = changed(whole, tmp_path / "bank.sqlite", f"UPDATE skill SET skill_id = {n + 1} WHERE skill_id = 1")
    with SkillBank(path, **SETTINGS) as bank, pytest.raises(ValueError, match=r"bank\.sqlite"):
        bank.insert([replace(bank.skills("t1")[0], golden_workflow="new")], 20)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute(f"SELECT golden_workflow FROM skill WHERE skill_id = {n + 1}").fetchone() != ("new",)


def test_a_schema_that_is_no_text(tmp_path, whole):
    """SQLite repeats the bytes in its message, which Python then cannot read."""
    path = tmp_path / "bank.sqlite"
    path.write_bytes(whole[0].read_bytes().replace(b"PRIMARY KEY CHECK", b"PRIMARY K\xf7Y CHECK"))
    for read_only in (True, False):
        with pytest.raises(ValueError, match=r"bank\.sqlite: the file is damaged"):
            SkillBank(path, **SETTINGS, read_only=read_only)
