"""Who owns a run folder: one process at a time writes into it, and what a crash leaves is nobody's.

The lock is the flock of run.lock, which ends with its process. What stands in the file is for the message, and for network file systems
that do not share a flock between hosts: there an owner of another host shows by the file's time that it is alive.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from weakref import WeakSet

from skillsd.errors import ConfigError
from skillsd.files.durable import temporary
from skillsd.files.run_folder import LOCK_FILE

HEARTBEAT_S = 60.0
"""Between two signs of life."""
DEAD_S = 600.0
"""Without one, after which an owner on another host counts as dead."""
_TRIES = 20
_held: WeakSet[RunLock] = WeakSet()


@dataclass(frozen=True)
class Owner:
    """A process, as run.lock names it. `boot` is the same for all processes of one running kernel, containers included."""

    pid: int
    host: str
    boot: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> Owner:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        boot = ""
    return Owner(os.getpid(), socket.gethostname(), boot)


def is_alive(owner: Owner, me: Owner, locked: bool | None, age_s: float, steal: bool) -> bool:
    """Does `owner` still hold the folder?

    Args:
        owner, me: Who left the file, and who asks.
        locked: The flock is another process's; None where the file system has none.
        age_s: Seconds since the last sign of life.
        steal: Owners on other hosts are taken for dead.
    """
    if owner.boot == me.boot and (me.boot or owner.host == me.host):
        return _exists(owner.pid) if locked is None else locked
    if owner.host == me.host and locked is False:
        return False  # it was started again since
    return not steal and age_s < DEAD_S


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def running(folder: Path) -> Owner | None:
    """The process that seems to write into a run folder just now; None if there is none. It takes no lock, so nobody who starts is refused.

    A killed one leaves its file: it counts while a process of its number exists on this host, or while an owner elsewhere gives signs of
    life.
    """
    path, me = folder / LOCK_FILE, this_process()
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        owner, age = _read(fd), time.time() - os.fstat(fd).st_mtime
    finally:
        os.close(fd)
    return owner if owner is not None and is_alive(owner, me, None, age, False) else None


class RunLock:
    """The lock of a run folder, from the constructor to `release`. The folder is made; what was made goes with the lock if it is empty.

    A process that finds another in its place, one that was let in with --steal-lock, say, ends at once: it must not write any more.

    Args:
        folder: The run folder.
        steal: Take an owner on another host for dead.
        key: What named the folder, for messages.

    Raises:
        ConfigError: Another process owns it, or it cannot be a folder that is written to.
    """

    def __init__(self, folder: Path, steal: bool = False, key: str = "trainer.default_root_dir") -> None:
        self.folder, self.key, self.me = folder, key, this_process()
        self.path = folder.absolute() / LOCK_FILE
        self._fd: int | None = None
        self._made: list[Path] = []
        try:
            self._made = [p for p in self.path.parents if not os.path.lexists(p)]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._acquire(steal)
        except (OSError, ValueError) as e:
            self._unmake()
            if isinstance(e, ConfigError):
                raise
            raise ConfigError(
                f"{key}: {str(folder)[:200]} cannot be the run folder ({getattr(e, 'strerror', None) or e}): name one that can be made and "
                "written, not a file or a link to nothing."
            ) from e
        self._over = threading.Event()
        _held.add(self)
        threading.Thread(target=self._heartbeat, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Give it back. Does nothing in a process that was forked, or a second time."""
        _held.discard(self)
        self._over.set()
        fd, self._fd = self._fd, None
        if fd is None:
            return
        with suppress(OSError):
            if _is_at(fd, self.path):
                self.path.unlink()
        os.close(fd)
        self._unmake()

    def forget(self) -> None:
        """In a forked process: it must not keep alive what its parent owns."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _unmake(self) -> None:
        for folder in self._made:
            with suppress(OSError, ValueError):
                folder.rmdir()

    def _acquire(self, steal: bool) -> int:
        for _ in range(_TRIES):  # others may take it, or give it back, at the same time
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if self._take(fd, steal):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        raise ConfigError(self._refusal(None, 0.0))

    def _take(self, fd: int, steal: bool) -> bool:
        """Sign the file if nobody alive has; false if it is not the lock any more."""
        locked = _flock(fd)
        if not _is_at(fd, self.path):
            return False
        owner = _read(fd)
        elsewhere = owner is not None and owner.boot != self.me.boot
        age = self._age(fd) if elsewhere else 0.0
        if is_alive(owner, self.me, locked, age, steal) if owner is not None else bool(locked):
            raise ConfigError(self._refusal(owner, age))
        if elsewhere or locked:
            self.path.unlink()  # a new file takes its place, by which the old owner sees that it has lost it
            return False
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(asdict(self.me)).encode(), 0)
        except OSError:
            self.path.unlink()
            raise
        return True

    def _age(self, fd: int) -> float:
        """Seconds since the file was touched, by the file system's clock: hosts have clocks of their own."""
        probe = temporary(self.path)
        probe.touch()
        try:
            return probe.stat().st_mtime - os.fstat(fd).st_mtime
        finally:
            probe.unlink()

    def _refusal(self, owner: Owner | None, age: float) -> str:
        who = owner or "another process"
        if owner is None or owner.boot == self.me.boot:
            return f"{self.key}: {self.folder} belongs to {who}, which is running: wait for its end, or name another folder."
        return (
            f"{self.key}: {self.folder} belongs to {who}, which was alive {max(0.0, age):.0f} s ago: wait for its end, or name another "
            f"folder. It counts as dead after {DEAD_S / 60:.0f} minutes without a sign of life; if you know that it is, give --steal-lock."
        )

    def _heartbeat(self) -> None:
        while not self._over.wait(HEARTBEAT_S):
            fd = self._fd
            if fd is None:
                return
            try:
                if _is_at(fd, self.path):
                    os.utime(fd)
                    continue
            except FileNotFoundError:  # somebody has removed the file, not the run
                if self._over.is_set():
                    return
                try:
                    self._fd = self._acquire(False)
                    os.close(fd)
                    continue
                except ConfigError:
                    pass
                except OSError:
                    continue
            except OSError:  # a file system that does not answer at present
                continue
            if not self._over.is_set():
                print(f"\nerror: {self.folder} was taken over by another process: this one ends at once.", file=sys.stderr, flush=True)
                os._exit(2)


def _flock(fd: int) -> bool | None:
    """Take the lock: false; true if another process has it, None if the file system knows no such lock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as e:
        if e.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            return None
        raise
    return False


def _is_at(fd: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(fd), os.stat(path))


def _read(fd: int) -> Owner | None:
    """Who signed it; None if nobody has, or if it was cut short."""
    try:
        return Owner(**json.loads(os.pread(fd, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _forget() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget)
