"""Where the seconds of a fit go, on whatever device there is; several at once show how far they share it.

    python -m benchmarks.nano_fit                     # conf/sokoban.yaml, 30 iterations
    python -m benchmarks.nano_fit --fits 4 --steps 60 -- --data.rollout.cuda_graphs false
    python -m benchmarks.nano_fit --study conf/study/sokoban-nano.yaml --method skillsd    # a run of the study, with its panels


One line per fit; panels in between are part of `rest`. The median of an iteration leaves out the first three, in which CUDA graphs are
recorded.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from skillsd.study.cells import make_cells
from skillsd.study.settings import read_settings

CONF = Path(__file__).parents[1] / "conf"
COLUMNS = (
    "fit", "wall s", "start-up s", "panel before s", "panel after s", "rollout s", "teacher s", "update s", "rest s",
    "rollout s/iteration", "learner s/iteration", "episodes/s", "env steps/s",
)  # fmt: skip


def start(folder: Path, seed: int, settings: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "skillsd", "fit", *settings, f"--trainer.default_root_dir={folder}", f"--seed_everything={seed}"]
    folder.mkdir()
    log = (folder / "log.txt").open("wb")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={"OMP_NUM_THREADS": "1", **os.environ})


def measure(folder: Path, wall: float, seen: dict[str, float]) -> dict[str, float]:
    """Seconds and rates of one fit; `seen` says when a file first appeared, in seconds after the start."""
    with (folder / "metrics.csv").open(encoding="utf-8") as f:
        rows = [{k: float(v or 0) for k, v in row.items()} for row in csv.DictReader(f)]
    data = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]
    episodes = data["batch_tasks"] * data["group_size"] * len(rows)
    total = {k: sum(r[f"time/{k}_s"] for r in rows) for k in ("rollout", "teacher", "update")}
    before = seen["panel.json"] - seen["metrics.csv"]
    after = (folder / "panel.json").stat().st_mtime - (folder / "metrics.csv").stat().st_mtime
    late = rows[3:] or rows
    known = seen["metrics.csv"] + before + after + sum(total.values())
    return {
        "wall s": wall, "start-up s": seen["metrics.csv"], "panel before s": before, "panel after s": after,
        **{f"{k} s": v for k, v in total.items()}, "rest s": wall - known,
        "rollout s/iteration": statistics.median(r["time/rollout_s"] for r in late),
        "learner s/iteration": statistics.median(r["time/teacher_s"] + r["time/update_s"] for r in late),
        "episodes/s": episodes / total["rollout"], "env steps/s": sum(r["rollout/env_steps"] for r in rows) / total["rollout"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=int, default=1, help="fits at the same time")
    parser.add_argument("--steps", type=int, default=30, help="iterations of each")
    parser.add_argument("--config", default="conf/sokoban.yaml")
    parser.add_argument("--study", help="take the settings of this study's runs instead of --config and --steps")
    parser.add_argument("--method", default="skillsd", help="of the study")
    parser.add_argument("extra", nargs="*", help="further arguments of skillsd fit, after --")
    a = parser.parse_args()
    settings = ["-c", a.config, f"--trainer.max_steps={a.steps}", "--trainer.max_epochs=-1"]
    if a.study:
        cells = make_cells(read_settings(["-c", a.study]), lambda name: str(CONF / name))
        cell = next(c for c in cells if c.method == a.method)
        settings = [*(x for name in cell.configs for x in ("-c", name)), *cell.flags]
    with tempfile.TemporaryDirectory() as root:
        began = time.time()
        folders = [Path(root) / str(i) for i in range(a.fits)]
        running = {f: start(f, i, [*settings, *a.extra]) for i, f in enumerate(folders)}
        seen: dict[Path, dict[str, float]] = {f: {} for f in folders}
        wall: dict[Path, float] = {}
        while len(wall) < a.fits:
            for f in folders:
                for name in ("metrics.csv", "panel.json"):
                    if name not in seen[f] and (f / name).exists():
                        seen[f][name] = time.time() - began
                if f not in wall and running[f].poll() is not None:
                    wall[f] = time.time() - began
                    if running[f].returncode:
                        for other in running.values():
                            other.kill()
                        sys.exit((f / "log.txt").read_text(errors="replace", encoding="utf-8")[-3000:])
            time.sleep(0.02)
        print(f"| {' | '.join(COLUMNS)} |\n|{'---:|' * len(COLUMNS)}")
        for i, f in enumerate(folders):
            m = measure(f, wall[f], seen[f])
            print(f"| {i} | " + " | ".join(f"{m[c]:,.2f}" if "iteration" in c else f"{m[c]:,.1f}" for c in COLUMNS[1:]) + " |")


if __name__ == "__main__":
    main()
