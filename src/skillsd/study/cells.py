"""A cell: one method with one seed, its command line, and cell.json, the record of what was run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from skillsd import __version__
from skillsd.config_file import dump_config, read_whole
from skillsd.errors import ConfigError
from skillsd.files.durable import write
from skillsd.files.run_folder import read_panel
from skillsd.methods import read_method
from skillsd.study.settings import StudySettings

RECORD, LOG = "cell.json", "cell.log"
CONFIGS = "cells/.configs"
"""Folder in a study's with copies of its configuration files, each under the digest of its content."""
FindConfig = Callable[[str], str]
"""The name of a configuration file -> its path, as `skillsd fit -c` finds it."""


class Source(NamedTuple):
    """A configuration file as it was when the study began: what is edited later is for another study."""

    digest: str
    """Digest of what it says; a comment makes no difference."""
    text: str

    def keep(self, folder: Path, name: str) -> Path:
        """A copy in the study folder, for the cells; its path."""
        path = folder / CONFIGS / self.digest / f"{Path(name).stem}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, self.text)
        return path


def read_source(path: Path, name: str) -> Source:
    """Read a configuration file.

    Raises:
        ConfigError: It is none.
    """
    config = read_whole(path, name)
    if isinstance(config.get("method"), str):
        config["method"] = read_method(config["method"])  # as it is now: the file that it names may change, too
    text = dump_config(config)
    return Source(hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12], text)


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        method: Name of the method.
        seed: Run seed.
        folder: Its run folder.
        configs: Names of its configuration files.
        flags: `--key=value` for `skillsd fit`, without the folder.
        sources: The configuration files by name.
    """

    method: str
    seed: int
    folder: Path
    configs: tuple[str, ...]
    flags: tuple[str, ...]
    sources: Mapping[str, Source] = field(compare=False)

    def __str__(self) -> str:
        return f"{self.method} seed {self.seed}"

    def command(self, study: Path) -> list[str]:
        """What follows `skillsd fit`. `last` starts fresh where there is no checkpoint.

        Args:
            study: The study folder, for the copies of the configuration files.
        """
        configs = [x for c in self.configs for x in ("-c", str(self.sources[c].keep(study, c)))]
        return [*configs, *self.flags, f"--trainer.default_root_dir={self.folder}", "--ckpt_path=last"]

    def recipe(self) -> dict[str, Any]:
        """What makes this run what it is, without the paths of a machine. A comment in a configuration file makes no difference."""
        names = [Path(c).name if Path(c).is_absolute() else c for c in self.configs]
        return {
            "method": self.method,
            "seed": self.seed,
            "arguments": [*(x for n in names for x in ("-c", n)), *self.flags],
            "contents": [self.sources[c].digest for c in self.configs],
        }

    def record(self) -> dict[str, Any]:
        """cell.json, or an empty one."""
        path = self.folder / RECORD
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        except ValueError as e:
            raise ConfigError(f"folder: {path} is damaged: delete the folder {self.folder}, and the cell is run again.") from e

    def write(self, **changes: Any) -> None:
        """Change cell.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.folder / RECORD, json.dumps(self.record() | changes, indent=1) + "\n")

    def finished(self) -> bool:
        return self.record().get("state") == "finished" and "after" in read_panel(self.folder)

    def check(self) -> None:
        """Refuse a folder that holds another run.

        Raises:
            ConfigError: its arguments, or what its configuration files say, were others.
        """
        made, asked = self.record(), self.recipe()
        if not made and self.folder.is_dir() and any(self.folder.iterdir()):
            raise ConfigError(f"folder: {self.folder} holds something that no study made: delete it, or name another `folder`.")
        changed = [k for k, v in asked.items() if made and made.get(k) != v]
        if not changed:
            return
        if changed == ["contents"]:
            was = zip(self.configs, made["contents"], asked["contents"], strict=True)
            what = "another " + ", ".join(Path(name).name for name, old, new in was if old != new)
        else:
            odd = sorted(set(made.get("arguments", [])) ^ set(asked["arguments"])) or ["another order of files"]
            what = "other arguments: " + ", ".join(odd)
        raise ConfigError(f"folder: the cell {self} was made with {what}: delete {self.folder}, or name another `folder`.")


def make_cells(study: StudySettings, find: FindConfig) -> list[Cell]:
    """All cells, seed by seed, so that a study which is cut short is balanced.

    Raises:
        ConfigError: a configuration file is missing, or is none.
    """
    sources: dict[str, Source] = {}
    for key, names in {
        "configs": study.configs,
        "overlays": study.overlays,
        **{f"methods.{m}": v for m, v in study.methods.items()},
    }.items():
        for name in names:
            if not Path(find(name)).is_file():
                raise ConfigError(f"{key}: there is no file {name}, here or among those that come with skillsd: check the name.")
            sources[name] = read_source(Path(find(name)), name)
    return [
        Cell(
            method,
            seed,
            Path(study.folder) / "cells" / method / f"seed-{seed}",
            (*study.configs, *overlays, *study.overlays),
            (f"--seed_everything={seed}", *(f"--{k}={v}" for k, v in study.flags().items())),
            sources,
        )
        for seed in study.seeds
        for method, overlays in study.methods.items()
    ]


def version_and_commit() -> dict[str, str]:
    """Version, and the commit where the source is a git checkout, with `-dirty` where src, envs or conf differ from it.

    A copy of the source without git may name its commit in $SKILLSD_COMMIT.
    """
    root = Path(__file__).resolve().parents[3]
    made = {"version": __version__}
    if os.environ.get("SKILLSD_COMMIT"):
        made["commit"] = os.environ["SKILLSD_COMMIT"]
    elif _git(root, "ls-files", "--error-unmatch", "src/skillsd/__init__.py"):
        dirty = _git(root, "status", "--porcelain", "--", "src", "envs", "conf")
        made["commit"] = _git(root, "rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")
    return made


def _git(root: Path, *args: str) -> str:
    """What git prints; "" if there is no git, or it refuses."""
    try:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, check=True, encoding="utf-8", errors="replace"
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
