"""Where AppWorld's interpreter and its tasks are. Every error says how to get what is missing."""

import os
from pathlib import Path

SOURCES = ("tiny", "official")
MARKER = "tiny.json"
"""Lies in the root of generated tasks, and never in the official one: neither is taken for the other."""
INSTALL = "run `make appworld` in a clone, or `python -m skillsd_appworld.install`"
DOWNLOAD = "get it with `appworld download data` in AppWorld's interpreter and set APPWORLD_ROOT to the folder that holds data/"


def home() -> Path:
    """What `skillsd_appworld.install` makes: $SKILLSD_APPWORLD, else .appworld here or in the clone, else ~/.cache/skillsd/appworld."""
    if given := os.environ.get("SKILLSD_APPWORLD"):
        return Path(given).expanduser().absolute()
    fallback = Path.home() / ".cache" / "skillsd" / "appworld"
    places = (Path.cwd() / ".appworld", Path(__file__).resolve().parents[2] / ".appworld", fallback)
    return next((p for p in places if p.is_dir()), fallback)


def find_python(given: str | None = None) -> Path:
    """The interpreter that has appworld: `given`, else $APPWORLD_PYTHON, else the one in `home()`. FileNotFoundError without one."""
    named = given or os.environ.get("APPWORLD_PYTHON")
    path = Path(named).expanduser().absolute() if named else home() / "venv" / "bin" / "python"
    if not path.is_file():
        key = "python" if given else "APPWORLD_PYTHON" if named else "python"
        raise FileNotFoundError(f"{key}: AppWorld's interpreter is not at {path}: {INSTALL}, or name another one.")
    return path


def find_root(source: str, given: str | None = None) -> Path:
    """The folder that holds data/.

    Args:
        source: "tiny", the generated tasks: `given`, else the one in `home()`; "official": `given`, else $APPWORLD_ROOT.
        given: A folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds the other kind of tasks, or its path contains "memory", which AppWorld takes for a database of that kind.
    """
    named = given or (os.environ.get("APPWORLD_ROOT") if source == "official" else None)
    if named is None and source == "official":
        raise FileNotFoundError(f"root: the official AppWorld data is not there: {DOWNLOAD}.")
    root = Path(named).expanduser().resolve() if named else home() / "tiny"
    if not (root / "data" / "tasks").is_dir():
        raise FileNotFoundError(f"root: {root} holds no data/tasks: {DOWNLOAD if source == 'official' else INSTALL}.")
    if "memory" in str(root):
        raise ValueError(f"root: {root} contains the word memory, which AppWorld cannot bear in a path: move it.")
    tiny = (root / MARKER).is_file()
    if tiny and source == "official":
        raise ValueError(f"root: {root} holds tiny AppWorld-format tasks, not AppWorld's own: set source to tiny, or {DOWNLOAD}.")
    if not tiny and source == "tiny":
        raise ValueError(f"root: {root} holds no tiny AppWorld-format tasks: set source to official, or {INSTALL}.")
    there = set(os.listdir(root / "data" / "tasks"))
    listed = [t for name in split_names(root) for t in (root / "data" / "datasets" / f"{name}.txt").read_text(encoding="utf-8").split()]
    if lost := [t for t in listed if t.partition(":")[0] not in there]:
        raise ValueError(
            f"root: {root} is incomplete, {len(lost)} of its {len(listed)} tasks are not there ({lost[0]}, ...): "
            + (INSTALL if tiny else DOWNLOAD) + "."
        )  # fmt: skip
    return root


def split_names(root: Path) -> list[str]:
    """The splits of a root."""
    return sorted(p.stem for p in (root / "data" / "datasets").glob("*.txt"))
