"""The bank's SQLite file: made whole or not at all, checked before it is opened for writing, never repaired or overwritten."""

from __future__ import annotations

import os
import sqlite3
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import cast, get_args

from skillsd.errors import ConfigError
from skillsd.files.durable import sync, temporary
from skillsd.skills.ledger import Ledger
from skillsd.skills.tables import SCHEMA, TALLY, Booking, Damaged

APPLICATION_ID = 0x534B5344  # "SKSD"
SCHEMA_VERSION = 2
LOCK_WAIT_S = 10.0
WHOLE_CHECK_BYTES = 2**25
"""Up to this size a file is checked as a whole when it is opened; of any size, every row is checked when it is read."""

_LOCAL = "some network file systems have no locks for SQLite: if this is one, name a run folder on a local disk"
_ADVICE = {
    3: "see whether this user may write there",
    5: f"another process may hold the bank: end it and resume; {_LOCAL}",
    6: f"another process may hold the bank: end it and resume; {_LOCAL}",
    8: "see whether this user may write there, and whether the file system is mounted read-only",
    10: f"see whether the disk is full or fails; {_LOCAL}",
    13: "make room, and resume",
    14: f"see whether the folder is there and this user may write in it; {_LOCAL}",
    15: _LOCAL,
    22: _LOCAL,
    7: "see whether there is memory",
    9: "it was interrupted",
}
"""SQLite's result codes for what is the world's fault and not the file's, and what may help."""


def refused(path: Path, why: str) -> ConfigError:
    """The error for a file that is not a usable bank."""
    return ConfigError(f"{path}: {why}. It was left as it is: move it away, restore a good copy, or choose another path for the bank")


def translated(error: sqlite3.Error | UnicodeDecodeError, path: Path | None) -> Exception:
    """An OSError for what the disk or another process did, a ValueError for what is wrong with the file, a RuntimeError for a bank that is
    closed or used in another thread."""
    where = path or Path(":memory:")
    if isinstance(error, sqlite3.ProgrammingError):
        return RuntimeError(f"{where}: {error}")
    if isinstance(error, UnicodeDecodeError) or "Could not decode" in str(error):  # in a message of SQLite's, or in a row
        return refused(where, f"the file is damaged ({' '.join(str(error).split())})")
    code = getattr(error, "sqlite_errorcode", 10) & 0xFF
    if code in _ADVICE:
        return OSError(f"{where}: {error}: {_ADVICE[code]}")
    return refused(where, f"SQLite cannot read it as a skill bank ({error})")


def overtaken(path: Path | None) -> OSError:
    """The error for a bank with two writers."""
    return OSError(f"{path}: another process has written to the bank since it was opened. One run, one bank: choose another path")


def identity(path: Path) -> tuple[int, int] | None:
    """Which file is there; None if none is."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def connect(path: Path | None, booking: Booking, read_only: bool) -> Ledger:
    """Opens the bank, making it if there is none.

    Raises:
        ValueError: The file is not a bank, is damaged, has another schema version, or is opened for writing with another booking.
        FileNotFoundError: `read_only` and no file.
        OSError: The file cannot be opened or is locked.
    """
    if path is None:
        db = sqlite3.connect(":memory:", isolation_level=None)
        _fill(db, booking)
        return Ledger(db, booking)
    if not path.exists():
        if read_only:
            raise FileNotFoundError(f"{path}: no skill bank here")
        _create(path, booking)
    _check_header(path)
    try:
        reader = _reader(path)
        try:
            ledger = _checked(reader, path)
            if read_only:
                return ledger
        except BaseException:
            reader.close()
            raise
        ledger.close()
        if ledger.booking != booking:
            raise ValueError(
                f"{path}: its mean rewards are booked as {ledger.booking!r}, not {booking!r}: "
                f"set booking to {ledger.booking!r} or choose another path"
            )
        db = sqlite3.connect(path, timeout=LOCK_WAIT_S, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous = NORMAL")  # with WAL: a killed process loses nothing, a power cut at most the last commits
            return Ledger(db, booking)
        except BaseException:
            db.close()
            raise
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise translated(error, path) from error
    except Damaged as error:
        raise refused(path, f"the file is damaged ({error})") from error


def _checked(reader: sqlite3.Connection, path: Path) -> Ledger:
    """The bank as `reader` sees it from now on."""
    reader.execute("BEGIN")  # what it sees is settled by its first look
    found = reader.execute("SELECT type, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchall()
    if {kind for kind, _ in found} - {"table", "index"}:  # whoever made the file could have our own statements run others
        raise Damaged("it has triggers or views")
    if {sql for _, sql in found} != set(SCHEMA):
        raise Damaged("its tables are not those of a skill bank")
    whole = path.stat().st_size <= WHOLE_CHECK_BYTES
    if whole and (problem := reader.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise Damaged(" ".join(problem.split()))
    ledger = Ledger(reader, _booking(reader))
    ledger.verify(every_row_counted=whole)
    return ledger


def _booking(db: sqlite3.Connection) -> Booking:
    row = db.execute("SELECT value FROM setting WHERE name = 'booking'").fetchone()
    if row is None or row[0] not in get_args(Booking):
        raise Damaged("the booking setting is missing or unknown")
    return cast(Booking, row[0])


def _fill(db: sqlite3.Connection, booking: Booking) -> None:
    _make_tables(db, booking)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _make_tables(db: sqlite3.Connection, booking: Booking) -> None:
    for statement in SCHEMA:
        db.execute(statement)
    db.execute("INSERT INTO setting VALUES ('booking', ?)", (booking,))
    nothing = (1, *[0] * 9)
    db.execute(TALLY.insert, (*nothing, TALLY.crc(nothing)))


def _sidecar(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _create(path: Path, booking: Booking) -> None:
    # Made aside and moved in place: a file under the bank's name always has a complete header and schema.
    for left in (_sidecar(path, "-wal"), _sidecar(path, "-journal")):
        if left.exists():  # SQLite would replay it into the new file
            raise refused(left, f"it is left over from a bank that is gone ({path.name})")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = temporary(path)
    try:
        _make(new, path, booking)
        os.replace(new, path)
    finally:
        for end in ("", "-journal", "-wal", "-shm"):
            with suppress(OSError):
                _sidecar(new, end).unlink(missing_ok=True)
    sync(path.parent)


def _make(new: Path, path: Path, booking: Booking) -> None:
    try:
        db = sqlite3.connect(new, isolation_level=None)
        try:
            _fill(db, booking)
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":  # it gives no other sign of an error
                raise OSError(f"{path}: SQLite's write-ahead log cannot be made there: see whether there is room; {_LOCAL}")
        finally:
            db.close()
    except sqlite3.Error as error:
        raise translated(error, path) from error


def _check_header(path: Path) -> None:
    # By hand: opening a foreign database with SQLite could already change it (recovery, checkpoint).
    with path.open("rb") as file:
        head = file.read(100)
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
        raise refused(path, "not a skill bank (no SQLite header)")
    page_size, pages = struct.unpack(">H", head[16:18])[0], struct.unpack(">I", head[28:32])[0]
    page_size = 65536 if page_size == 1 else page_size
    version, application = struct.unpack(">I", head[60:64])[0], struct.unpack(">I", head[68:72])[0]
    if application != APPLICATION_ID:
        raise refused(path, "an SQLite file, but not a skill bank")
    if version != SCHEMA_VERSION:
        raise refused(path, f"a skill bank of schema version {version}, and this release reads version {SCHEMA_VERSION}")
    size = path.stat().st_size
    if not _pending(path) and size < pages * page_size:  # with a WAL, pages may be still to come
        raise refused(path, f"truncated: {size} bytes where {pages} pages of {page_size} are expected")


def _pending(path: Path) -> bool:
    wal = _sidecar(path, "-wal")
    return wal.exists() and wal.stat().st_size > 0


def _reader(path: Path) -> sqlite3.Connection:
    """A connection that writes nothing, and that a writer who comes later does not pull the rug from under."""
    wal = _sidecar(path, "-wal")
    for patience in (0.01, 0.1, 0.0):
        if wal.exists():
            mode = "mode=ro"  # not rw: the last to close would write what a killed run has left there into the file
        elif os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
            mode = "mode=rw"  # only this makes the sidecar files in which a reader is known to a writer, and unmakes them
        else:
            mode = "mode=ro&immutable=1"  # a read-only disk
        db = sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, timeout=LOCK_WAIT_S, isolation_level=None)
        try:
            db.execute("PRAGMA query_only = ON")
            db.execute("SELECT count(*) FROM sqlite_master")
            return db
        except sqlite3.OperationalError as error:
            db.close()
            if not patience or error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CANTOPEN:
                raise
            time.sleep(patience)  # a writer has just closed, and taken its sidecar files along
    raise AssertionError("unreachable")
