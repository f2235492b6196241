"""The bank's SQLite file: made whole or not at all, checked before it is opened for writing, never repaired or overwritten."""

from __future__ import annotations

import os
import sqlite3
import struct
from pathlib import Path
from typing import cast, get_args

from skillsd.skills.ledger import Booking, Event
from skillsd.skills.skill import FIELDS, Skill

APPLICATION_ID = 0x534B5344  # "SKSD"
SCHEMA_VERSION = 1
LOCK_WAIT_S = 10.0

_SKILL_COLUMNS = ("skill_id", "task_id", *FIELDS, "source_iteration", "source_member", "source_reward", "source_completion")
_EVENT_COLUMNS = ("seq", "iteration", "kind", "skill_id", "reward", "gap")
_SCHEMA = f"""
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE skill (
    skill_id INTEGER PRIMARY KEY, task_id TEXT NOT NULL,
    success_analysis TEXT NOT NULL, mistake_analysis TEXT NOT NULL, golden_workflow TEXT NOT NULL,
    source_iteration INTEGER NOT NULL, source_member INTEGER NOT NULL, source_reward REAL NOT NULL, source_completion REAL NOT NULL);
CREATE TABLE event (
    seq INTEGER PRIMARY KEY, iteration INTEGER NOT NULL, kind TEXT NOT NULL, skill_id INTEGER NOT NULL, reward REAL, gap REAL);
CREATE INDEX event_iteration ON event (iteration);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
_TRANSIENT = {5, 6, 8, 10, 13, 14}  # busy, locked, read-only, input/output, full, cannot open: the world's fault, not the file's
_CONSTRAINT = 19


def refused(path: Path, why: str) -> ValueError:
    """The error for a file that is not a usable bank."""
    return ValueError(f"{path}: {why}. It was left as it is: move it away, restore a good copy, or choose another path for the bank")


def translated(error: sqlite3.Error, path: Path | None) -> Exception:
    """An OSError for what the disk or another process did, a ValueError for what is wrong with the file."""
    code = getattr(error, "sqlite_errorcode", 10) & 0xFF
    where = path or Path(":memory:")
    if code in _TRANSIENT:
        return OSError(f"{where}: {error}. Free the disk, or end the other process that holds the bank, and resume")
    if code == _CONSTRAINT:
        return OSError(f"{where}: another process has written to the bank since it was opened. One run, one bank: choose another path")
    return refused(where, f"SQLite cannot read it as a skill bank ({error})")


def connect(path: Path | None, booking: Booking, read_only: bool) -> sqlite3.Connection:
    """Opens the bank, making it if there is none. The caller finds `booking` stored in a new file only.

    Raises:
        ValueError: The file is not a bank, is damaged or has another schema version.
        FileNotFoundError: `read_only` and no file.
        OSError: The file cannot be opened or is locked.
    """
    if path is None:
        db = sqlite3.connect(":memory:", isolation_level=None)
        _fill(db, booking)
        return db
    if not path.exists():
        if read_only:
            raise FileNotFoundError(f"{path}: no skill bank here")
        _create(path, booking)
    _check_header(path)
    try:
        reader = _reader(path)
        try:
            if (problem := reader.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise refused(path, f"the file is damaged ({' '.join(problem.split())})")
        except BaseException:
            reader.close()
            raise
        if read_only:
            return reader
        reader.close()
        db = sqlite3.connect(path, timeout=LOCK_WAIT_S, isolation_level=None)
        db.execute("PRAGMA synchronous = NORMAL")  # with WAL: a killed process loses nothing, a power cut at most the last commits
        return db
    except sqlite3.Error as error:
        raise translated(error, path) from error


def read(db: sqlite3.Connection) -> tuple[Booking, list[Event], dict[int, Skill]]:
    """The stored booking, the log in order and the skills by id. Lets sqlite3.Error and ValueError through."""
    db.execute("BEGIN")  # one snapshot for all three
    try:
        row = db.execute("SELECT value FROM setting WHERE name = 'booking'").fetchone()
        if row is None or row[0] not in get_args(Booking):
            raise ValueError("the booking setting is missing or unknown")
        events = [Event(*values) for values in db.execute(f"SELECT {', '.join(_EVENT_COLUMNS)} FROM event ORDER BY seq")]
        skills = {
            values[0]: Skill(**dict(zip(_SKILL_COLUMNS, values, strict=True)))
            for values in db.execute(f"SELECT {', '.join(_SKILL_COLUMNS)} FROM skill")
        }
    finally:
        db.execute("ROLLBACK")
    return cast(Booking, row[0]), events, skills


def append(db: sqlite3.Connection, events: list[Event], skills: list[Skill]) -> None:
    """Writes events and the skills they insert, inside the caller's transaction."""
    db.executemany(_insert("skill", _SKILL_COLUMNS), [[getattr(skill, name) for name in _SKILL_COLUMNS] for skill in skills])
    db.executemany(_insert("event", _EVENT_COLUMNS), [[getattr(event, name) for name in _EVENT_COLUMNS] for event in events])


def truncate(db: sqlite3.Connection, last_seq: int) -> None:
    """Removes the events after `last_seq` and the skills they inserted, inside the caller's transaction."""
    db.execute("DELETE FROM skill WHERE skill_id IN (SELECT skill_id FROM event WHERE kind = 'insert' AND seq > ?)", (last_seq,))
    db.execute("DELETE FROM event WHERE seq > ?", (last_seq,))


def _insert(table: str, columns: tuple[str, ...]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


def _fill(db: sqlite3.Connection, booking: Booking) -> None:
    db.executescript(_SCHEMA)
    db.execute("INSERT INTO setting VALUES ('booking', ?)", (booking,))


def _sidecar(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _create(path: Path, booking: Booking) -> None:
    # Made aside and moved in place: a file under the bank's name always has a complete header and schema.
    for left in (_sidecar(path, "-wal"), _sidecar(path, "-journal")):
        if left.exists():  # SQLite would replay it into the new file
            raise refused(left, f"it is left over from a bank that is gone ({path.name})")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _sidecar(path, ".new")
    for stale in (new, _sidecar(new, "-journal"), _sidecar(new, "-wal"), _sidecar(new, "-shm")):
        stale.unlink(missing_ok=True)
    try:
        db = sqlite3.connect(new, isolation_level=None)
        try:
            _fill(db, booking)
            db.execute("PRAGMA journal_mode = WAL")
        finally:
            db.close()
    except sqlite3.Error as error:
        raise translated(error, path) from error
    os.replace(new, path)


def _check_header(path: Path) -> None:
    # By hand: opening a foreign database with SQLite could already change it (recovery, checkpoint).
    with path.open("rb") as file:
        head = file.read(100)
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
        raise refused(path, "not a skill bank (no SQLite header)")
    page_size, pages = struct.unpack(">H", head[16:18])[0], struct.unpack(">I", head[28:32])[0]
    version, application = struct.unpack(">I", head[60:64])[0], struct.unpack(">I", head[68:72])[0]
    if application != APPLICATION_ID:
        raise refused(path, "an SQLite file, but not a skill bank")
    if version != SCHEMA_VERSION:
        raise refused(path, f"a skill bank of schema version {version}, and this release reads version {SCHEMA_VERSION}")
    size = path.stat().st_size
    if not _pending(path) and size < pages * (65536 if page_size == 1 else page_size):  # with a WAL, pages may be still to come
        raise refused(path, f"truncated: {size} bytes where {pages} pages of {page_size} are expected")


def _pending(path: Path) -> bool:
    wal = _sidecar(path, "-wal")
    return wal.exists() and wal.stat().st_size > 0


def _reader(path: Path) -> sqlite3.Connection:
    # immutable: no sidecar file is made, so that a bank on a read-only disk can be read.
    mode = "mode=ro" if _sidecar(path, "-wal").exists() else "mode=ro&immutable=1"
    return sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, timeout=LOCK_WAIT_S, isolation_level=None)
