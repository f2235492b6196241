"""The README's table: runs of conf/sokoban.yaml over seeds and methods, and what came out.

    python benchmarks/seeds.py                    # fits what is missing in runs/seeds, then prints the table
    python benchmarks/seeds.py --seeds 0 1 --methods grpo

The interval of `after - before` is a 95% bootstrap over levels of the seed-averaged paired difference: it is conditional on
these seeds, and says how sure we are about other levels, not about other seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from skillsd.statistics import bootstrap_mean

METHODS = {"skill_sd": [], "grpo": ["-c", "conf/method/grpo.yaml"]}


def fit(folder: Path, seed: int, overlay: list[str]) -> None:
    """Run or continue one fit; a finished one is left alone."""
    panel = folder / "panel.json"
    if panel.is_file() and "after" in json.loads(panel.read_text()):
        return
    command = [sys.executable, "-m", "skillsd", "fit", "-c", "conf/sokoban.yaml", *overlay, "--seed_everything", str(seed)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # sums of floats depend on the number of threads
    subprocess.run([*command, "--trainer.default_root_dir", str(folder), "--ckpt_path", "last"], check=True, env=one_thread)


def differences(folder: Path, key: str = "success") -> np.ndarray:
    """after - before for each level of one run, [levels]."""
    panel = json.loads((folder / "panel.json").read_text())
    before, after = ([float(x[key]) for x in panel[when]["levels"]] for when in ("before", "after"))
    return np.array(after) - np.array(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--root", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--no-fit", action="store_true", help="only print the table of what is there")
    a = parser.parse_args()
    print("| method | before | after, by seed | after - before | the same, completion |\n|---|---|---|---|---|")
    seeds_mean: dict[str, np.ndarray] = {}
    for method in a.methods:
        folders = [a.root / f"{method}-{seed}" for seed in a.seeds]
        for folder, seed in zip(folders, a.seeds, strict=True):
            if not a.no_fit:
                fit(folder, seed, METHODS[method])
        panels = [json.loads((f / "panel.json").read_text()) for f in folders]
        after = ", ".join(f"{100 * p['after']['success']:.1f}" for p in panels)
        seeds_mean[method] = np.mean([differences(f) for f in folders], 0)
        completion = np.mean([differences(f, "completion") for f in folders], 0)
        before = 100 * panels[0]["before"]["success"]
        print(f"| {method} | {before:.1f} | {after} | {points(seeds_mean[method])} | {points(completion)} |")
    if len(a.methods) == 2:
        first, second = a.methods
        print(f"\n{first} - {second}, success: {points(seeds_mean[first] - seeds_mean[second])}")


def points(per_level: np.ndarray) -> str:
    """Mean and 95% bootstrap interval over levels, in percentage points."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in bootstrap_mean(per_level.tolist())))


if __name__ == "__main__":
    main()
