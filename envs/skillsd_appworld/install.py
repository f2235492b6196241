"""Set AppWorld up: `python -m skillsd_appworld.install [FOLDER] [--pip-args "..."]`, or `make appworld` in a clone.

It makes FOLDER/venv with the pinned engine (its requirements clash with everybody's, so it never shares an environment), unpacks its apps,
and generates FOLDER/tiny, a set of tiny AppWorld-format tasks. What is there already is kept. Nothing but the package index is needed.

AppWorld's apps, their documentation and all data made with them may be redistributed in encrypted form only: do not commit, publish or
send FOLDER.
"""

import argparse
import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path

from skillsd_appworld import places

WORKER = Path(__file__).parent / "worker"


def install(folder: Path, pip_args: str = "") -> None:
    """Make what is missing in `folder`. CalledProcessError if a step fails."""
    folder = folder.expanduser().absolute()
    python = folder / "venv" / "bin" / "python"
    environ = {**os.environ, "APPWORLD_CACHE": str(folder / "cache"), "APPWORLD_ROOT": str(folder), "PYTHONHASHSEED": "0"}
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "venv" / ".installed").is_file():
        print(f"AppWorld's interpreter: {folder / 'venv'}", flush=True)
        venv.create(folder / "venv", with_pip=True, clear=True)
        pins = WORKER / "constraints.txt"
        quiet = ["--quiet", "--disable-pip-version-check", *shlex.split(pip_args)]
        subprocess.run([str(python), "-m", "pip", "install", *quiet, "-c", str(pins), "appworld"], check=True)
        subprocess.run([str(folder / "venv" / "bin" / "appworld"), "install"], check=True, env=environ, stdout=subprocess.DEVNULL)
        (folder / "venv" / ".installed").touch()
    if not (folder / "tiny" / places.MARKER).is_file():
        subprocess.run([str(python), str(WORKER / "make_tiny.py"), str(folder / "tiny")], check=True, env=environ)
    print(f"AppWorld: {python}\ntiny AppWorld-format tasks: {folder / 'tiny'}")


def main() -> None:
    """The command."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m skillsd_appworld.install", description=__doc__.split("\n\n")[1])
    parser.add_argument("folder", nargs="?", type=Path, default=places.home(), help="where to (default: %(default)s)")
    parser.add_argument("--pip-args", default="", help="options for pip, such as another index")
    arguments = parser.parse_args()
    try:
        install(arguments.folder, arguments.pip_args)
    except subprocess.CalledProcessError as e:
        print(f"error: {shlex.join(map(str, e.cmd))} ended with {e.returncode}: see above.", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
