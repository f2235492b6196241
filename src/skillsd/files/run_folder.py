"""A run folder: the names of its files, the panel's results, and run.json, the record of what the folder is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skillsd.errors import ConfigError
from skillsd.files.durable import temporaries, write

CONFIG_FILE = "config.yaml"
COMMAND_KEYS = ("ckpt_path", "weights_only", "overwrite", "steal_lock")
"""Keys that say how a command was called, not what the run is: config.yaml does without, and `overwrite` there would discard the run."""
METRICS_FILE = "metrics.csv"
TRAJECTORIES_FILE = "trajectories.jsonl"
PANEL_FILE = "panel.json"
VALIDATIONS_FILE = "validations.jsonl"
"""What `skillsd validate` has measured, a line each. It is not among FILES: a folder that holds nothing else holds no run."""
BANK_FILE = "bank.sqlite"
FILES = (
    CONFIG_FILE,
    METRICS_FILE,
    TRAJECTORIES_FILE,
    PANEL_FILE,
    BANK_FILE,
    *(f"{BANK_FILE}{end}" for end in ("-wal", "-shm")),
)
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
MODEL = "model"
TENSORBOARD = "tensorboard"
ADAPTER_KIND, MODEL_KIND = "adapter_config.json", "config.json"
"""Files by which an exported adapter and a pre-trained model are known."""
FOLDERS = (CHECKPOINTS, ADAPTER, MODEL, TENSORBOARD)
RECORD_FILE = "run.json"
LOCK_FILE = "run.lock"
FORMAT = 2
"""Version of a run folder as this code writes and reads it. It rises when an older one can no longer be read or continued."""


@dataclass(frozen=True)
class RunRecord:
    """What run.json says.

    Attributes:
        format: Version of the folder's format.
        checkpoints: The folder that a checkpoint was once written to, relative to the run folder if it lies in it; null if none ever was.
        discarding: The removal of an earlier run has begun and has not ended: whatever else is there belongs to that run.
        saves: The run was begun with checkpoints. Where it was not, that there is none says nothing about how far it has come.
    """

    format: int = FORMAT
    checkpoints: str | None = None
    discarding: bool = False
    saves: bool = True


def read_record(folder: Path) -> RunRecord | None:
    """A run folder's record; None where there is none.

    Raises:
        ConfigError: It is damaged, or of another format.
    """
    path = folder / RECORD_FILE
    try:
        if not path.is_file():
            return None
        found = json.loads(path.read_bytes())
        number = found["format"]
        if number == FORMAT:
            return RunRecord(number, found["checkpoints"], found["discarding"], found.get("saves", True))
    except OSError as e:
        raise ConfigError(f"trainer.default_root_dir: {str(folder)[:200]} cannot be read ({e.strerror}): name another folder.") from e
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise ConfigError(f"trainer.default_root_dir: {path} is damaged ({e!r}): {_restore()}, or name another folder.") from e
    raise ConfigError(
        f"trainer.default_root_dir: {folder} is a run folder of format {number}, and this version of skillsd reads format {FORMAT}: "
        "use the version that made it, or name another folder."
    )


def _restore() -> str:
    """How a record that is lost is written by hand."""
    return f"if its checkpoints are in {CHECKPOINTS}/, write {json.dumps(asdict(RunRecord(checkpoints=CHECKPOINTS)))} into it"


def write_record(folder: Path, record: RunRecord = RunRecord()) -> None:
    """Write run.json, at once and durably."""
    write(folder / RECORD_FILE, json.dumps(asdict(record), indent=1) + "\n")


def note_checkpoint(folder: Path, checkpoints: Path) -> None:
    """Put on record that a checkpoint is written to the folder `checkpoints`. A run of no record, made by hand, gets one."""
    pairs = ((folder.absolute(), checkpoints.absolute()), (folder.resolve(), checkpoints.resolve()))
    where = next((str(there.relative_to(here)) for here, there in pairs if there.is_relative_to(here)), str(checkpoints.absolute()))
    if (record := read_record(folder)) is None or record.checkpoints != where or record.discarding:
        write_record(folder, RunRecord(checkpoints=where))


def check_not_of_run(path: Path, key: str) -> None:
    """Refuse a place for something else where a run writes.

    Raises:
        ConfigError: It is a file or a folder of a run, or lies in one.
    """
    there = path.resolve()
    for part in (there, *there.parents):
        if part.name in (*FILES, *FOLDERS, VALIDATIONS_FILE, RECORD_FILE) and (part.parent / RECORD_FILE).is_file():
            raise ConfigError(f"{key}: {path} is where the run in {part.parent} itself writes: name another place.")


def check_format(folder: Path) -> None:
    """Refuse what this version cannot read. A folder without a run is none of its business.

    Raises:
        ConfigError: It holds a run of an older or newer format, or its record is damaged.
    """
    if read_record(folder) is None and (found := run_files(folder)):
        raise ConfigError(
            f"trainer.default_root_dir: {folder} holds {found[0].relative_to(folder)} and no {RECORD_FILE}: it is a run folder of an older "
            f"format (before {FORMAT}), or none, or the file was lost. Use the version of skillsd that made it, name another folder, or if "
            f"the file was lost: {_restore()}."
        )


def run_files(folder: Path) -> list[Path]:
    """The files that a run writes and that are there. A bank alone is none: it carries a version of its own."""
    names = (CONFIG_FILE, METRICS_FILE, TRAJECTORIES_FILE, PANEL_FILE)
    return [*(p for name in names if (p := folder / name).is_file()), *sorted((folder / CHECKPOINTS).glob("*.ckpt"))]


def checkpoint_folder(folder: Path, record: RunRecord | None) -> Path:
    """Where a run's checkpoints lie."""
    return folder / ((record and record.checkpoints) or CHECKPOINTS)


def has_checkpoint(folder: Path, record: RunRecord | None) -> bool:
    """There is a checkpoint that `--ckpt_path last` might continue from.

    Raises:
        ConfigError: One was once written, and none is there.
    """
    place = checkpoint_folder(folder, record)
    if any(place.glob("*.ckpt")):
        return True
    if record is None or record.checkpoints is None or record.discarding:
        return False
    if temporaries(place):  # killed after the record was made, before the first checkpoint got its name
        return False
    raise ConfigError(
        f"ckpt_path: a checkpoint of this run was once written to {place}, and none is there: put it back (a disk that is not mounted?), "
        "discard the run with --overwrite=true in place of --ckpt_path, or name another trainer.default_root_dir."
    )


def folder_of(named: str | Path) -> Path:
    """The run folder that is named, by its own path or by that of its config.yaml."""
    path = Path(named)
    return path.parent if path.name == CONFIG_FILE and path.is_file() else path


def read_panel(folder: str | Path) -> dict[str, Any]:
    """panel.json of a run folder; empty if there is none.

    Raises:
        ConfigError: It is damaged.
    """
    path = Path(folder) / PANEL_FILE
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError) as e:
        raise ConfigError(f"trainer.default_root_dir: {path} is damaged ({e}): move it away, or name another folder.") from e


def read_validations(folder: str | Path) -> list[dict[str, Any]]:
    """The records of validations.jsonl, the oldest first; empty if there is none.

    Raises:
        ConfigError: It is damaged.
    """
    path = Path(folder) / VALIDATIONS_FILE
    try:
        return [dict(json.loads(line)) for line in path.read_bytes().splitlines()] if path.is_file() else []
    except (ValueError, TypeError, RecursionError) as e:
        raise ConfigError(f"trainer.default_root_dir: {path} is damaged ({e}): move it away, or name another folder.") from e


def read_results(folder: str | Path) -> dict[str, Any]:
    """What panel.json holds, and under `validations` the records of validations.jsonl if there are any.

    Raises:
        ConfigError: One of them is damaged.
    """
    validations = read_validations(folder)
    panel = {key: part for key, part in read_panel(folder).items() if key != "validations"}
    return panel | ({"validations": validations} if validations else {})
