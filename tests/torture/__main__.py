"""make torture: what CI does in small, for longer. Prints a table of what was tried and what was lost; the exit code is 1 if anything was.

python -m tests.torture                          # all of it
python -m tests.torture kills disk --kills 50    # parts of it
"""

from __future__ import annotations

import argparse
import csv
import errno
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import count, islice, takewhile
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch
from tests.e2e.runs import (
    ROOT,
    RULES,
    VARIANTS,
    Fresh,
    Run,
    Server,
    assert_equal,
    build_faults,
    close_on_a_gpu,
    nf4_policy,
    overlay,
)  # fmt: skip

MOMENTS = {
    "rollout": "skillsd.engines.in_process:InProcessSession.step",
    "update": "skillsd.learner:Learner._step",
    "scoring": "skillsd.policy.policy:Policy._score",
    "log": "skillsd.callbacks.log:RunLog._append",
    "checkpoint": "skillsd.callbacks.resume:CheckpointFiles.save_checkpoint",
    "flush": "skillsd.files.durable:os.fsync",
    "rename": "skillsd.files.durable:os.replace",
    "bank": "skillsd.skills.bank:SkillBank.insert",
    "summariser": "skillsd.skills.selection:SkillSelection._submit",
    "panel": "skillsd.callbacks.panel:write_panel",
}


class Row(NamedTuple):
    """One line of the table."""

    what: str
    tried: int
    lost: int
    note: str = ""


T, R = TypeVar("T"), TypeVar("R")


def spread(jobs: int, work: Callable[[Server, T], R], todo: Iterable[T], make: Callable[[], Server] = Server) -> Iterator[R]:
    """`work` on each of `todo`, which may be endless, in `jobs` threads with a server each; what is done first comes first."""
    free, rest, running = SimpleQueue[Server](), iter(todo), set[Future[R]]()
    servers = [make() for _ in range(jobs)]

    def job(what: T) -> R:
        server = free.get()
        try:
            return work(server, what)
        finally:
            free.put(server)

    with ThreadPoolExecutor(jobs) as pool:
        for server in servers:
            free.put(server)
        try:
            while running := running | {pool.submit(job, x) for x in islice(rest, jobs - len(running))}:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            wait(running)
            for server in servers:
                server.close()


def kills(a: argparse.Namespace, folder: Path) -> list[Row]:
    """SIGKILL, half of them at a random moment and half in a named call: every run must end as the one that was left alone."""
    return killing("SIGKILL", a, folder, {name: VARIANTS[name] for name in ("rules", "ema", "base")})


def gpu(a: argparse.Namespace, folder: Path) -> list[Row]:
    """The same on a GPU, up to rounding (`close_on_a_gpu`): nano, and a Qwen3 of random weights in nf4 with the kernels and CUDA graphs."""
    if not torch.cuda.is_available():
        return [Row("SIGKILL on a GPU", 0, 0, "left out: no GPU")]
    variants = {"ema": VARIANTS["ema"], "nf4": VARIANTS["ema"] | {"policy": nf4_policy(folder / "qwen3")}}
    variants["deterministic"] = variants["nf4"] | {"trainer": {"deterministic": True}}
    return killing(torch.cuda.get_device_name(), a, folder, variants, Fresh, close_on_a_gpu)


def equal(record: dict[str, Any], whole: dict[str, Any]) -> str:
    """To the bit. Raises AssertionError if not."""
    assert_equal(record, whole)
    return ""


def killing(
    what: str, a: argparse.Namespace, folder: Path, variants: dict[str, dict[str, Any]], make: Callable[[], Server] = Server,
    alike: Callable[[dict[str, Any], dict[str, Any]], str] = equal,
) -> list[Row]:  # fmt: skip
    """Kills, until there are enough, runs of each of the variants in turn."""
    names, took = list(variants), dict[str, float]()

    def whole(server: Server, variant: str) -> Run:
        run = Run(folder / f"whole-{variant}", server, overlay(folder / f"{variant}.yaml", **variants[variant]))
        started = time.monotonic()
        run.fit()
        took[variant] = time.monotonic() - started
        return run

    records = {run.overlay.stem: run.record() for run in spread(a.jobs, whole, names, make)}

    def killed(server: Server, number: int) -> tuple[list[str], bool, str]:
        draw, variant, tried = random.Random(f"{a.seed} {number}"), names[number % len(names)], list[str]()
        run = Run(folder / f"killed-{number}", server, folder / f"{variant}.yaml")
        try:
            for _ in range(5):
                kind = draw.choice(["any moment", *MOMENTS]) if draw.random() < 0.5 else "any moment"
                if kind == "any moment":
                    was_killed = run.kill_when(lambda: True, draw.uniform(0, took[variant]))
                else:
                    was_killed = run.bombed((MOMENTS[kind], draw.randint(1, 6), draw.random() < 0.5))
                tried += [kind] * was_killed
            run.resume()
            good, difference = True, alike(run.record(), records[variant])
        except AssertionError as e:
            good, difference = False, str(e)
        if good:
            shutil.rmtree(run.folder)
        return tried, good, f"run {number}, {variant}, killed in {tried}: {difference}" if difference else ""

    rows, lost = Counter[str](), Counter[str]()
    numbers = takewhile(lambda _: rows.total() < a.kills, count())
    for tried, good, report in spread(a.jobs, killed, numbers, make):
        rows.update(tried)
        if report:
            print(f"\n{report}", flush=True)
        if not good:
            lost.update(tried[-1:])
        print(f"\r{rows.total()} kills, {lost.total()} runs that differ", end="", flush=True)
    print()
    return [Row(f"{what}: {k}", n, lost[k]) for k, n in sorted(rows.items())]


def disk(a: argparse.Namespace, folder: Path) -> list[Row]:
    """Every call that changes a file of a run fails once; and from every call on, all fail."""
    library = build_faults(folder)
    if library is None:
        return [Row("disk", 0, 0, "left out: no C compiler")]
    file = overlay(folder / "disk.yaml", RULES, {"mode": "sync", "every": 1}, trainer={"max_epochs": 1})
    server = Server(library)
    whole, counted = (Run(folder / n, server, file) for n in ("disk-whole", "disk-counted"))
    whole.fit()
    calls, record, rows = counted.fail(0, 0, False)[2], whole.record(), []
    server.close()
    for code, lasting in ((errno.ENOSPC, True), (errno.EIO, False)):
        name = f"{errno.errorcode[code]} {'from call n on' if lasting else 'in call n'}"
        tried = lost = 0

        def failing(server: Server, n: int, code: int = code, lasting: bool = lasting) -> str:
            run = Run(folder / f"disk-{n}", server, file)
            try:
                run.survives(n, code, lasting, record)
            except AssertionError as e:
                return f"n = {n}: {e}"
            shutil.rmtree(run.folder)
            return ""

        for problem in spread(a.jobs, failing, range(1, calls + 1, a.stride), partial(Server, library)):
            tried, lost = tried + 1, lost + bool(problem)
            if problem:
                print(f"\n{name}, {problem}", flush=True)
            print(f"\r{name}: {tried} of {len(range(1, calls + 1, a.stride))}, {lost} lost", end="", flush=True)
        print()
        rows.append(Row(name, tried, lost))
    return rows


def long(a: argparse.Namespace, folder: Path) -> list[Row]:
    """A run of many short iterations: memory, open files, threads and the CPU time of an iteration, in yardsticks, stay what they are."""
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
    for line in lines:
        line["time"] = line["seconds"] / line["yardstick"]
    early, late = lines[len(lines) // 10 : len(lines) // 4], lines[-len(lines) // 4 :]

    def grown(key: str, of: Callable[[list[float]], float] = statistics.median) -> float:
        return of([x[key] for x in late]) / of([x[key] for x in early]) - 1

    return [
        Row("long run: resident memory", a.iterations, int(grown("resident_kib") > 0.02), f"{grown('resident_kib'):+.1%}"),
        Row("long run: open files", a.iterations, int(grown("files", max) > 0), f"{grown('files', max):+.0%}"),
        Row("long run: threads", a.iterations, int(grown("threads", max) > 0), f"{grown('threads', max):+.0%}"),
        Row("long run: time an iteration", a.iterations, int(grown("time") > 0.05), f"{grown('time'):+.1%}"),
    ]


def _command(what: str, *args: str, note: str = "") -> list[Row]:
    """A script that says itself what it found; 1 is lost if its exit code is not 0."""
    code = subprocess.run([sys.executable, *args], cwd=ROOT, check=False).returncode
    return [Row(what, 1, int(code != 0), note)]


def properties(a: argparse.Namespace, folder: Path) -> list[Row]:
    """tests/properties with a hundred times as many examples, a share of them in each job."""
    share = math.ceil(100 / a.jobs)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/properties"]
    running = []
    for job in range(a.jobs):
        with (folder / f"{job}.log").open("w") as log:
            args = [*command, f"--hypothesis-seed={a.seed * 1000 + job}"]
            env = os.environ | {"SKILLSD_PROPERTIES": str(share)}
            running.append((subprocess.Popen(args, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT), Path(log.name)))
    lost = 0
    for process, path in running:
        if process.wait():
            lost += 1
            print(path.read_text(), flush=True)
    return [Row("properties", a.jobs, lost, f"each with {share} times the examples")]


def longer(a: argparse.Namespace, folder: Path) -> list[Row]:
    """The tests that `make check` leaves out."""
    return _command("marked tests", "-m", "pytest", "-q", "-m", "torture")


def mutants(a: argparse.Namespace, folder: Path) -> list[Row]:
    """Changes to objective/ and skills/ that their tests must notice, by mutmut."""
    return _command("mutants", "tests/torture/mutants.py", f"--jobs={a.jobs}")


PARTS = {
    "kills": kills, "gpu": gpu, "disk": disk, "long": long, "tests": longer, "properties": properties, "mutants": mutants,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all, if none is named")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--stride", type=int, default=1, help="of the disk's calls, every so many")
    parser.add_argument("--iterations", type=int, default=2000, help="of the long run")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="how many things beside each other")
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
