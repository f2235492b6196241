"""Runs the cells: processes of their own, one lock, one time limit. Whatever ends it, the same command continues."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from skillsd.errors import ConfigError
from skillsd.study.cells import LOG, Cell, version_and_commit
from skillsd.study.results import CellResult, read_cell, write_results
from skillsd.study.settings import StudySettings
from skillsd.words import count, duration

FIT = (sys.executable, "-m", "skillsd", "fit")
LOCK = "study.lock"
WRITTEN = ("cells", "results.csv", "curves.csv", "report.md", "report.html")
"""What a study writes to its folder, beside pictures."""
TAIL = 12
"""Lines of a failed cell's log that are shown."""


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the study folder. The cells inherit the lock: if the study is killed, it lasts until they have ended too.

    Yields:
        The lock's file descriptor.

    Raises:
        ConfigError: another study holds it, it cannot be a folder, or it holds what no study has made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = (folder / LOCK).is_file() or any(folder.glob("cells/*/seed-*/cell.json"))
        strangers = [] if ours else sorted(p for p in folder.iterdir() if p.name in WRITTEN or p.suffix == ".png")
    except (OSError, ValueError) as e:
        raise ConfigError(f"folder: {str(folder)[:200]} cannot be the study's ({getattr(e, 'strerror', e)}): name another.") from e
    if strangers:
        raise ConfigError(f"folder: {folder} holds {strangers[0].name}, and no study has made it: move it away, or name another.")
    with (folder / LOCK).open("a", encoding="utf-8") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ConfigError(
                f"folder: a study, or a cell of one that was killed, still runs in {folder}: wait for it, or name another `folder`."
            ) from e
        yield f.fileno()


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, one entry a GPU."""
    import torch  # late: `skillsd study --help` needs none

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(torch.cuda.device_count())] if visible is None else [x.strip() for x in visible.split(",") if x.strip()]


@dataclass
class Running:
    """A cell's process, its GPU ("" where there are not several) and when it was started (monotonic seconds)."""

    cell: Cell
    process: subprocess.Popen
    gpu: str = ""
    started: float = field(default_factory=time.monotonic)


class Runner:
    """Runs what is not finished, `workers` at a time, and rewrites results.csv after every finished cell.

    Where there are several GPUs, a cell gets the one that fewest cells use.

    Args:
        study: The settings.
        cells: All cells, in the order in which they are run.
        fit: The command in front of a cell's arguments.
        grace: Seconds between SIGINT and SIGKILL.
        poll: Seconds between two looks at the processes.
    """

    def __init__(
        self, study: StudySettings, cells: Sequence[Cell], fit: Sequence[str] = FIT, grace: float = 30.0, poll: float = 0.2
    ) -> None:
        self.study, self.cells, self.fit, self.grace, self.poll = study, list(cells), list(fit), grace, poll
        self.gpus = visible_gpus()
        self.finished: dict[Cell, CellResult] = {}
        self.failed: list[Cell] = []
        self.signal = 0
        """The signal that ended the study; 0 if none did."""

    def run(self) -> None:
        """Check every cell, then run them until all are tried, the time is up, or SIGINT or SIGTERM arrives.

        Raises:
            ConfigError: a folder holds another run; nothing is run then.
        """
        with locked(Path(self.study.folder)) as lock:
            for cell in self.cells:
                cell.check()
            self.finished = {c: read_cell(c) for c in self.cells if c.finished()}
            self._write()
            waiting = [c for c in self.cells if c not in self.finished]
            print(f"{count(len(self.cells), 'cell')}: {len(self.finished)} finished, {len(waiting)} to run", flush=True)
            with self._signals():
                self._loop(waiting, lock)

    def left(self) -> int:
        """Cells that are not finished and have not failed in this command."""
        return len(self.cells) - len(self.finished) - len(self.failed)

    def _loop(self, waiting: list[Cell], lock: int) -> None:
        begun, limit = time.monotonic(), self.study.time_limit
        running: list[Running] = []
        seconds: list[float] = []
        try:
            while waiting or running:
                if self.signal or (limit is not None and time.monotonic() - begun >= limit):
                    return
                while waiting and len(running) < self.study.workers:
                    busy = [r.gpu for r in running]
                    gpu = min(self.gpus, key=busy.count) if len(self.gpus) > 1 else ""
                    running.append(self._start(waiting.pop(0), lock, gpu))
                for r in [r for r in running if r.process.poll() is not None]:
                    running.remove(r)
                    seconds.append(time.monotonic() - r.started)
                    self._end(r)
                    self._print_progress(r.cell, sum(seconds) / len(seconds))
                time.sleep(self.poll if running else 0)
        finally:
            self._stop(running)

    def _start(self, cell: Cell, lock: int, gpu: str) -> Running:
        attempts = cell.record().get("attempts", 0) + 1
        made = version_and_commit()
        commits = list(dict.fromkeys([*cell.record().get("commits", []), *([made["commit"]] if "commit" in made else [])]))
        cell.write(**cell.recipe(), version=made["version"], commits=commits, state="running", attempts=attempts, exit_code=None)
        with (cell.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"--- attempt {attempts}\n")
            log.flush()
            process = subprocess.Popen(
                [*self.fit, *cell.command(Path(self.study.folder))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(self.study.threads)} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
                pass_fds=(lock,),
                start_new_session=True,  # a terminal's Ctrl-C reaches the study alone
            )
        return Running(cell, process, gpu)

    def _end(self, r: Running, interrupted: bool = False) -> None:
        """Book an attempt, and read what the cell gave if it is done."""
        code, wall = r.process.returncode, r.cell.record().get("wall_s", 0.0) + time.monotonic() - r.started
        r.cell.write(state="finished" if code == 0 else "interrupted" if interrupted else "failed", wall_s=round(wall, 1), exit_code=code)
        if code == 0:
            try:
                if not r.cell.finished():
                    raise ConfigError("the run ended without `after` in panel.json: are panel.enabled and panel.after true?")
                self.finished[r.cell] = read_cell(r.cell)
            except ConfigError as e:
                with (r.cell.folder / LOG).open("a", encoding="utf-8") as log:
                    log.write(f"study: {e}\n")
                r.cell.write(state="failed")
            else:
                self._write()
                return
        if not interrupted:
            self.failed.append(r.cell)

    def _stop(self, running: list[Running]) -> None:
        """SIGINT to what still runs, SIGKILL after the grace period."""
        for how, patience in ((signal.SIGINT, self.grace), (signal.SIGKILL, None)):
            alive = [r for r in running if r.process.poll() is None]
            for r in alive:
                with suppress(ProcessLookupError):
                    os.killpg(r.process.pid, how)
            until = time.monotonic() + (patience or 0)
            for r in alive:
                with suppress(subprocess.TimeoutExpired):
                    r.process.wait(None if patience is None else max(0.0, until - time.monotonic()))
        for r in running:
            self._end(r, interrupted=True)

    def _write(self) -> None:
        if self.finished:
            write_results(Path(self.study.folder), [self.finished[c] for c in self.cells if c in self.finished])

    def _print_progress(self, cell: Cell, mean_seconds: float) -> None:
        left = self.left()
        if cell in self.finished:
            row, metric = self.finished[cell].row, self.study.metric
            before, after = row[f"before_{metric}"], row[f"after_{metric}"]
            outcome = f"{metric} {100 * before:.1f} -> {100 * after:.1f}% ({100 * (after - before):+.1f}), {duration(row['wall_s'])}"
        else:
            outcome = f"FAILED (exit code {cell.record()['exit_code']}), see {cell.folder / LOG}"
        about = f", about {duration(mean_seconds * left / min(self.study.workers, left))}" if left else ""
        print(f"{cell}: {outcome}; {left} left{about}", flush=True)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM are noted: nothing is cut in the middle. Set even where SIGINT is ignored: the cells would inherit that."""

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number

        before: dict[int, Any] = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def tail(self, cell: Cell) -> str:
        """The end of a cell's log, indented."""
        lines = (cell.folder / LOG).read_text(errors="replace", encoding="utf-8").splitlines()[-TAIL:]
        return "\n".join(f"    {line}" for line in lines)
