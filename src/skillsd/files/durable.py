"""Files that survive a kill, a full disk and a power cut: written aside, flushed, renamed; checksums where damage would go unseen."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b, sha256
from io import BytesIO
from pathlib import Path

from skillsd.bounded import visible
from skillsd.errors import ConfigError

_MARK = b"skillsd blake2b "
_SEAL = len(_MARK) + 32
SUMS = "SHA256SUMS"
"""Beside the files it is of, as `sha256sum -c` reads it."""
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}\.skillsd-tmp.*", re.DOTALL)


class DamagedError(ConfigError):
    """A file is not what was written."""


def temporary(path: Path) -> Path:
    """A name beside `path` that nobody else uses. It says whose it is: a kill may leave it behind (see `temporaries`)."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.skillsd-tmp")


def temporaries(folder: Path) -> list[Path]:
    """What writes that were killed have left in a folder; also what is being written at this moment."""
    return sorted(p for p in folder.glob(".*.skillsd-tmp*") if _TEMPORARY.fullmatch(p.name))


def write(path: Path, data: str | bytes | memoryview, keep: Path | None = None, commit: Callable[[], None] | None = None) -> None:
    """Make `data` the content of a file, at once: whatever happens meanwhile, it holds the old one or the new one.

    Args:
        path: The file; its folder is made.
        data: All of it; a text is written as UTF-8.
        keep: Where the old content goes.
        commit: Called when the data is on the disk under a temporary name, before it gets its own. After it the temporary file stays if
            the write fails, as it would after a kill.

    Raises:
        OSError: It could not be written. The file is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, committed = temporary(path), False
    try:
        with named(path):
            with aside.open("xb") as f:
                f.write(data.encode() if isinstance(data, str) else data)
                f.flush()
                os.fsync(f.fileno())
            if commit is not None:
                sync(path.parent)
                commit()
                committed = True
            if keep is not None and path.exists():
                _keep(path, keep)
            os.replace(aside, path)
            sync(path.parent)
    except BaseException:
        if not committed:  # else what was committed is under the temporary name alone
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        raise


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError from inside names this file; that of a write names none."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror or "", str(path)) from e


@contextmanager
def writing(path: Path, key: str) -> Iterator[None]:
    """Raises ConfigError in place of an OSError from inside: `path`, which `key` names, cannot be written."""
    try:
        yield
    except OSError as e:
        raise ConfigError(f"{key}: {visible(str(path))} cannot be written ({e.strerror or e}): name another.") from e


def _keep(path: Path, keep: Path) -> None:
    second = temporary(keep)
    try:
        os.link(path, second)  # the file itself stays in place meanwhile
    except OSError:
        second = path  # a file system without hard links
    os.replace(second, keep)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def checksum(path: Path, length: int) -> int:
    """CRC-32 of a file's first `length` bytes."""
    crc = 0
    with path.open("rb") as f:
        while length > 0 and (block := f.read(min(length, 1 << 20))):
            crc, length = zlib.crc32(block, crc), length - len(block)
    return crc


# -- a zip archive with a checksum of all of it as its comment: any zip reader, torch.load too, takes it for what it is ------------


def seal(archive: BytesIO) -> memoryview:
    """The archive with its checksum. Its comment must be empty."""
    archive.seek(-2, os.SEEK_END)  # the comment's length ends it
    archive.write(struct.pack("<H", _SEAL))
    digest = blake2b(archive.getbuffer(), digest_size=16).hexdigest()
    archive.write(_MARK + digest.encode())
    return archive.getbuffer()


def check_archive(data: bytes | memoryview, name: str | Path) -> None:
    """One without a checksum, an older one or another program's, is held to be whole if its parts' CRC-32 are right.

    Raises:
        DamagedError: It is not what was written.
    """
    tail = bytes(data[-22 - _SEAL :])
    end = tail.rfind(b"PK\5\6")  # the archive's last record; its comment's length is its last field
    if _MARK in tail or (end >= 0 and tail[end + 20 : end + 22] != b"\0\0"):
        whole = data[: len(data) - _SEAL]
        if bytes(data[len(whole) :]) == _MARK + blake2b(whole, digest_size=16).hexdigest().encode():
            return
        raise DamagedError(f"{name} is damaged: its checksum does not match.")
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, OSError, RuntimeError, ValueError, struct.error, zlib.error) as e:
        raise DamagedError(f"{name} is cut short, or is no checkpoint ({e}).") from e
    if bad is not None:
        raise DamagedError(f"{name} is damaged: {bad} in it has a wrong checksum.")


def is_sealed_archive(path: Path) -> bool:
    """It ends as `seal` lets one end; whether it is whole is `check_archive`'s to say."""
    with path.open("rb") as f:
        f.seek(max(0, path.stat().st_size - _SEAL))
        return f.read(len(_MARK)) == _MARK


# -- a folder with a list of checksums ---------------------------------------------------------------------------------------------


def seal_folder(folder: Path) -> None:
    """List the checksums of a folder's files, and flush all of it."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != SUMS)
    (folder / SUMS).write_text("".join(f"{sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files), encoding="utf-8")
    mode = stat.S_IMODE((folder / SUMS).stat().st_mode)
    for path in files:
        path.chmod(mode)  # safetensors writes for the owner alone, whatever the umask is
    for path in (*files, folder / SUMS, folder):
        sync(path)


def check_folder(folder: Path) -> None:
    """Compare a folder's files with their list; without a list there is nothing to compare.

    Raises:
        DamagedError: A file of the list is missing or is not what was written.
    """
    if not (folder / SUMS).is_file():
        return
    for name, digest in _listed(folder).items():
        path = folder / name
        if not name or not path.is_file() or sha256(path.read_bytes()).hexdigest() != digest:
            raise DamagedError(f"{path} is damaged: {folder / SUMS} has another checksum of it.")


def _listed(folder: Path) -> dict[str, str]:
    """The names in a folder's list, and their checksums."""
    lines = (folder / SUMS).read_text(errors="replace", encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def is_sealed(folder: Path) -> bool:
    """Its list names exactly the files that are there, every one is what was listed, and there is nothing else: nobody has added or
    changed anything since `seal_folder`, so that it can be made again."""
    try:
        found = {entry.name: entry for entry in os.scandir(folder)}
        listed = _listed(folder)
        if not all(entry.is_file(follow_symlinks=False) for entry in found.values()) or found.keys() != {*listed, SUMS}:
            return False
        return all(sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in listed.items())
    except (OSError, ValueError):
        return False


def remove_sealed(folder: Path) -> None:
    """Remove a folder of which `is_sealed` holds, and nothing that came into it meanwhile."""
    for name in (*_listed(folder), SUMS):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def check_replaceable(folder: Path, key: str, kind: str) -> None:
    """Refuse a place where no folder can be written, or where one lies that is not provably an earlier one of ours, of the same kind.

    Args:
        folder: Where one is to be written by `sealed_folder`.
        key: What named it, for the message.
        kind: Name of a file that every folder of this kind has.

    Raises:
        ConfigError: It is a link, a file, the present folder, without a parent, of another kind, or holds anything but what its SHA256SUMS
            lists.
    """
    cure = "name a folder that is not there yet."
    try:
        mode = os.lstat(folder).st_mode
    except FileNotFoundError as e:
        if not folder.parent.is_dir():
            raise ConfigError(f"{key}: the folder {folder.parent} is not there: make it first, or name another.") from e
        return
    except (OSError, ValueError) as e:
        raise ConfigError(f"{key}: {str(folder)[:200]} cannot be written ({getattr(e, 'strerror', e)}): {cure}") from e
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"{key}: {folder} is a {'link' if stat.S_ISLNK(mode) else 'file'}: {cure}")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ConfigError(f"{key}: {folder} is the present folder, or one that it lies in: {cure}")
    if not is_sealed(folder):
        raise ConfigError(
            f"{key}: {folder} is there, and its {SUMS} does not list exactly the files that are in it, as they are, so it may hold "
            f"somebody's work: {cure}"
        )
    if not (folder / kind).exists():
        raise ConfigError(f"{key}: {folder} is there and holds no {kind}, so it is something else than what is to be written: {cure}")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to put files into; at the block's end it gets its name, at once. If the block raises, nothing is left of it.

    Raises:
        OSError: It could not be written, or there is something of that name.
    """
    work = temporary(path)
    work.mkdir()
    try:
        yield work
        work.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def sealed_folder(folder: Path, key: str, kind: str) -> Iterator[Path]:
    """Fill a folder aside; at the block's end it is sealed and put in place, also of an earlier one that is still sealed. If the block
    raises, nothing is left of it.

    Args:
        folder: Where it is put. Its parent must be there.
        key: What named it, for the message.
        kind: Name of a file that every folder of this kind has.

    Yields:
        The folder to put files into.

    Raises:
        ConfigError: See `check_replaceable`; asked before the block and after it.
    """
    check_replaceable(folder, key, kind)
    old = temporary(folder)
    try:
        with new_folder(folder) as work:
            yield work
            seal_folder(work)
            check_replaceable(folder, key, kind)
            if folder.exists():
                os.rename(folder, old)
    except BaseException:
        if old.exists():
            os.rename(old, folder)
        raise
    if old.exists():
        remove_sealed(old)
