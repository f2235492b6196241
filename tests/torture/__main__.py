"""make torture: what CI does in small, for longer. Prints a table of what was tried and what was lost; the exit code is 1 if anything was.

python -m tests.torture                          # all of it
python -m tests.torture kills disk --kills 50    # parts of it
"""

from __future__ import annotations

import argparse
import csv
import errno
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from tests.e2e.runs import ROOT, RULES, VARIANTS, Run, Server, assert_equal, build_faults, overlay

MOMENTS = {
    "rollout": "skillsd.rollout.engine:InProcessSession.step",
    "update": "skillsd.module:SkillSD._step",
    "scoring": "skillsd.policy.policy:Policy._score",
    "log": "skillsd.callbacks.log:RunLog._append",
    "checkpoint": "skillsd.callbacks.resume:CheckpointFiles.save_checkpoint",
    "flush": "skillsd.durable:os.fsync",
    "rename": "skillsd.durable:os.replace",
    "bank": "skillsd.skills.bank:SkillBank.insert",
    "summariser": "skillsd.skills.callback:SkillBankCallback._submit",
    "panel": "skillsd.callbacks.panel:write_panel",
}


class Row(NamedTuple):
    """One line of the table."""

    what: str
    tried: int
    lost: int
    note: str = ""


def kills(a: argparse.Namespace, folder: Path) -> list[Row]:
    """SIGKILL, half of them at a random moment and half in a named call: every run must end as the one that was left alone."""
    draw, servers, rows = random.Random(a.seed), (Server(), Server()), Counter[str]()
    lost = Counter[str]()
    for round_, variant in enumerate(cycle(("rules", "ema", "base"))):
        if rows.total() >= a.kills:
            break
        whole, killed = (
            Run(folder / f"{n}-{variant}", s, folder / f"{variant}.yaml") for n, s in zip(("whole", "killed"), servers, strict=True)
        )
        if not whole.folder.exists():
            overlay(whole.overlay, **VARIANTS[variant])
            started = time.monotonic()
            whole.fit()
            seconds = time.monotonic() - started
        shutil.rmtree(killed.folder, ignore_errors=True)
        tried = []
        for _ in range(5):
            kind = draw.choice(["any moment", *MOMENTS]) if draw.random() < 0.5 else "any moment"
            if kind == "any moment":
                done = killed.kill_when(lambda: True, draw.uniform(0, seconds))
            else:
                done = killed.bombed((MOMENTS[kind], draw.randint(1, 6), draw.random() < 0.5))
            tried += [kind] * done
        try:
            killed.resume()
            assert_equal(killed.record(), whole.record())
        except AssertionError as e:
            print(f"round {round_}, {variant}, killed in {tried}: {e}", flush=True)
            lost.update(tried[-1:])
        rows.update(tried)
        print(f"\r{rows.total()} kills, {lost.total()} runs that differ", end="", flush=True)
    print()
    for server in servers:
        server.close()
    return [Row(f"SIGKILL: {k}", n, lost[k]) for k, n in sorted(rows.items())]


def disk(a: argparse.Namespace, folder: Path) -> list[Row]:
    """Every call that changes a file of a run fails once; and from every call on, all fail."""
    library = build_faults(folder)
    if library is None:
        return [Row("disk", 0, 0, "left out: no C compiler")]
    server, rows = Server(library), []
    file = overlay(folder / "disk.yaml", RULES, {"mode": "sync", "every": 1}, trainer={"max_epochs": 1})
    whole, run = (Run(folder / n, server, file) for n in ("disk-whole", "disk"))
    whole.fit()
    calls = run.fail(0, 0, False)[2]
    for code, lasting in ((errno.ENOSPC, True), (errno.EIO, False)):
        lost = 0
        name = f"{errno.errorcode[code]} {'from call n on' if lasting else 'in call n'}"
        for n in range(1, calls + 1, a.stride):
            try:
                run.survives(n, code, lasting, whole.record())
            except AssertionError as e:
                lost += 1
                print(f"{name}, n = {n}: {e}", flush=True)
            print(f"\r{name}: {n} of {calls}, {lost} lost", end="", flush=True)
        print()
        rows.append(Row(name, len(range(1, calls + 1, a.stride)), lost))
    server.close()
    return rows


def long(a: argparse.Namespace, folder: Path) -> list[Row]:
    """A run of many short iterations: memory, open files, threads and the time of an iteration stay what they are."""
    server = Server()
    gauge = {"class_path": "tests.torture.gauge.Gauge", "init_args": {"every": max(1, a.iterations // 100)}}
    file = overlay(
        folder / "long.yaml", RULES, {"mode": "ema", "rate": 0.3}, {"every_n_train_steps": 10},
        {"max_epochs": -1, "max_steps": a.iterations},
        callbacks=[gauge], data={"batch_tasks": 2},
    )  # fmt: skip
    run = Run(folder / "long", server, file)
    run.fit()
    server.close()
    with (run.folder / "gauge.csv").open() as f:
        lines = [{k: float(v) for k, v in x.items()} for x in csv.DictReader(f)]
    early, late = lines[len(lines) // 10 : len(lines) // 4], lines[-len(lines) // 4 :]

    def grown(key: str, of: Callable[[list[float]], float] = statistics.median) -> float:
        return of([x[key] for x in late]) / of([x[key] for x in early]) - 1

    return [
        Row("long run: resident memory", a.iterations, int(grown("resident_kib", max) > 0.02), f"{grown('resident_kib', max):+.1%}"),
        Row("long run: open files", a.iterations, int(grown("files", max) > 0), f"{grown('files', max):+.0%}"),
        Row("long run: threads", a.iterations, int(grown("threads", max) > 0), f"{grown('threads', max):+.0%}"),
        Row("long run: time an iteration", a.iterations, int(grown("seconds") > 0.1), f"{grown('seconds'):+.1%}"),
    ]


def _command(what: str, *args: str, note: str = "", **env: str) -> list[Row]:
    """A script that says itself what it found; 1 is lost if its exit code is not 0."""
    code = subprocess.run([sys.executable, *args], cwd=ROOT, env=os.environ | env, check=False).returncode
    return [Row(what, 1, int(code != 0), note)]


def properties(a: argparse.Namespace, folder: Path) -> list[Row]:
    """tests/properties with a hundred times as many examples."""
    return _command("properties", "-m", "pytest", "-q", "tests/properties", note="100 times the examples", SKILLSD_PROPERTIES="torture")


def longer(a: argparse.Namespace, folder: Path) -> list[Row]:
    """The tests that `make check` leaves out."""
    return _command("marked tests", "-m", "pytest", "-q", "-m", "torture")


def fuzz(a: argparse.Namespace, folder: Path) -> list[Row]:
    """A coverage-guided fuzz of what reads text and bytes."""
    return _command("fuzz", "tests/torture/fuzz.py", f"--minutes={a.minutes}", f"--seed={a.seed}", note=f"{a.minutes} minutes")


def mutants(a: argparse.Namespace, folder: Path) -> list[Row]:
    """Changes to objective/ and skills/ that their tests must notice."""
    return _command("mutants", "tests/torture/mutate.py", "objective", "skills")


PARTS = {"kills": kills, "disk": disk, "long": long, "tests": longer, "properties": properties, "fuzz": fuzz, "mutants": mutants}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all, if none is named")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--stride", type=int, default=1, help="of the disk's calls, every so many")
    parser.add_argument("--iterations", type=int, default=2000, help="of the long run")
    parser.add_argument("--minutes", type=float, default=10.0, help="of fuzzing")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    rows: list[Row] = []
    for name in a.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="skillsd-torture-") as folder:
            started = time.monotonic()
            rows += PARTS[name](a, Path(folder))
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    print("\n| what | tried | lost | |\n|---|---:|---:|---|")
    for row in rows:
        print(f"| {row.what} | {row.tried} | {row.lost} | {row.note} |")
    return int(any(row.lost for row in rows))


if __name__ == "__main__":
    sys.exit(main())
