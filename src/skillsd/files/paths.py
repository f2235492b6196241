"""Paths as people write them, read once, where they enter the program."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from skillsd.errors import ConfigError

PATH_KEYS = ("default_root_dir", "save_dir", "dirpath", "ckpt_path", "out", "gif", "servers_folder", "tasks_file")
"""Keys of a configuration that name a file or a folder, wherever they stand. Those of a policy are read by its settings."""
_OTHERS = ("env_kwargs", "env_overrides", "panel_env_kwargs")
"""What stands under these is the environment's."""


def read_path(given: str | Path, key: str) -> Path:
    """The path, with the home folder in place of a leading ~. Nothing else of it stands for something else: no variables, no wildcards.

    Args:
        given: As it was written.
        key: What named it, for the message.

    Raises:
        ConfigError: There is no such home folder.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as e:
        raise ConfigError(f"{key}: {given}: there is no home folder to put in the place of ~: write the path in full.") from e


def read_text_path(given: str, key: str) -> str:
    """The same for a setting that may be another name than a path: text that does not begin with ~ stays as it is."""
    return str(read_path(given, key)) if given.startswith("~") else given


def read_paths(config: Any, key: str = "") -> None:
    """Read every path of a nested configuration, in place.

    Args:
        config: Mappings, namespaces and lists; anything else is left alone.
        key: Its own key, for messages.

    Raises:
        ConfigError: See `read_path`.
    """
    inner = vars(config) if isinstance(config, Namespace) else config
    if not isinstance(inner, dict | list):
        return
    for name, value in list(inner.items() if isinstance(inner, dict) else enumerate(inner)):
        under = f"{key}.{name}".lstrip(".")
        if isinstance(value, str) and name in PATH_KEYS:
            inner[name] = read_text_path(value, under)
        elif name not in _OTHERS:
            read_paths(value, under)
