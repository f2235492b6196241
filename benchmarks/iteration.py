"""A whole iteration: 64 trajectories of 256 prompt and 256 sampled tokens, their teacher and the update, as TRL's peers are measured.

    python benchmarks/iteration.py --size 4B                                   # a GPU
    python benchmarks/iteration.py --size tiny --tasks 2 --group 2 --new 8     # does it run?
    python benchmarks/iteration.py --size 4B --cap 8 --tasks 2 --group 2 --prompt 3900 --new 192 -c conf/hardware/8gb.yaml

With --cap nothing can be reserved beyond that size less 0.75 GiB, which a CUDA context takes: what runs there runs on such a GPU.

It is `skillsd fit` on Sokoban with one turn a trajectory and random weights: conf/sokoban-paper.yaml, an EMA teacher, so that every row is
scored by student and teacher. Further arguments go to it. The first iteration, which compiles and records, is left out.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from benchmarks.random_model import random_model

CONF = Path(__file__).parents[1] / "conf"
CAPPED = """
import sys, torch
torch.cuda.set_per_process_memory_fraction({} / torch.cuda.mem_get_info()[1])
from skillsd.cli import main
sys.exit(main(sys.argv[1:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4B")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256, help="tokens, about")
    parser.add_argument("--new", type=int, default=256, help="sampled tokens of a trajectory")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows")
    parser.add_argument("--cap", type=float, help="GiB of the GPU's memory that may be used")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    a, further = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    overlay = {
        "teacher": {"mode": "ema", "rate": 0.05},
        "model": {
            "init_args": {
                "policy": {"model": str(random_model(a.size, a.folder, device)), "context_length": max(4096, a.prompt + a.new + 512)},
                "micro_batch_tokens": a.micro_batch * (a.prompt + a.new),
            }
        },
        "data": {
            "init_args": {
                "env_kwargs": {"max_turns": 1, "prompts": {"instruction": "up " * max(1, a.prompt - 24)}},
                "batch_tasks": a.tasks,
                "group_size": a.group,
                "rollout": {"max_turn_tokens": a.new, "max_trajectory_tokens": a.new, "max_rows": a.tasks * a.group},
            }
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "overlay.yaml")
        file.write_text(yaml.safe_dump(overlay))
        run = Path(folder, "run")
        settings = ["-c", str(CONF / "sokoban-paper.yaml"), "-c", str(file), f"--trainer.default_root_dir={run}"]
        settings += [f"--trainer.max_steps={a.iterations}", "--trainer.callbacks=[skillsd.callbacks.RunLog]", *further]
        start = [sys.executable, "-m", "skillsd"] if a.cap is None else [sys.executable, "-c", CAPPED.format((a.cap - 0.75) * 2**30)]
        done = subprocess.run([*start, "fit", *settings], stdout=subprocess.PIPE, text=True)
        print(*(line for line in done.stdout.splitlines() if line.startswith("memory plan")), sep="\n", flush=True)
        if done.returncode:
            sys.exit(done.returncode)
        rows = list(csv.DictReader((run / "metrics.csv").open()))
        peak, rows = max(float(r["memory/peak_gib"]) for r in rows), rows[1:]

    def median(key: str) -> float:
        return statistics.median(float(r[key]) for r in rows)

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    parts = [median(f"time/{k}_s") for k in ("rollout", "teacher", "update")]
    print(f"{a.size}, {name}: {a.tasks * a.group} trajectories, {median('rollout/tokens') / a.tasks / a.group:.0f} tokens each")
    print("| iteration s | rollout s | teacher s | update s | peak reserved GiB | gap mean | gap max |\n" + "|---:" * 7 + "|")
    print(
        f"| {sum(parts):.1f} | " + " | ".join(f"{p:.1f}" for p in parts) + f" | {peak:.2f} "
        f"| {median('policy/logp_drift'):.4f} | {max(float(r['policy/logp_drift_max']) for r in rows):.3f} |"
    )


if __name__ == "__main__":
    main()
