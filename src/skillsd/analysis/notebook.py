"""What notebooks begin with: fewer warnings, and a run to look at. It imports little, so that it can come before what warns."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from skillsd.errors import ConfigError
from skillsd.files.run_folder import CONFIG_FILE

if TYPE_CHECKING:
    from skillsd.analysis.run import Run

VARIABLE = "SKILLSD_RUN"
"""The environment variable that names a run folder."""
USUAL = ("../runs/sokoban", "runs/sokoban")
"""Where `make fit` writes, seen from notebooks/ and from the folder above."""
NOISE = ("IProgress not found", ".*is_gradient_checkpointing")


def quiet() -> None:
    """No progress bars of loading, no warnings that a reader can do nothing about. Call it before other imports."""
    for text in NOISE:
        warnings.filterwarnings("ignore", message=text)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def open_run(folder: str | Path | None = None) -> Run:
    """A run to look at.

    Args:
        folder: A run folder. Default: the one that SKILLSD_RUN names, else the one that `make fit` writes.

    Raises:
        ConfigError: there is none; it says what to run.
    """
    from skillsd.analysis.run import Run  # late, as pandas

    named = folder or os.environ.get(VARIABLE)
    tried = [Path(named)] if named else [Path(usual) for usual in USUAL]
    for found in tried:
        if (found / CONFIG_FILE).is_file():
            return Run(found)
    raise ConfigError(
        f"{VARIABLE}: no run at {' or '.join(map(str, tried))}: run `make fit` (minutes), or the notebook 01_first_run and then "
        f"`import os; os.environ['{VARIABLE}'] = '../runs/first'`."
    )
