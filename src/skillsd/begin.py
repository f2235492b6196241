"""Whose a run folder is when a run begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from skillsd.errors import ConfigError
from skillsd.run_folder import BANK_FILE, CHECKPOINTS, FILES, FOLDERS, VALIDATIONS_FILE
from skillsd.skills.imported import counted, cut_to_imported


def guard_run_folder(folder: Path, ckpt_path: str | None, overwrite: bool) -> None:
    """Refuse to fit into an earlier run's folder unless it is continued or discarded.

    With `--ckpt_path last` and no checkpoint yet, what a killed run left before its first one is discarded: it starts fresh. Skills that
    were imported are no run: what starts fresh has them, unless all is discarded.

    Raises:
        ConfigError: the folder holds a run, or what starts fresh finds a bank that cannot be read.
    """
    # Checkpoints go first: one without its bank could not be continued.
    found = [folder / n for n in (*FOLDERS, *FILES) if (folder / n).exists()]
    fresh = ckpt_path == "last" and not any((folder / CHECKPOINTS).glob("*.ckpt"))
    if not found or (ckpt_path is not None and not fresh and not overwrite):
        return
    if not overwrite:
        path = folder / BANK_FILE
        bank = [p for p in found if p.name.startswith(BANK_FILE)]
        if not fresh and (len(bank) < len(found) or not _only_imported(path)):
            raise ConfigError(
                f"trainer.default_root_dir: {folder} holds an earlier run: continue it with --ckpt_path last, "
                "discard it with --overwrite=true, or name another folder."
            )
        try:
            if cut_to_imported(path):
                found = [p for p in found if p not in bank]
        except ValueError as e:
            raise ConfigError(f"skills: {e}") from e
    if overwrite:
        found += [p for p in [folder / VALIDATIONS_FILE] if p.exists()]
    for p in found:
        shutil.rmtree(p) if p.is_dir() else p.unlink()


def _only_imported(bank: Path) -> bool:
    try:
        return bank.is_file() and counted(bank)[1] == 0
    except ValueError:  # it may be somebody's work all the same
        return False
