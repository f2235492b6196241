"""How a fit begins in its run folder: what is continued, what is discarded, what is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from skillsd.errors import ConfigError
from skillsd.files.checkpoint import LAST, PREVIOUS
from skillsd.files.durable import check_replaceable, is_sealed, is_sealed_archive, temporaries
from skillsd.files.run_folder import (
    ADAPTER,
    ADAPTER_KIND,
    BANK_FILE,
    CHECKPOINTS,
    FILES,
    FOLDERS,
    MODEL,
    MODEL_KIND,
    RECORD_FILE,
    TENSORBOARD,
    VALIDATIONS_FILE,
    RunRecord,
    check_format,
    checkpoint_folder,
    has_checkpoint,
    read_record,
    write_record,
)

T = TypeVar("T")


class BankFiles(Protocol):
    """What is asked about a bank's file, and done to it; `skillsd.skills.imported` is one. Both raise ValueError if it cannot be read."""

    def counted(self, path: Path) -> tuple[int, int]:
        """How many of its events are imports, and how many a run's."""
        ...

    def cut_to_imported(self, path: Path) -> int:
        """Leave in it what was imported; how many events that is."""
        ...


STUDENT = f"{ADAPTER}/student"


def starts_anew(folder: Path, ckpt_path: str | None, overwrite: bool) -> bool:
    """A fit with these arguments continues from no checkpoint. Every rank finds the same: nothing is changed before all have asked.

    Raises:
        ConfigError: `last` is asked for, and the checkpoint that was once written is not there; or a checkpoint, and that the run goes.
    """
    record = read_record(folder)
    if overwrite and ckpt_path is not None:
        raise ConfigError(
            f"ckpt_path: {ckpt_path} is to be continued, and --overwrite discards the run and begins anew: leave one of the two out."
        )
    if overwrite or ckpt_path is None or (record is not None and record.discarding):
        return True
    return ckpt_path == "last" and not has_checkpoint(folder, record)


@dataclass
class Start:
    """What is to be done before a fit writes anything.

    Attributes:
        folder: The run folder.
        banks: Reads and cuts the bank in it.
        fresh: Nothing is continued.
        discard: Files of an earlier run that go, in this order.
        keep_imported: Imported skills stay in the bank.
        saves: The run that begins writes checkpoints.
    """

    folder: Path
    banks: BankFiles
    fresh: bool = True
    discard: list[Path] = field(default_factory=list)
    keep_imported: bool = False
    saves: bool = True

    def carry_out(self) -> None:
        """Leave the folder as the run needs it. Killed in the middle, the next start does the rest.

        Raises:
            ConfigError: The bank cannot be read.
        """
        record = read_record(self.folder) or RunRecord()
        if self.fresh and self.discard:
            # First of all, so that half of an earlier run is never taken for a run. What was imported goes only where all goes.
            write_record(self.folder, RunRecord(discarding=not self.keep_imported))
        kept = False
        if self.keep_imported:
            kept = bool(_readable(lambda: self.banks.cut_to_imported(self.folder / BANK_FILE)))
        for path in self.discard:
            if not (kept and path.name.startswith(BANK_FILE)):
                _remove(path)
        for name in (STUDENT, *FOLDERS):
            with suppress(OSError):  # what others have put there keeps it
                if not (self.folder / name).is_symlink():
                    (self.folder / name).rmdir()
        write_record(self.folder, RunRecord(saves=self.saves) if self.fresh else replace(record, discarding=False))


def plan(folder: Path, ckpt_path: str | None, overwrite: bool, banks: BankFiles, place: Path | None = None) -> Start:
    """Find out how a fit begins, and change nothing.

    Without a checkpoint to continue from, what a killed run left before its first one is discarded by `--ckpt_path last`. Skills that were
    imported are no run: what starts fresh has them, unless all is discarded. Only files of a run are discarded: others that lie in its
    folders stay, and what could be taken for the run's is refused.

    Args:
        folder: The run folder.
        ckpt_path: `last`, a checkpoint's path, or None.
        overwrite: Discard an earlier run.
        banks: Reads and cuts the bank in the folder.
        place: The folder that is set for checkpoints; None where none is.

    Raises:
        ConfigError: the folder holds a run that is neither continued nor discarded, files of no run in places that a run needs, a run of
            another format, or a bank that cannot be read; or `place` is not where the checkpoints of a run that goes on are.
    """
    check_format(folder)
    record = read_record(folder)
    fresh = starts_anew(folder, ckpt_path, overwrite)
    _check_places(folder)
    found = list(_files_of_run(folder, record))
    there = checkpoint_folder(folder, record)
    moves = place is not None and place.resolve() != there.resolve()
    if not fresh:
        if moves and ckpt_path == "last":
            raise ConfigError(
                f"checkpoint.dirpath: the checkpoints of this run are in {there}, and not in {place}: leave it out, or name one of them "
                "with --ckpt_path."
            )
        if place is not None and moves:
            _check_vacant(place)
        return Start(folder, banks, False, [p for p in found if p in temporaries(p.parent)])
    begun = [p for p in found if not p.name.startswith(f".{RECORD_FILE}.")]  # a kill while run.json was first written: nothing was begun
    bank = [p for p in begun if p.name.startswith(BANK_FILE)]
    only_imported = len(bank) == len(begun) and _only_imported(folder / BANK_FILE, banks)
    if begun and record is None and not only_imported:
        raise ConfigError(
            f"trainer.default_root_dir: {folder} holds {_inside(begun[0], folder)}, and no {RECORD_FILE} says that a run has made it: "
            "move it away, or name another folder."
        )
    _check_vacant(place or folder / CHECKPOINTS, found)
    goes_on = record is None or record.saves or record.discarding
    if ckpt_path == "last" and begun and not goes_on:
        raise ConfigError(
            f"ckpt_path: the run in {folder} was begun without checkpoints, and cannot be continued: discard it with --overwrite=true in "
            "place of --ckpt_path, or name another trainer.default_root_dir."
        )
    if overwrite or (record is not None and record.discarding):
        return Start(folder, banks, True, [*found, folder / VALIDATIONS_FILE])
    if begun and ckpt_path != "last" and not only_imported:
        raise ConfigError(
            f"trainer.default_root_dir: {folder} holds an earlier run: {'continue it with --ckpt_path last, ' * goes_on}"
            "discard it with --overwrite=true, or name another folder."
        )
    if bank:
        _readable(lambda: banks.counted(folder / BANK_FILE))
    return Start(folder, banks, True, found, keep_imported=True)


def _inside(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _files_of_run(folder: Path, record: RunRecord | None) -> Iterator[Path]:
    """What a run has made, where run.json says that there was one. Checkpoints come first: one without its bank could not be continued."""
    for place in dict.fromkeys((checkpoint_folder(folder, record), folder / CHECKPOINTS)):
        if place.absolute().is_relative_to(folder.absolute()):
            yield from (p for p in sorted(place.glob("*.ckpt*")) if p.name in (LAST, PREVIOUS) or _is_checkpoint(p))
        yield from temporaries(place)
    yield from (p for name in FILES if os.path.lexists(p := folder / name))
    ends = tuple(f".{name}." for name in (*FILES, RECORD_FILE))
    yield from (p for p in temporaries(folder) if p.name.startswith(ends))  # of what others write there just now, nothing
    for name in (STUDENT, MODEL):
        if is_sealed(folder / name):
            yield from sorted((folder / name).iterdir())
    yield from temporaries(folder / ADAPTER)
    yield from sorted((folder / TENSORBOARD).glob("events.out.tfevents.*"))
    yield from (folder / TENSORBOARD).glob("hparams.yaml")


def _is_checkpoint(path: Path) -> bool:
    """A checkpoint that a run has made, also one that it has set aside."""
    return path.name.endswith((".ckpt", ".ckpt.abandoned")) and is_sealed_archive(path)


def _check_vacant(place: Path, found: Collection[Path] = ()) -> None:
    """Refuse a folder for checkpoints that holds others than those `found` to go."""
    for path in place.glob("*.ckpt"):
        if path not in found:
            raise ConfigError(
                f"checkpoint.dirpath: {path} is there already, and would be replaced, or taken for a checkpoint of this run: move it away, "
                "or name another folder (of the run: trainer.default_root_dir)."
            )


def _check_places(folder: Path) -> None:
    """Nothing else is where a run writes: it would fail at its end."""
    for name in (*FILES, *FOLDERS):
        path, is_folder = folder / name, name in FOLDERS
        if os.path.lexists(path) and not (path.is_dir() if is_folder else path.is_file()):
            raise ConfigError(
                f"trainer.default_root_dir: {path} is no {'folder' if is_folder else 'file'}, or a link to nothing, and a run needs one of "
                "that name: move it away, or name another folder."
            )
    for name, kind in ((STUDENT, ADAPTER_KIND), (MODEL, MODEL_KIND)):
        if os.path.lexists(folder / name):
            check_replaceable(folder / name, "trainer.default_root_dir", kind)


def _only_imported(bank: Path, banks: BankFiles) -> bool:
    try:
        return bank.is_file() and banks.counted(bank)[1] == 0
    except ValueError:  # it may be somebody's work all the same
        return False


def _readable(ask: Callable[[], T]) -> T:
    try:
        return ask()
    except ValueError as e:
        raise ConfigError(f"skills: {e}") from e


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # a folder that was being written
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
