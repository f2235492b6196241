"""Where the seconds of a nano iteration go on a CPU: `skillsd fit -c conf/sokoban.yaml`, its parts timed from within.

    OMP_NUM_THREADS=2 python -m benchmarks.nano_cpu --iterations 12
    PYTHONPATH=../other/src:../other/envs python -m benchmarks.nano_cpu    # another checkout's code, for a comparison on this machine

Medians over the iterations after the second, in milliseconds; absolute figures mean little on shared cores, ratios from one sitting more.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from skillsd.cli import main as skillsd
from skillsd.engines.step import Stepper
from skillsd.rollout import Chat, Collector

CONF = Path(__file__).parents[1] / "conf"
PARTS: dict[str, tuple[type, tuple[str, ...]]] = {
    "model": (Stepper, ("forward",)),
    "drawing tokens": (Stepper, ("draw",)),
    "tokenizer": (Chat, ("prompt_ids_many", "turn_ids_many", "action_text")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=12)
    a = parser.parse_args()
    spent: dict[str, float] = defaultdict(float)
    iterations: list[dict[str, float]] = []

    def timed(part: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - start

        return call

    for part, (owner, names) in PARTS.items():
        for name in names:
            setattr(owner, name, timed(part, getattr(owner, name)))
    collect = Collector.collect

    def one(self: Collector, *args: Any, **kwargs: Any) -> Any:
        spent.clear()
        start = time.perf_counter()
        played = collect(self, *args, **kwargs)
        spent["rollout"] = time.perf_counter() - start
        iterations.append(dict(spent))
        return played

    Collector.collect = one  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        skillsd(
            ["fit", "-c", str(CONF / "sokoban.yaml"), f"--trainer.default_root_dir={folder}/run", f"--trainer.max_steps={a.iterations}",
             "--panel.enabled=false", "--adapter.enabled=false", "--trainer.enable_checkpointing=false",
             "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        )  # fmt: skip
        rows = list(csv.DictReader((Path(folder) / "run" / "metrics.csv").open(encoding="utf-8")))[2:]

    def median(values: Any) -> float:
        return statistics.median(values) * 1e3

    parts = {p: median(i.get(p, 0.0) for i in iterations[2:]) for p in ("rollout", *PARTS)}
    print(f"| part | ms |\n|---|---:|\n| rollout | {parts['rollout']:.0f} |")
    for part in PARTS:
        print(f"| - {part} | {parts[part]:.0f} |")
    print(f"| - environments and the rest | {parts['rollout'] - sum(parts[p] for p in PARTS):.0f} |")
    for key in ("teacher", "update", "summary"):
        print(f"| {key} | {median(float(r[f'time/{key}_s']) for r in rows):.0f} |")
    tokens = statistics.median(float(r["rollout/tokens"]) for r in rows)
    print(f"\n{tokens:.0f} tokens an iteration, {statistics.median(float(r['rollout/env_steps']) for r in rows):.0f} environment steps")


if __name__ == "__main__":
    main()
