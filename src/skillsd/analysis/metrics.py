"""metrics.csv as a data frame."""

from __future__ import annotations

import csv
import math
from io import StringIO
from pathlib import Path

import pandas as pd

from skillsd.errors import ConfigError

TEACHER_METRICS = ["teacher/gap_mean", "teacher/gap_std", "teacher/health"]
"""Columns that are 0 in metrics.csv where the teacher scored no token, which would read as agreement; they are NaN here."""


def read_metrics(path: Path, whole: bool = True) -> pd.DataFrame:
    """A row an iteration, all numbers, to the bit; NaN where nothing was measured. A line without its end is still being written.

    Args:
        path: The file.
        whole: The first iteration is 0. It may be a later one where a run went on after its file was moved away.

    Raises:
        ConfigError: It cannot be read or is no such table, or the iterations are not 0, 1, 2, ...
    """
    try:
        text = path.read_bytes().rpartition(b"\n")[0].decode()
        header, *rows = list(csv.reader(StringIO(text))) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"{path} cannot be read ({type(e).__name__})") from e
    if number := next((n for n, row in enumerate(rows, 2) if len(row) != len(header)), None):
        raise ConfigError(f"{path} cannot be read (line {number} has not as many values as there are columns)")
    try:
        numbers = [[float(value) if value else math.nan for value in row] for row in rows]
    except ValueError as e:
        raise ConfigError(f"{path} holds what is no number ({e})") from e
    frame = pd.DataFrame(numbers, columns=header, dtype=float)
    if missing := [name for name in ("iteration", "epoch") if header and name not in header]:
        raise ConfigError(f"{path} has no column {missing[0]}")
    if len(set(header)) < len(header):
        raise ConfigError(f"{path} has two columns of one name")
    first = 0.0 if whole or not len(frame) or not 0 <= (least := frame["iteration"].iloc[0]) < 2**53 else least
    if header and frame["iteration"].tolist() != [first + i for i in range(len(frame))]:
        raise ConfigError(f"the iterations of {path} are not {first:.0f}, {first + 1:.0f}, {first + 2:.0f}, ...")
    if header and not (frame["epoch"].abs() < 2**53).all():
        raise ConfigError(f"an epoch of {path} is no whole number")
    if "teacher/k3" in frame:
        frame.loc[frame["teacher/k3"] == 0, [name for name in TEACHER_METRICS if name in frame]] = math.nan
    return frame
