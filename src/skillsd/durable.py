"""Files that survive a kill, a full disk and a power cut: written aside, flushed, renamed; checksums where damage would go unseen."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b, sha256
from io import BytesIO
from pathlib import Path

from skillsd.errors import ConfigError

_MARK = b"skillsd blake2b "
_SEAL = len(_MARK) + 32
SUMS = "SHA256SUMS"
"""Beside the files it is of, as `sha256sum -c` reads it."""


class DamagedError(ConfigError):
    """A file is not what was written."""


def write(path: Path, data: bytes | memoryview, keep: Path | None = None) -> None:
    """Make `data` the content of a file, at once: whatever happens meanwhile, it holds the old one or the new one.

    Args:
        path: The file; its folder is made.
        data: All of it.
        keep: Where the old content goes.

    Raises:
        OSError: It could not be written. The file is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with named(path):
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if keep is not None and path.exists():
            _keep(path, keep)
        os.replace(temporary, path)
        sync(path.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError from inside names this file; that of a write names none."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror or "", str(path)) from e


def _keep(path: Path, keep: Path) -> None:
    second = keep.with_name(f"{keep.name}.tmp")
    second.unlink(missing_ok=True)
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


# -- a folder with a list of checksums ---------------------------------------------------------------------------------------------


def seal_folder(folder: Path) -> None:
    """List the checksums of a folder's files, and flush all of it."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != SUMS)
    (folder / SUMS).write_text("".join(f"{sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files))
    for path in (*files, folder / SUMS, folder):
        sync(path)


def check_folder(folder: Path) -> None:
    """Compare a folder's files with their list; without a list there is nothing to compare.

    Raises:
        DamagedError: A file of the list is missing or is not what was written.
    """
    if not (folder / SUMS).is_file():
        return
    for line in (folder / SUMS).read_text(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if not name or not path.is_file() or sha256(path.read_bytes()).hexdigest() != digest:
            raise DamagedError(f"{path} is damaged: {folder / SUMS} has another checksum of it.")
