"""What `skillsd doctor` says of AppWorld: rows of check, state (ok, limited, missing), detail and fix."""

import json
import os
import subprocess
from pathlib import Path

from skillsd_appworld import paths

SANDBOX = Path(__file__).parent / "worker" / "sandbox.py"


def checks() -> list[dict[str, str]]:
    """The interpreter, the generated tasks, the official data, and what confines an agent's code here."""
    python: Path | None = None
    rows = []
    try:
        python = paths.find_python()
        rows.append(_row("AppWorld's interpreter", "ok", f"{_version(python)}, {python}"))
    except (OSError, ValueError) as e:
        rows.append(_row("AppWorld's interpreter", "missing", str(e), "make appworld"))
    rows.append(_tasks("tiny AppWorld-format tasks", "tiny", "make appworld"))
    fix = f"{python or 'python'} -m appworld.cli download data --root FOLDER; export APPWORLD_ROOT=FOLDER"
    rows.append(_tasks("official AppWorld data", "official", fix))
    if python is not None:
        rows.append(_sandbox(python))
    return rows


def _row(check: str, state: str, detail: str, fix: str = "") -> dict[str, str]:
    return {"check": check, "state": state, "detail": detail, "fix": fix}


def _version(python: Path) -> str:
    code = "import importlib.metadata as m; print('appworld', m.version('appworld'))"
    result = subprocess.run([str(python), "-c", code], capture_output=True, timeout=60, encoding="utf-8", errors="replace")
    if result.returncode:
        raise OSError(f"python: {python} has no appworld package")
    return result.stdout.strip()


def _tasks(check: str, source: str, fix: str) -> dict[str, str]:
    try:
        root = paths.find_root(source)
    except (FileNotFoundError, ValueError) as e:
        unset = source == "official" and not os.environ.get("APPWORLD_ROOT")
        return _row(check, "missing", "APPWORLD_ROOT is not set" if unset else str(e), fix)
    sizes = [
        f"{name} {len((root / 'data' / 'datasets' / f'{name}.txt').read_text(encoding='utf-8').split())}"
        for name in paths.split_names(root)
    ]
    return _row(check, "ok", f"{', '.join(sizes)}; {root}")


def _sandbox(python: Path) -> dict[str, str]:
    check, fix = "isolation of agents' code", "a Linux kernel with seccomp and Landlock (5.13 or newer)"
    result = subprocess.run([str(python), str(SANDBOX)], capture_output=True, timeout=60, encoding="utf-8", errors="replace")
    if result.returncode:
        return _row(check, "missing", (result.stderr.strip().splitlines() or ["it could not be probed"])[-1], fix)
    found = json.loads(result.stdout)
    detail = ", ".join(f"{what}: {how}" for what, how in found.items())
    if found["syscalls"] == "none":
        return _row(check, "missing", detail + "; worlds do not start", fix)
    weaker = (found["network"], found["files"], found["hidden"]) != ("namespace", "landlock", "mount")
    return _row(check, "limited" if weaker else "ok", detail, "")
