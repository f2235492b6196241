"""Set AppWorld up: `python -m skillsd_appworld.install [FOLDER] [--pip-args "..."]`, or `make appworld` in a clone.

It makes FOLDER/venv with the pinned engine (its requirements clash with everybody's, so it never shares an environment), unpacks its apps,
and generates FOLDER/tiny, a set of tiny AppWorld-format tasks. What is there already is kept. Nothing but the package index is needed.

AppWorld's apps, their documentation and all data made with them may be redistributed in encrypted form only: do not commit, publish or
send FOLDER.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from skillsd_appworld import paths

WORKER = Path(__file__).parent / "worker"
MARK = ".made-by-skillsd-appworld"
"""In an interpreter's folder that may be made anew."""


class NotOurs(Exception):
    """Something that this command has not made is where it would write."""


class NoIndex(Exception):
    """No package index can be reached."""


def install(folder: Path, pip_args: str = "") -> None:
    """Make what is missing in `folder`. CalledProcessError if a step fails, NoIndex if that is why, NotOurs before anything is changed."""
    folder = folder.expanduser().absolute()
    python, pins = folder / "venv" / "bin" / "python", WORKER / "constraints.txt"
    environ = {**os.environ, "APPWORLD_CACHE": str(folder / "cache"), "APPWORLD_ROOT": str(folder), "PYTHONHASHSEED": "0"}
    installed, mark = folder / "venv" / ".installed", folder / "venv" / MARK
    if (folder / "venv").exists() and not (installed.is_file() or mark.is_file()):
        raise NotOurs(f"{folder / 'venv'} is there, and was not made by this command: move it away, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not installed.is_file() or installed.read_text(encoding="utf-8") != pins.read_text(encoding="utf-8"):
        print(f"AppWorld's interpreter: {folder / 'venv'}", flush=True)
        mark.parent.mkdir(exist_ok=True)
        mark.touch()  # one that is killed half way may be made again, by this
        for old in mark.parent.iterdir():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            elif old != mark:
                old.unlink()
        venv.create(folder / "venv", with_pip=True)
        pip, options = [str(python), "-m", "pip"], ["--quiet", "--disable-pip-version-check", *shlex.split(pip_args)]
        try:
            subprocess.run([*pip, "install", *options, "-c", str(pins), "appworld"], check=True)
        except subprocess.CalledProcessError:
            with tempfile.TemporaryDirectory() as empty:
                if subprocess.run([*pip, "download", *options, "--no-deps", "-d", empty, "pip"], capture_output=True).returncode:
                    raise NoIndex from None
            raise
        subprocess.run([str(folder / "venv" / "bin" / "appworld"), "install"], check=True, env=environ, stdout=subprocess.DEVNULL)
        installed.write_text(pins.read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([str(python), str(WORKER / "make_tiny.py"), str(folder / "tiny"), "--keep"], check=True, env=environ)
    print(f"AppWorld: {python}\ntiny AppWorld-format tasks: {folder / 'tiny'}")


def main() -> int:
    """The command. 2 if a step fails, 0 with a message for a missing index if that is allowed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m skillsd_appworld.install", description=__doc__.split("\n\n")[1])
    parser.add_argument("folder", nargs="?", type=Path, default=paths.home(), help="where to (default: %(default)s)")
    parser.add_argument("--pip-args", default="", help="options for pip, such as another index")
    parser.add_argument("--optional", action="store_true", help="end well on a machine that reaches no package index")
    arguments = parser.parse_args()
    try:
        install(arguments.folder, arguments.pip_args)
    except NotOurs as e:
        print(f"error: {e}.", file=sys.stderr)
        return 2
    except NoIndex:
        print(f"AppWorld is NOT set up: this machine reaches no package index ({arguments.folder}).", file=sys.stderr)
        return 0 if arguments.optional else 2
    except subprocess.CalledProcessError as e:
        print(f"error: {shlex.join(map(str, e.cmd))} ended with {e.returncode}: see above.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
