"""`skillsd study`: run what is not finished, then make the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skillsd.errors import ConfigError
from skillsd.study.cells import FindConfig, make_cells
from skillsd.study.report import write_report
from skillsd.study.results import read_cell, write_results
from skillsd.study.runner import FIT, Runner
from skillsd.study.settings import read_settings
from skillsd.words import count


def study(args: Sequence[str], find: FindConfig, fit: Sequence[str] = FIT, grace: float = 30.0) -> int:
    """Run the command.

    Args:
        args: What follows `skillsd study`.
        find: The name of a configuration file -> its path, as `skillsd fit -c` finds it.
        fit: The command in front of a cell's arguments.
        grace: Seconds that an interrupted cell has to end.

    Returns:
        0; 1 if a cell failed; 128 + the number of the signal that ended it.

    Raises:
        ConfigError, argparse.ArgumentError: bad input.
    """
    settings = read_settings(args)
    folder, cells = Path(settings.folder), make_cells(settings, find)
    if settings.only_report:
        finished = {c: read_cell(c) for c in cells if c.finished()}
        if not finished:
            raise ConfigError(f"folder: no cell of {folder} is finished: leave out --only_report.")
        write_results(folder, finished.values())
        write_report(settings, cells, finished)
        return 0
    runner = Runner(settings, cells, fit, grace)
    runner.run()
    for cell in runner.failed:
        print(f"failed: {cell} (exit code {cell.record()['exit_code']}), {cell.folder / 'cell.log'}:\n{runner.tail(cell)}")
    if left := runner.left():
        verb = "is" if left == 1 else "are"
        print(f"{left} of {count(len(cells), 'cell')} {verb} left: the same command continues.", flush=True)
    if runner.signal:
        return 128 + runner.signal
    if runner.finished:
        write_report(settings, cells, runner.finished)
    return 1 if runner.failed else 0
