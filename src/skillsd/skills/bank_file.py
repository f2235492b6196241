"""The bank's SQLite file: made whole or not at all, looked at before it is opened for writing, never repaired or overwritten."""

from __future__ import annotations

import os
import sqlite3
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from skillsd.errors import ConfigError
from skillsd.files.durable import sync, temporary
from skillsd.skills.tables import SCHEMA, ValueEstimate, checksum

APPLICATION_ID = 0x534B5344  # "SKSD"
SCHEMA_VERSION = 3
LOCK_WAIT_S = 10.0
WHOLE_CHECK_BYTES = 2**25
"""Up to this size the structure of the whole file is checked when it is opened; of any size, every row is checked when it is read."""

_NETWORK = "some network file systems have no locks for SQLite: if this is one, name a run folder on a local disk"
_ADVICE = {
    sqlite3.SQLITE_PERM: "see whether this user may read and write there",
    sqlite3.SQLITE_READONLY: "see whether this user may write there, and whether the file system is mounted read-only",
    sqlite3.SQLITE_CANTOPEN: "see whether the folder is there and this user may write in it",
    sqlite3.SQLITE_BUSY: "another process may hold the bank: end it and resume",
    sqlite3.SQLITE_LOCKED: "another process may hold the bank: end it and resume",
    sqlite3.SQLITE_FULL: "make room, and resume",
    sqlite3.SQLITE_IOERR: "see whether the disk is full or fails",
    sqlite3.SQLITE_PROTOCOL: "see whether another process holds the bank",
    sqlite3.SQLITE_NOLFS: "see whether the file system takes files of this size",
}
"""What may help where the disk, the rights or another process are the reason, and not the content of the file."""


class BankFile:
    """A connection to a bank: rows are checked when they are read, and every error names the file.

    Args:
        db: A connection that begins no transaction by itself.
        path: Its file; None: in memory.
        read_only: Nothing will be written. The connection is in a transaction, so all that it reads is of one moment.

    Raises:
        OSError: By every method: the disk, the rights or another process do not allow it.
        ValueError: By every method: the file is damaged.
        RuntimeError: By every method: the file is closed, or another thread opened it.
    """

    def __init__(self, db: sqlite3.Connection, path: Path | None, read_only: bool = False) -> None:
        self._db, self._path, self._name, self._read_only = db, path, path or Path(":memory:"), read_only
        self._identity = _identity(path)

    def rows(self, table: str, rest: str = "", values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """Rows without their checksums; `rest` is what follows the table's name in a SELECT."""
        with _named(self._name):
            for row in self._db.execute(f"SELECT * FROM {table} {rest}", values):
                if checksum(row[:-1]) != row[-1]:
                    raise self.damaged(f"a row of its table {table!r} is not what was written")
                yield row[:-1]

    def row(self, table: str, rest: str = "", values: Sequence[Any] = ()) -> tuple[Any, ...]:
        """The only one of them, which must be there."""
        found = list(self.rows(table, rest, values))
        if len(found) != 1:
            raise self.damaged(f"a row of its table {table!r} is missing")
        return found[0]

    def write(self, verb: Literal["INSERT", "REPLACE"], table: str, row: tuple[Any, ...]) -> None:
        """Writes a row; with REPLACE also over the one of the same key."""
        with _named(self._name):
            self._db.execute(f"{verb} INTO {table} VALUES ({', '.join('?' * len(row))}, ?)", (*row, checksum(row)))

    def delete(self, table: str, condition: str, values: Sequence[Any]) -> None:
        """Removes rows."""
        with _named(self._name):
            self._db.execute(f"DELETE FROM {table} WHERE {condition}", values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is written inside, or nothing."""
        if self._read_only:
            raise OSError(f"{self._name}: the bank was opened read-only")
        with _named(self._name):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def damaged(self, why: str) -> Exception:
        """The error for rows that are not those that were written."""
        return refused(self._name, f"the file is damaged ({why})")

    def sync(self) -> None:
        """Flushes what was written to the disk. Raises OSError, also if the file is gone."""
        if self._path is None:
            return
        if _identity(self._path) != self._identity:
            raise OSError(f"{self._path}: the bank was removed or replaced while it was written to: put it back")
        for path in (self._path, _beside(self._path, "-wal")):
            if path.exists():
                sync(path)

    def close(self) -> None:
        """Moves what stands in the log beside the file into it, and closes it. May be called twice.

        Raises:
            OSError: The disk is full or broken. Nothing is lost: what could not be moved stays in the log.
        """
        try:
            if not self._read_only:
                with _named(self._name), suppress(sqlite3.ProgrammingError):  # it is closed already
                    self._db.execute("PRAGMA wal_checkpoint")  # closing does that too, but reports no error
        finally:
            self._db.close()

    def overtaken(self) -> Exception:
        """The error for a bank with two writers."""
        return OSError(f"{self._name}: another process has written to the bank since it was opened. One run, one bank: choose another path")


# -- opening -----------------------------------------------------------------------------------------------------------------------


def open_file(path: Path | None, value_estimate: ValueEstimate, read_only: bool) -> BankFile:
    """Opens a bank; makes it first if there is none, unless it is only read.

    Read only, it changes nothing in the folder, and what it shows stays as it is now, whatever a writer does. For writing, it is looked at
    in that way first.

    Raises:
        ValueError: The file is no bank, of another schema version, or damaged.
        OSError: It cannot be opened, made or locked.
    """
    if path is None:
        return _filled(sqlite3.connect(":memory:", isolation_level=None), value_estimate)
    if not read_only and not path.exists():
        _create(path, value_estimate)
    _check_header(path)
    with _named(path), ExitStack() as opened:
        db = opened.enter_context(closing(_connect_to_read(path)))
        db.execute("BEGIN")
        if {sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")} != set(SCHEMA):
            # Triggers and views among them could have our own statements run others.
            raise refused(path, "the file is damaged (its tables are not those of a skill bank)")
        if path.stat().st_size <= WHOLE_CHECK_BYTES and (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise refused(path, f"the file is damaged ({' '.join(found.split())})")
        if read_only:
            opened.pop_all()
            return BankFile(db, path, read_only)
    with _named(path):
        db = sqlite3.connect(path, timeout=LOCK_WAIT_S, isolation_level=None)
        db.execute("PRAGMA synchronous = NORMAL")  # with WAL: a killed process loses nothing, a power cut at most the last commits
        return BankFile(db, path)


def _create(path: Path, value_estimate: ValueEstimate) -> None:
    """Makes an empty bank under another name, and renames it: a file of the bank's name always has a whole header and schema."""
    for left in (_beside(path, "-wal"), _beside(path, "-journal")):
        if left.exists():  # SQLite would replay it into the new file
            raise refused(left, f"it is left over from a bank that is gone ({path.name})")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = temporary(path)
    try:
        with _named(path), closing(sqlite3.connect(new, isolation_level=None)) as db:
            _filled(db, value_estimate)
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":  # SQLite gives no other sign of an error
                raise OSError(f"{path}: SQLite's write-ahead log cannot be made there: see whether there is room; {_NETWORK}")
        os.replace(new, path)
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            with suppress(OSError):
                _beside(new, suffix).unlink(missing_ok=True)
    sync(path.parent)


def refused(path: Path, why: str) -> ConfigError:
    """The error for a file that is not a usable bank."""
    return ConfigError(f"{path}: {why}. It was left as it is: move it away, restore a good copy, or choose another path for the bank")


def translated(error: sqlite3.Error | UnicodeDecodeError, path: Path) -> Exception:
    """An OSError for what the disk or another process did, a ValueError for what is wrong with the file, a RuntimeError for a connection
    that is closed or used in another thread."""
    if isinstance(error, sqlite3.ProgrammingError):
        return RuntimeError(f"{path}: {error}")
    if isinstance(error, UnicodeDecodeError) or "Could not decode" in str(error):  # in a message of SQLite's, or in a row
        return refused(path, f"the file is damaged ({' '.join(str(error).split())})")
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_IOERR) & 0xFF
    if code in _ADVICE:
        return OSError(f"{path}: {error}: {_ADVICE[code]}; {_NETWORK}")
    return refused(path, f"SQLite cannot read it as a skill bank ({error})")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise translated(error, path) from error


def _identity(path: Path | None) -> tuple[int, int] | None:
    """Which file is there; None if none is."""
    if path is None or not path.exists():
        return None
    return path.stat().st_dev, path.stat().st_ino


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _filled(db: sqlite3.Connection, value_estimate: ValueEstimate) -> BankFile:
    for statement in SCHEMA:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    file = BankFile(db, None)
    file.write("INSERT", "head", (1, value_estimate, 0))
    return file


def _check_header(path: Path) -> None:
    # By hand: SQLite could change a database of somebody else's by opening it (recovery, checkpoint).
    with path.open("rb") as file:
        head = file.read(100)
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
        raise refused(path, "not a skill bank (no SQLite header)")
    version, application = struct.unpack(">I4xI", head[60:72])
    if application != APPLICATION_ID:
        raise refused(path, "an SQLite file, but not a skill bank")
    if version != SCHEMA_VERSION:
        raise refused(path, f"a skill bank of schema version {version}, and this release reads version {SCHEMA_VERSION}")


def _connect_to_read(path: Path) -> sqlite3.Connection:
    wal = _beside(path, "-wal")
    for pause in (0.01, 0.1, None):
        if wal.exists():
            mode = "mode=ro"  # not rw: the last to close would write what a killed run has left there into the file
        elif os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
            mode = "mode=rw"  # only this makes the files in which a reader is known to a writer, and removes them
        else:
            mode = "mode=ro&immutable=1"  # a read-only disk
        db = sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, timeout=LOCK_WAIT_S, isolation_level=None)
        try:
            db.execute("PRAGMA query_only = ON")
            db.execute("SELECT count(*) FROM sqlite_master")
            return db
        except sqlite3.OperationalError as error:
            db.close()
            if pause is None or error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CANTOPEN:
                raise
            time.sleep(pause)  # a writer has just closed, and removed the files beside it
    raise AssertionError("unreachable")
