"""Where the configuration files are: inside an installed wheel, or in the clone of an editable install."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """Return the folder of the configuration files that come with skillsd.

    Returns:
        `skillsd/conf` of an installed wheel, otherwise the repository's `conf/`.

    Raises:
        FileNotFoundError: Neither is there, so the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parents[1] / "conf"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no conf/ beside {package}: install skillsd again from a wheel, an sdist or a clone")
