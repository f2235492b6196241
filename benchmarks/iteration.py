"""A whole iteration: 64 trajectories of 256 prompt and 256 sampled tokens, their teacher and the update, as TRL's peers are measured.

    python -m benchmarks.iteration --size 4B                                   # a GPU
    python -m benchmarks.iteration --size 4B --trl transformers --peer-python "env PYTHONPATH=/opt/peers python3"
    python -m benchmarks.iteration --size tiny --tasks 2 --group 2 --new 8     # does it run?
    python -m benchmarks.iteration --size 4B --cap 8 --tasks 2 --group 2 --prompt 3900 --new 192 -c conf/hardware/8gb.yaml

With --cap nothing can be reserved beyond that size less 0.75 GiB, which a CUDA context takes: what runs there runs on such a GPU.

It is `skillsd fit` on Sokoban with one turn a trajectory and random weights: conf/sokoban-paper.yaml, an EMA teacher, so that every row is
scored by student and teacher. Further arguments go to it. The first iteration, which compiles and records, is left out.

--trl adds TRL's GRPO with QLoRA after it, on the same weights and as many tokens; it has no teacher. Medians, the ratio is theirs by ours.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from benchmarks.peers import add_arguments, measurements
from benchmarks.random_model import random_model

CONF = Path(__file__).parents[1] / "conf"
BARE = ("--panel.enabled=false", "--adapter.enabled=false", "--trainer.logger=false", "--trainer.enable_checkpointing=false")
"""The record of the iterations alone."""
CAPPED = """
import sys
from skillsd.cli import main
import torch
torch.cuda.set_per_process_memory_fraction({} / torch.cuda.mem_get_info()[1])
sys.exit(main(sys.argv[1:]))
"""
PARTS = ("rollout", "teacher", "update")
HEAD = "| | iteration s | x ours | rollout s | teacher s | update s | peak reserved GiB | gap mean | gap max |\n|---|" + "---:|" * 8


def fit(command: list[str], run: Path, log: Path) -> list[dict[str, float]]:
    """The lines of the run's metrics.csv, each shown when it is there."""
    rows: list[dict[str, float]] = []
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as stdout, subprocess.Popen(command, stdout=stdout) as process:
        while True:
            ended = process.poll() is not None
            lines = (run / "metrics.csv").read_text(encoding="utf-8").splitlines(keepends=True) if (run / "metrics.csv").is_file() else []
            for row in list(csv.DictReader(line for line in lines if line.endswith("\n")))[len(rows) :]:
                if not rows:
                    print(
                        "".join(
                            line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.startswith("memory plan")
                        ),
                        end="",
                    )
                rows.append({k: float(v) for k, v in row.items() if v})
                seconds = [rows[-1][f"time/{k}_s"] for k in PARTS]
                print(f"iteration {len(rows)}: {sum(seconds):.1f} s, ends {time.perf_counter() - start:.0f} s after the start", flush=True)
            if ended:
                break
            time.sleep(0.2)
        if process.returncode:
            print(log.read_text(encoding="utf-8"), end="")
            sys.exit(process.returncode)
    return rows


def beside_trl(a: argparse.Namespace, model: Path, device: str, ours: str, own: float) -> None:
    steps = []
    options = dict(
        model=model, mode=a.trl, prompts=a.tasks, group=a.group, prompt=a.prompt, new=a.new, micro_batch=a.micro_batch, steps=a.iterations,
        memory=a.peer_memory, device=device,
    )  # fmt: skip
    for m in measurements("trl_grpo.py", a.peer_python, a.peer_timeout, **options):
        if "step" in m:
            steps.append(m)
            print(f"TRL step {m['step']}: {m['total_s']:.1f} s", flush=True)
        else:
            print("TRL " + ", ".join(f"{k} {v:.0f}" for k, v in m.items()), flush=True)
    if steps := steps[1:]:
        seconds = [statistics.median(m[f"{k}_s"] for m in steps) for k in ("total", "generation", "update")]
        reserved, allocated = (max(m[f"{k}_gib"] for m in steps) for k in ("reserved", "allocated"))
        total, generation, update = (f"{s:.1f}" for s in seconds)
        print(f"\n{HEAD}\n{ours}")
        print(f"| TRL, {a.trl} | {total} | {seconds[0] / own:.2f} | {generation} | - | {update} | {reserved:.2f} | - | - |")
        print(f"\npeak allocated by TRL: {allocated:.2f} GiB")


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
    parser.add_argument("--trl", choices=("transformers", "vllm"), help="also TRL, which generates so, in a process of --peer-python")
    add_arguments(parser)
    a, further = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(a.size, a.folder, device)
    if device == "cuda":
        torch.cuda.empty_cache()
    overlay = {
        "teacher": {"mode": "ema", "rate": 0.05},
        "model": {
            "policy": {"model": str(model), "context_length": max(4096, a.prompt + a.new + 512)},
            "micro_batch_tokens": a.micro_batch * (a.prompt + a.new),
        },
        "data": {
            "env_kwargs": {"max_turns": 1, "prompts": {"instruction": "up " * max(1, a.prompt - 24)}},
            "batch_tasks": a.tasks,
            "group_size": a.group,
            "rollout": {"max_turn_tokens": a.new, "max_trajectory_tokens": a.new, "max_rows": a.tasks * a.group},
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "overlay.yaml")
        file.write_text(yaml.safe_dump(overlay), encoding="utf-8")
        run = Path(folder, "run")
        settings = ["-c", str(CONF / "sokoban-paper.yaml"), "-c", str(file), f"--trainer.default_root_dir={run}"]
        settings += [f"--trainer.max_steps={a.iterations}", *BARE, *further]
        start = [sys.executable, "-m", "skillsd"] if a.cap is None else [sys.executable, "-c", CAPPED.format((a.cap - 0.75) * 2**30)]
        rows = fit([*start, "fit", *settings], run, Path(folder, "log"))
    peak, rows = max(r["memory/peak_gib"] for r in rows), rows[1:]

    def median(key: str) -> float:
        return statistics.median(r[key] for r in rows)

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    parts = [median(f"time/{k}_s") for k in PARTS]
    ours = f"| ours | {sum(parts):.1f} | 1 | {' | '.join(f'{p:.1f}' for p in parts)} | {peak:.2f} | {median('policy/logp_drift'):.4f} "
    ours += f"| {max(r['policy/logp_drift_max'] for r in rows):.3f} |"
    print(f"\n{a.size}, {name}: {a.tasks * a.group} trajectories, {median('rollout/tokens') / a.tasks / a.group:.0f} tokens each\n")
    print(f"{HEAD}\n{ours}", flush=True)
    if a.trl:
        beside_trl(a, model, device, ours, sum(parts))


if __name__ == "__main__":
    main()
