"""The skill bank under load: how fast it takes skills and gives one back, in how much memory, and what readers see beside a writer.

    python -m benchmarks.bank                                      # 1,000,000 skills over 10,000 tasks, capacity 8 and none
    python -m benchmarks.bank --sizes 20000 100000 --tasks 1000
    PYTHONPATH=../other/src python -m benchmarks.bank              # another checkout's code, for a comparison on this machine

A batch is what an iteration inserts in one call: `--batch` skills, 8 a task, three texts of 200 characters each. Retrievals are of
random tasks, first as they lie, then of tasks whose skills were all used (the UCB bound of each is computed). The bank lies in the
temporary folder. On shared cores the rate by the process's own CPU seconds says more than the one by the clock.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from skillsd.skills import Skill, SkillBank

GROUP = 8
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "klmnrst"]


def batches(n: int, tasks: int, size: int, seed: int = 0) -> Iterator[list[Skill]]:
    """`n` different skills in calls of `size`, of random tasks, 8 a task."""
    rng = random.Random(seed)
    prose = " ".join(rng.choices(WORDS, k=200_000))
    made = 0
    while made < n:
        batch: list[Skill] = []
        while len(batch) < min(size, n - made):
            task = f"task-{rng.randrange(tasks):05d}"
            for member in range(min(GROUP, size - len(batch), n - made - len(batch))):
                first, second, third = (prose[at : at + 200] for at in rng.choices(range(len(prose) - 200), k=3))
                reward = rng.random()
                batch.append(Skill(first, second, third, task, source_member=member, source_reward=reward, source_completion=reward))
        yield batch
        made += size


def resident() -> float:
    """MiB of memory that this process holds."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(seconds: list[float]) -> str:
    """Median and p99 in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:.3f} / {sorted(seconds)[int(len(seconds) * 0.99)] * 1e3:.3f}"


def fill(path: Path, capacity: int | None, sizes: list[int], tasks: int, batch: int, start: int, out: Any) -> None:
    """One writer that fills a bank to each of `sizes`."""
    rng = random.Random(1)
    stream = batches(sizes[-1], tasks, batch)
    done = iteration = start
    with SkillBank(path, capacity=capacity) as bank:
        for size in sizes:
            spent, cpu, since = 0.0, 0.0, done
            while done < size:
                skills = next(stream)  # made outside of the time
                cpu -= time.process_time()
                spent += timed(lambda: bank.insert(skills, iteration))  # noqa: B023
                cpu += time.process_time()
                done, iteration = done + len(skills), iteration + 1
            names = [f"task-{rng.randrange(tasks):05d}" for _ in range(2000)]
            found = [timed(lambda: bank.retrieve(name)) for name in names]  # noqa: B023
            for name in names[:20]:
                for skill in bank.skills(name):
                    bank.record_use(skill.skill_id or 0, iteration)
            used = [timed(lambda: bank.retrieve(name)) for name in names[:20] * 50]  # noqa: B023
            print(
                f"| {capacity} | {size:,} | {len(bank):,} | {(done - since) / spent:,.0f} | {(done - since) / cpu:,.0f} | {spread(found)} "
                f"| {spread(used)} | {resident():.0f} |",
                flush=True,
            )
        singles = list(batches(1000, tasks, 1, seed=2))
        out.put(1000 / sum(timed(lambda: bank.insert(one, iteration)) for one in singles))  # noqa: B023


def opening(path: Path, capacity: int | None, tasks: int, out: Any) -> None:
    """A process of its own that opens the bank."""
    for read_only in (False, True):
        start = time.perf_counter()
        with SkillBank(path, capacity=capacity, read_only=read_only) as bank:
            opened = time.perf_counter() - start
            bank.retrieve("task-00001")
            out.put((opened * 1e3, (time.perf_counter() - start) * 1e3, resident()))


def write(path: Path, n: int, tasks: int, batch: int, out: Any) -> None:
    """The writer that the readers look at."""
    spent = 0.0
    with SkillBank(path, capacity=None) as bank:
        for i, skills in enumerate(batches(n, tasks, batch)):
            spent += timed(lambda: bank.insert(skills, i))  # noqa: B023
    out.put(n / spent)


def read(path: Path, n: int, tasks: int, batch: int, keep: bool, done: Event, out: Any) -> None:
    """A reader: opens, reads the numbers, retrieves, adds up a task, closes; `keep` lets each bank stay open for a second."""
    rng = random.Random(keep)
    opens, found, sizes, wrong = [], [], [0], []
    while not done.is_set():
        try:
            start = time.perf_counter()
            with SkillBank(path, read_only=True) as bank:
                opens.append(time.perf_counter() - start)
                stop = time.perf_counter() + keep
                before = (bank.position, bank.stats())
                while True:
                    name = f"task-{rng.randrange(tasks):05d}"
                    found.append(timed(lambda: bank.retrieve(name)))  # noqa: B023
                    if time.perf_counter() >= stop:
                        break
                held = bank.tasks()
                if len(held) != before[1]["tasks"] or not all(bank.skills(t) for t in held[:20]):
                    wrong.append("tasks")
                size = len(bank)
                if (bank.position, bank.stats()) != before or size < sizes[-1] or (size % batch and size != n):
                    wrong.append(f"a bank of {size} after one of {sizes[-1]}")
                sizes.append(size)
        except (OSError, ValueError) as e:
            wrong.append(str(e))
    out.put((len(opens), spread(opens), spread(found), len(set(sizes)) - 1, len(wrong), wrong[:1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 500_000, 1_000_000])
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--capacities", nargs="+", default=["8", "none"])
    parser.add_argument("--beside", type=int, default=100_000, help="skills that a writer inserts beside two readers; 0 leaves that out")
    a = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()

    def alone(target: Callable[..., None], *args: Any) -> None:
        process = context.Process(target=target, args=(*args, out))
        process.start()
        process.join()
        assert process.exitcode == 0

    print(
        "| capacity | skills | held | insertions/s | per CPU s | retrieve ms, median / p99 | all used | memory MiB |\n|---|" + "---:|" * 7
    )
    opened = []
    for capacity in (None if c == "none" else int(c) for c in a.capacities):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bank.sqlite"
            alone(fill, path, capacity, a.sizes, a.tasks, a.batch, 0)
            single, mib = out.get(), path.stat().st_size / 2**20
            alone(opening, path, capacity, a.tasks)
            opened += [
                f"| {capacity} | {mib:,.0f} | {single:,.0f} | {how} | {ms:.1f} | {first:.1f} | {memory:.0f} |"
                for how, (ms, first, memory) in (("writer", out.get()), ("reader", out.get()))
            ]
    print(
        "\n| capacity | file MiB | insertions/s, one a call | opened as | ms | with a retrieval | memory MiB |\n|---|---:|---:|---|"
        + "---:|" * 3
    )
    print("\n".join(opened))
    if a.beside:
        with tempfile.TemporaryDirectory() as folder:
            path, done = Path(folder) / "bank.sqlite", context.Event()
            SkillBank(path, capacity=None).close()
            readers = [context.Process(target=read, args=(path, a.beside, a.tasks, a.batch, keep, done, out)) for keep in (False, True)]
            for reader in readers:
                reader.start()
            alone(write, path, a.beside, a.tasks, a.batch)
            rate = out.get()
            done.set()
            rows = sorted(out.get() for _ in readers)
            print(f"\nA writer of {a.beside:,} skills beside two readers: {rate:,.0f} insertions/s\n")
        print("| reader | opened | open ms, median / p99 | retrieve ms | sizes seen | wrong |\n|---|" + "---:|" * 5)
        for name, (opens, open_ms, found, sizes, wrong, why) in zip(("holds each for 1 s", "opens again and again"), rows, strict=True):
            print(f"| {name} | {opens} | {open_ms} | {found} | {sizes} | {wrong} {' '.join(why)} |")


if __name__ == "__main__":
    main()
