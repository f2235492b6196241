import gc
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import tracemalloc
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from skillsd.errors import ConfigError
from skillsd.skills import SkillBank, bank_file

SRC = Path(bank_file.__file__).parents[2]


def filled(path, make_skill, n=60):
    with SkillBank(path, capacity=None) as bank:
        bank.insert([make_skill(f"skill {i} " * 20) for i in range(n)], 0)
    return path


def connection(bank):
    """To do to a bank what no method does."""
    return bank._ledger.file._db


def test_floats_are_stored_exactly(tmp_path, make_skill):
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0]
    with SkillBank(tmp_path / "new" / "bank.sqlite", value_estimate="gap", capacity=None) as bank:
        bank.insert([make_skill(str(i), reward=value) for i, value in enumerate(values)], 0)
        for i, value in enumerate(values, 1):
            bank.record_use(i, 0, gap=value)
        before = [repr(bank.get(i)) for i in range(1, 6)]
    with SkillBank(tmp_path / "new" / "bank.sqlite", value_estimate="gap") as bank:
        assert [repr(bank.get(i)) for i in range(1, 6)] == before
        assert [bank.get(i).source_reward for i in range(1, 6)] == values


def test_read_only_beside_the_writer(tmp_path, make_skill):
    path = tmp_path / "bank.sqlite"
    with pytest.raises(FileNotFoundError):
        SkillBank(path, read_only=True)
    with SkillBank(path, value_estimate="next_visit") as bank:
        bank.insert([make_skill("a")], 0)
        with SkillBank(path, read_only=True) as view:
            assert view.get(1) == bank.get(1) and view.value_estimate == "next_visit"
            with pytest.raises(OSError, match=r"bank\.sqlite"):
                view.insert([make_skill("b")], 0)
            assert len(view) == 1
    with SkillBank(path, read_only=True) as view:
        assert len(view) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bank.sqlite"]


def test_another_value_estimate_is_refused(tmp_path, make_skill):
    path = filled(tmp_path / "bank.sqlite", make_skill)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'source', not 'gap'"):
        SkillBank(path, value_estimate="gap")
    assert path.read_bytes() == before


def random_bytes(path, make_skill):
    path.write_bytes(os.urandom(5000))


def empty(path, make_skill):
    path.write_bytes(b"")


def other_sqlite(path, make_skill):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE skill (x)")
    db.close()


def truncated(path, make_skill):
    data = filled(path, make_skill).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damaged(path, make_skill):
    data = bytearray(filled(path, make_skill).read_bytes())
    data[4096 : 4096 * 4] = os.urandom(4096 * 3)
    path.write_bytes(data)


def lost_pages(path, make_skill):
    """What no row shows."""
    data = bytearray(filled(path, make_skill).read_bytes())
    data[39] = 7  # the header's count of free pages
    path.write_bytes(data)


@pytest.mark.parametrize("make", [random_bytes, empty, other_sqlite, truncated, damaged, lost_pages])
@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_no_bank_is_refused_and_left_alone(tmp_path, make_skill, make, read_only):
    path = tmp_path / "bank.sqlite"
    make(path, make_skill)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"bank\.sqlite: .*left as it is"):
        SkillBank(path, read_only=read_only)
    assert path.read_bytes() == before


@pytest.mark.parametrize("code", [3, 5, 6, 8, 10, 11, 13, 14, 15, 22, 26])
def test_the_disk_s_fault_or_the_file_s(code):
    """SQLite's result codes: a file is said to be bad only where SQLite says so, and never by what locks and disks do."""
    error = sqlite3.OperationalError("why")
    error.sqlite_errorcode = code | 3 << 8  # an extended one
    found = bank_file.translated(error, Path("b.sqlite"))
    assert type(found) is (ConfigError if code in (11, 26) else OSError) and str(found).startswith("b.sqlite: ")
    assert type(bank_file.translated(sqlite3.OperationalError("without a code"), Path("b.sqlite"))) is OSError
    assert type(bank_file.translated(sqlite3.OperationalError("Could not decode x"), Path("b.sqlite"))) is ConfigError


def test_sync_flushes_the_file_and_its_wal(tmp_path, make_skill, monkeypatch):
    flushed = []
    monkeypatch.setattr(bank_file, "sync", lambda path: flushed.append(path.name))
    with SkillBank(tmp_path / "bank.sqlite") as bank:
        assert connection(bank).execute("PRAGMA synchronous").fetchone() == (1,)  # NORMAL: SQLite leaves it to `sync`
        bank.insert([make_skill("a")], 0)
        flushed.clear()
        bank.sync()
        assert flushed == ["bank.sqlite", "bank.sqlite-wal"]
        connection(bank).execute("PRAGMA journal_mode = DELETE")
        bank.sync()
    assert flushed[2:] == ["bank.sqlite"]


def test_what_a_reader_may_not_do(tmp_path, make_skill):
    filled(tmp_path / "bank.sqlite", make_skill)
    with SkillBank(tmp_path / "bank.sqlite", read_only=True) as view:
        assert view.cut(99) == 0 and view.insert([], 99) == []  # nothing to do
        with pytest.raises(OSError, match=r"bank\.sqlite: the bank was opened read-only"):
            view.insert([make_skill("x")], 99)


@pytest.mark.parametrize("left", ["bank.sqlite-wal", "bank.sqlite-journal"])
def test_what_is_left_of_another_bank_is_not_played_into_a_new_one(tmp_path, left):
    (tmp_path / left).write_bytes(b"old")
    with pytest.raises(ValueError, match=f"{left}: it is left over"):
        SkillBank(tmp_path / "bank.sqlite")
    assert [file.name for file in tmp_path.iterdir()] == [left]


def test_a_bank_is_made_aside_under_a_name_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "bank.sqlite.new").write_bytes(b"precious")
    there, replace = [], os.replace
    monkeypatch.setattr(bank_file.os, "replace", lambda old, new: (there.append(len(list(tmp_path.iterdir()))), replace(old, new)))
    SkillBank(tmp_path / "bank.sqlite").close()
    assert there == [2]  # all of the new one is in it before it gets its name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bank.sqlite", "bank.sqlite.new"]


def test_a_new_bank_is_flushed_into_its_folder(tmp_path, monkeypatch):
    path, flushed = tmp_path / "new" / "er" / "bank.sqlite", []
    monkeypatch.setattr(bank_file, "sync", lambda folder: flushed.append((folder, path.exists())))
    for _ in range(2):
        SkillBank(path).close()
    assert flushed == [(path.parent, True)]


@pytest.fixture
def killed(tmp_path, make_skill):
    """What a run leaves that is killed while SQLite moves pages from the WAL into the file: the header is there, the last pages are not."""
    folder = tmp_path / "killed"
    folder.mkdir()
    with SkillBank(tmp_path / "bank.sqlite", capacity=None) as bank:
        size = bank.path.stat().st_size
        bank.insert([make_skill(f"skill {i} " * 20) for i in range(60)], 0)
        connection(bank).execute("PRAGMA wal_checkpoint(PASSIVE)")
        for name in ("bank.sqlite", "bank.sqlite-wal"):
            (folder / name).write_bytes(tmp_path.joinpath(name).read_bytes())
        before = seen(bank)
    os.truncate(folder / "bank.sqlite", size)
    return folder / "bank.sqlite", before


def test_a_reader_leaves_a_killed_run_as_it_is(killed):
    path, content = killed
    files = {name: path.with_name(name).read_bytes() for name in ("bank.sqlite", "bank.sqlite-wal")}
    for _ in range(2):
        with SkillBank(path, read_only=True) as view:
            assert seen(view) == content
        assert {name: path.with_name(name).read_bytes() for name in files} == files
    with SkillBank(path, capacity=None) as bank:
        assert seen(bank) == content


def test_pages_that_only_a_lost_wal_had_are_missed(killed):
    path, _ = killed
    path.with_name("bank.sqlite-wal").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bank\.sqlite"):
        SkillBank(path, read_only=True)


def test_a_reader_can_write_nothing(tmp_path, make_skill):
    view = SkillBank(filled(tmp_path / "bank.sqlite", make_skill, 3), read_only=True)
    with view, pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection(view).execute("DELETE FROM skill")


@pytest.mark.parametrize("refused", [None, "bank.sqlite", "disk"])
def test_a_reader_is_known_to_writers_unless_the_disk_is_read_only(tmp_path, make_skill, monkeypatch, refused):
    path = tmp_path / "disk" / "bank.sqlite"
    filled(path, make_skill, 3)
    monkeypatch.setattr(bank_file.os, "access", lambda at, mode: mode == os.W_OK and Path(at).name != refused)
    with SkillBank(path, read_only=True) as view:
        assert len(view) == 3
        assert path.with_name("bank.sqlite-shm").exists() is (refused is None)


def test_a_writer_that_closes_while_a_reader_opens(tmp_path, make_skill, monkeypatch):
    """The WAL was there when the reader looked, and is gone when SQLite does."""
    writer = SkillBank(tmp_path / "bank.sqlite")
    writer.insert([make_skill("a")], 0)
    connect = sqlite3.connect

    def late(*args, **kwargs):
        writer.close()
        return connect(*args, **kwargs)

    monkeypatch.setattr(bank_file.sqlite3, "connect", late)
    with SkillBank(writer.path, read_only=True) as view:
        assert len(view) == 1


@pytest.mark.parametrize(("code", "waits"), [(sqlite3.SQLITE_CANTOPEN, [0.01, 0.1]), (sqlite3.SQLITE_BUSY, [])])
def test_a_reader_tries_three_times_what_may_go_away(tmp_path, make_skill, monkeypatch, code, waits):
    class Connection(sqlite3.Connection):
        def execute(self, sql, *args):
            if "sqlite_master" not in sql:
                return super().execute(sql, *args)
            error = sqlite3.OperationalError("no answer")
            error.sqlite_errorcode = code | 2 << 8  # an extended one
            raise error

    path, waited = filled(tmp_path / "bank.sqlite", make_skill, 1), []
    monkeypatch.setattr(bank_file.sqlite3, "connect", partial(sqlite3.connect, factory=Connection))
    monkeypatch.setattr(bank_file.time, "sleep", waited.append)
    with pytest.raises(OSError, match=r"bank\.sqlite: no answer"):
        SkillBank(path, read_only=True)
    assert waited == waits


def test_a_full_disk_is_an_os_error_and_the_bank_goes_on(tmp_path, make_skill):
    path = tmp_path / "bank.sqlite"
    with SkillBank(path) as bank:
        bank.insert([make_skill("a")], 0)
        connection(bank).execute("PRAGMA max_page_count = 8")
        with pytest.raises(OSError, match=r"bank\.sqlite.*full"):
            bank.insert([make_skill("long " * 20_000)], 1)
        assert bank.position == 1 and len(bank) == 1
        assert bank.insert([make_skill("b")], 0) == [2]


@contextmanager
def files_of(size):
    """No file of this process may have more bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_bank_that_cannot_be_closed_loses_nothing(tmp_path, make_skill):
    path = tmp_path / "bank.sqlite"
    bank = SkillBank(path, capacity=None)
    bank.insert([make_skill(f"skill {i} " * 20) for i in range(60)], 0)
    with pytest.raises(OSError, match=r"bank\.sqlite: "), files_of(path.stat().st_size):
        bank.close()
    bank.close()
    with SkillBank(path) as again:
        assert len(again) == 60
    assert not path.with_name("bank.sqlite-wal").exists()


def test_the_end_of_a_block_raises_what_the_closing_does(tmp_path, make_skill):
    bank = SkillBank(tmp_path / "bank.sqlite", capacity=None)
    bank.insert([make_skill(f"skill {i} " * 20) for i in range(60)], 0)
    with pytest.raises(OSError, match=r"bank\.sqlite: "), files_of(bank.path.stat().st_size), bank:
        pass


def test_an_error_in_the_block_is_raised_rather_than_that_of_closing(tmp_path, make_skill):
    bank = SkillBank(tmp_path / "bank.sqlite", capacity=None)
    bank.insert([make_skill(f"skill {i} " * 20) for i in range(60)], 0)
    with pytest.raises(RuntimeError, match="the first"), files_of(bank.path.stat().st_size), bank:
        raise RuntimeError("the first")


def test_a_closed_bank_says_so(tmp_path):
    bank = SkillBank(tmp_path / "bank.sqlite")
    bank.close()
    with pytest.raises(RuntimeError, match=r"bank\.sqlite: .*closed"):
        bank.skills("t1")


def test_a_bank_without_a_wal_is_not_made(tmp_path, monkeypatch):
    class Connection(sqlite3.Connection):
        def execute(self, sql, *args):  # what SQLite answers if it could not change the mode
            return super().execute("PRAGMA journal_mode" if sql == "PRAGMA journal_mode = WAL" else sql, *args)

    monkeypatch.setattr(bank_file.sqlite3, "connect", partial(sqlite3.connect, factory=Connection))
    with pytest.raises(OSError, match="write-ahead log"):
        SkillBank(tmp_path / "bank.sqlite")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    SkillBank(tmp_path / "bank.sqlite").close()


def test_a_bank_that_cannot_be_filled_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr(bank_file, "SCHEMA", ["no statement"])
    with pytest.raises(ValueError, match=r"bank\.sqlite"):
        SkillBank(tmp_path / "bank.sqlite")
    assert not (tmp_path / "bank.sqlite").exists()


def test_a_second_writer_is_refused(tmp_path, make_skill, monkeypatch):
    monkeypatch.setattr(bank_file, "LOCK_WAIT_S", 0.05)
    path = tmp_path / "bank.sqlite"
    with SkillBank(path) as bank, SkillBank(path) as other:
        connection(other).execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match=r"bank\.sqlite.*locked"):
            bank.insert([make_skill("a")], 0)
        connection(other).execute("ROLLBACK")
        bank.insert([make_skill("a")], 0)
        with pytest.raises(OSError, match="another process has written"):
            other.insert([make_skill("b")], 0)
        with pytest.raises(OSError, match="another process has written"):
            other.tasks()  # not damage: its last event is of a moment ago


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("lines", [1, 15, 40])
def test_a_killed_writer_leaves_whole_transactions(tmp_path, lines):
    path = tmp_path / "bank.sqlite"
    code = f"""
        from skillsd.skills import Skill, SkillBank
        bank = SkillBank({str(path)!r}, capacity=3, eviction="oldest")
        for i in range(10**6):
            bank.insert([Skill(f"{{i}} {{k}} " * 50, "m", "w", "t") for k in range(4)], i)
            print(bank.position, flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(SRC)}
    )
    for _ in range(lines):
        reported = int(child.stdout.readline())
    child.kill()
    child.wait()
    child.stdout.close()
    with SkillBank(path, capacity=3, eviction="oldest") as bank:
        *_, last = bank.events()
        assert bank.position >= reported and bank.position == 5 + 8 * last.iteration and len(bank) == 3
        bank.cut(lines, expect=reported)
        *_, last = bank.events()
        assert last.iteration == lines - 1 and last.skills == 4 * lines


def test_the_bank_loads_neither_torch_nor_lightning():
    code = "import sys, skillsd.skills; assert not {'torch', 'lightning', 'openai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(SRC)})


def seen(bank):
    return repr((bank.position, bank.stats(), [(t, bank.skills(t), bank.retrieve(t)) for t in bank.tasks()]))


def test_readers_keep_what_they_saw(tmp_path, make_skill):
    """One opened before there is a writer, others beside it; their numbers stay those of one moment, whatever is written or cut."""
    path = tmp_path / "bank.sqlite"
    filled(path, make_skill, 3)
    readers, late = [SkillBank(path, read_only=True)], []  # the late ones are asked at the end: nothing is in their memory
    saw = [seen(readers[0])]
    with SkillBank(path, capacity=3) as bank:
        for i in range(1, 40):
            bank.insert([make_skill(f"skill {i} {k} " * 99, f"t{k}", k / 8, i) for k in range(8)], i)
            bank.record_use(i, i)
            if i % 10 == 0:
                for group in (readers, late):
                    group.append(SkillBank(path, read_only=True))
                saw.append(seen(bank))
            if i % 13 == 0:
                bank.cut(i - 2)
            connection(bank).execute("PRAGMA wal_checkpoint(PASSIVE)")
            assert [seen(reader) for reader in readers] == saw
        last = seen(bank)
    assert len(set(saw)) == 4 and [seen(reader) for reader in readers] == saw and [seen(reader) for reader in late] == saw[1:]
    for reader in readers + late:
        reader.close()
    with SkillBank(path, read_only=True) as view:
        assert seen(view) == last
    SkillBank(path).close()  # of what a reader has left, which must not write, a writer makes an end
    assert [file.name for file in tmp_path.iterdir()] == ["bank.sqlite"]


def test_memory_does_not_grow_with_the_bank(tmp_path, make_skill):
    with SkillBank(tmp_path / "bank.sqlite", capacity=None) as bank:

        def grow(iteration):
            for k in range(20):
                bank.insert([make_skill(f"{iteration} {k} {m} " * 40, f"t{k} {m}") for m in range(32)], iteration)
                bank.retrieve(f"t{k} 0")
            gc.collect()  # or the interpreter's own reserve of tuples counts
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            first, *_, last = [grow(iteration) for iteration in range(5)]
            assert len(bank) == 5 * 640 and last - first < 100_000  # their texts alone are 2.5 MB
            tracemalloc.reset_peak()
            assert bank.cut(1) == 4 * 640
            assert tracemalloc.get_traced_memory()[1] - last < 600_000
        finally:
            tracemalloc.stop()
