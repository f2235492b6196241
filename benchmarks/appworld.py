"""What our layer costs on top of AppWorld's engine: python -m benchmarks.appworld [--envs 32] [--repeat 100]

One run measures both sides on the same task and code: the stock engine in its own process, and the environment. Medians, in milliseconds;
memory is the proportional share (PSS) of the warm processes and all worlds together.
"""

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from skillsd_appworld import AppWorldEnv

CODES = ("x = 1", "print(apis.supervisor.show_profile())")
STOCK = """
import os, sys, tempfile
from time import CLOCK_MONOTONIC, clock_gettime
from statistics import median
from appworld import AppWorld, update_root
root, task, repeat = sys.argv[1], sys.argv[2], int(sys.argv[3])
update_root(root)
now = lambda: clock_gettime(CLOCK_MONOTONIC)  # the others stand still while a world is open
def timed(call):
    start = now(); call(); return 1000 * (now() - start)
folder = tempfile.mkdtemp()
def world(): return AppWorld(task, experiment_name=folder, load_ground_truth=False, timeout_seconds=30)
print("reset_first", timed(world))
print("reset", median(timed(world) for _ in range(10)))
w = world()
for saving in (True, False):
    if not saving:
        w._save_state = w.save_logs = lambda *a: None
    for i, code in enumerate(sys.argv[4:]):
        print(f"execute_{i}_{saving}", median(timed(lambda: w.execute(code)) for _ in range(repeat)))
"""


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def pss_mb(pids: list[int]) -> float:
    kb = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            kb += int(line.split()[1]) if line.startswith("Pss:") else 0
    return kb / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=100)
    options = parser.parse_args()
    answers = [f"```python\n{code}\n```" for code in CODES]
    env = AppWorldEnv(max_turns=100_000)
    tasks = [t["task_id"] for t in env.tasks("train")]
    settings = env._settings
    command = [str(settings.python), "-c", STOCK, str(settings.root), tasks[0], str(options.repeat), *CODES]
    printed = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": "0"}, encoding="utf-8").stdout
    stock = {name: float(value) for name, value in (line.split() for line in printed.splitlines() if line.count(" ") == 1)}

    first = timed(lambda: env.reset(options={"task_id": tasks[0]}))
    reset = statistics.median(timed(lambda: env.reset(options={"task_id": tasks[0]})) for _ in range(20))
    ours = [statistics.median(timed(lambda a=a: env.step(a)) for _ in range(options.repeat)) for a in answers]
    score = statistics.median(
        timed(lambda t=t: (env.reset(options={"task_id": t}), env.step(env.solution()[0]))) - reset for t in tasks[:9]
    )

    def row(name: str, engine: float | None, ours: float, bar: str = "") -> None:
        other = "" if engine is None else f"{engine:10.1f}"
        ratio = "" if engine is None else f"{ours / engine:8.2f}"
        print(f"{name:44}{other:>10}{ours:10.1f}{ratio:>8}  {bar}")

    print(f"{'':44}{'engine':>10}{'ours':>10}{'ratio':>8}")
    row("first reset (ours: warm-up done, ms)", stock["reset_first"], first)
    row("reset (ms)", stock["reset"], reset, "bar: 300")
    for i, code in enumerate(CODES):
        row(f"{code} (ms)", stock[f"execute_{i}_True"], ours[i])
        row("  the engine without its own logs (ms)", stock[f"execute_{i}_False"], ours[i])
        print(f"  overhead of our layer (ms){ours[i] - stock[f'execute_{i}_False']:28.2f}{'':8}  bar: 2")
    row("solution: run, judged on a fresh world (ms)", None, score)

    alone = pss_mb(env._pool.pids())
    envs = [env, *(AppWorldEnv(max_turns=100_000) for _ in range(options.envs - 1))]
    with ThreadPoolExecutor(8) as threads:
        start = time.perf_counter()
        list(threads.map(lambda e, i: e.reset(options={"task_id": tasks[i % len(tasks)]}), envs, range(len(envs))))
        for answer in answers:
            list(threads.map(lambda e, a=answer: e.step(a), envs))
        seconds = time.perf_counter() - start
    pids = [e._world.child.pid for e in envs if e._world is not None]
    total = pss_mb([*env._pool.pids(), *pids])
    print(f"{len(pids)} worlds at once: {total:.0f} MiB in all (bar: 4096), the warm processes alone {alone:.0f}, ", end="")
    print(f"a further world {(total - alone) / len(pids):.0f}; started and stepped twice in {seconds:.1f} s")
    for e in envs:
        e.close()


if __name__ == "__main__":
    main()
