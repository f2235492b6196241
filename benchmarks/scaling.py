"""One rank and several, each with as much to do: `skillsd fit` as DDP runs it, its parts timed, beside what the model on paper says.

    python -m benchmarks.scaling --size 4B --rows 64 --out scaling                 # a host of 2 GPUs
    python -m benchmarks.scaling --size nano --rows 4 --accelerator cpu            # does it run? 2 processes, gloo

Episodes are of unequal length (benchmarks/episodes.py): --turns answers of --turn-tokens tokens, as many of the environment after each, a
prompt of --prompt tokens that a group shares. conf/sokoban-paper.yaml with random weights and an EMA teacher, so that student and teacher
score every row; bank, log and checkpoint of every iteration included. The first iteration, which compiles and records, is left out.

Tokens/s are all ranks' together. A rollout lasts until every rank has the whole batch, a learner's step until all have the same weights;
the iteration is all of it. benchmarks/scaling_worker.py says what is timed, benchmarks/scaling_paper.py what is predicted: the links are
fitted to the largest number of ranks, the rest is one rank's. Tables follow each number of ranks. Further arguments go to `skillsd fit`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarks.iteration import CONF, fit
from benchmarks.random_model import random_model
from benchmarks.scaling_paper import Links, Work, predict, straggler

SHAPES = {"nano": (64, 4, (2, 4)), "tiny": (64, 4, (2, 4))}
"""Prompt, tokens of a turn and turns of sizes that are there to see whether it runs."""
RATES = {"rollout": ("rollout/tokens", "stream"), "learner": ("learner/tokens", "learner")}
TOKENS = ("rollout/tokens", "rollout/action_tokens", "learner/tokens", "own_tokens")
NETWORK = Links(1.25e9, 1.25e9)
"""10 Gbit/s between hosts."""
SPREADS = (0.1, 0.2, 0.5, 1.0)


def overlay(a: argparse.Namespace, model: str, ranks: int) -> dict[str, Any]:
    turn, episode = 2 * a.turn_tokens + 8, a.turns[1] * (2 * a.turn_tokens + 8)
    tasks = a.rows // a.group * ranks
    return {
        "teacher": {"mode": "ema", "rate": 0.05},
        "skills": {"summariser": {"class_path": "skillsd.skills.RulesSummariser", "init_args": {"action_pattern": None}}},
        "model": {
            "policy": {
                "model": model, "context_length": a.prompt + episode + turn, "quantise": "none" if model == "nano" else "nf4",
                "gradient_checkpointing": True,
            },
            "micro_batch_tokens": a.micro_batch,
        },
        "data": {
            "env": "benchmarks.episodes:bench/Episodes-v0",
            "env_kwargs": {"n_tasks": tasks * a.iterations, "prompt": a.prompt, "words": a.turn_tokens, "turns": list(a.turns)},
            "batch_tasks": tasks, "group_size": a.group,
            "rollout": {"max_turn_tokens": a.turn_tokens, "max_trajectory_tokens": episode, "max_rows": a.rows},
        },
    }  # fmt: skip


def measure(a: argparse.Namespace, model: str, ranks: int, further: list[str]) -> list[list[dict[str, Any]]]:
    """The lines of each rank; the last of them is no iteration."""
    with tempfile.TemporaryDirectory() as folder:
        file, run = Path(folder, "overlay.yaml"), Path(folder, "run")
        file.write_text(yaml.safe_dump(overlay(a, model, ranks)), encoding="utf-8")
        os.environ["SCALING_OUT"] = folder
        settings = ["-c", str(CONF / "sokoban-paper.yaml"), "-c", str(file), f"--trainer.default_root_dir={run}"]
        settings += [f"--trainer.accelerator={a.accelerator}", f"--trainer.devices={ranks}", f"--trainer.max_steps={a.iterations}"]
        settings += ["--panel.enabled=false", "--adapter.enabled=false"]
        settings += ["--trainer.strategy=ddp"] * (ranks > 1)
        fit([sys.executable, "-m", "benchmarks.scaling_worker", "fit", *settings, *further], run, Path(folder, "log"))
        files = [Path(folder, f"rank-{n}.jsonl") for n in range(ranks)]
        deadline = time.monotonic() + 60
        while not all(f.is_file() for f in files) and time.monotonic() < deadline:  # the others may end a little later
            time.sleep(0.1)
        return [[json.loads(x) for x in f.read_text(encoding="utf-8").splitlines()] for f in files]


def median(lines: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(value(line) for line in lines)


def summary(ranks: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the iterations after the first. What ranks do at the same time is the slowest's; waits are their mean."""
    by_rank, last = [lines[1:-1] for lines in ranks], ranks[0][-1]
    lead, n = by_rank[0], len(by_rank[0])

    def part(name: str, over: Callable[[list[float]], float] = max) -> float:
        return statistics.median(over([lines[i]["seconds"].get(name, 0.0) for lines in by_rank]) for i in range(n))

    owns = [[lines[i]["seconds"]["rollout"] for lines in by_rank] for i in range(n)]
    lengths = [x for line in lead for x in line["lengths"]]
    mean = statistics.mean
    return {
        "rows": len(lead[0]["lengths"]) // len(ranks),
        "rates": {
            **{k: median(lead, lambda x, t=tokens, p=p: x[t] / x["seconds"][p]) for k, (tokens, p) in RATES.items()},
            "iteration": median(lead, lambda x: x["rollout/tokens"] / x["whole_s"]),
        },
        "seconds": {
            "whole": median(lead, lambda x: x["whole_s"]),
            **{k: median(lead, lambda x, k=k: x["seconds"][k]) for k in ("stream", "learner", "log", "bank", "checkpoint", "batch")},
            "rollout": part("rollout"), "update": part("update"),
            "wait for rollouts": part("stream gather wait", mean), "gather": part("stream gather"),
            "wait for updates": part("learner all_reduce_sum wait", mean) + part("learner gather wait", mean),
            "reduce": part("learner all_reduce_sum"),
            "wait for rank 0": part("stream broadcast wait"), "bank's messages": part("bank gather") + part("bank broadcast"),
        },
        "tokens": {k: median(lead, lambda x, k=k: x[k]) for k in TOKENS},
        "lengths": {"mean": mean(lengths), "sd": statistics.pstdev(lengths), "longest": max(lengths), "shortest": min(lengths)},
        "noise": mean(statistics.stdev(x) / mean(x) for x in owns) if len(ranks) > 1 else 0.0,
        "per_token": {k: mean(lines[-1]["gather"][k] for lines in ranks) for k in last["gather"]},
        "gradient_bytes": last["gradient_bytes"], "peak_gib": max(x["memory/peak_gib"] for lines in by_rank for x in lines),
    }  # fmt: skip


def on_paper(found: dict[int, dict[str, Any]]) -> tuple[Work, Links]:
    """One rank's work, and the links that explain what the gather and the reduction took among the most ranks."""
    ranks = max(found)
    one, most = found[1], found[ranks]
    s, x, lengths = one["seconds"], one["per_token"], one["lengths"]
    work = Work(
        rollout_s=s["rollout"], update_s=s["update"], tokens=one["tokens"]["rollout/tokens"], rows=one["rows"],
        spread=lengths["sd"] / lengths["mean"], longest=lengths["longest"] / lengths["mean"], bytes_per_token=x["bytes"],
        pickle_s=x["pickle_s"], unpickle_s=x["unpickle_s"], gradient_bytes=most["gradient_bytes"],
        leader_s=s["log"] + s["bank"] + s["batch"], step_s=s["learner"] - s["update"] - s["batch"],
        fixed_s=s["whole"] - s["rollout"] - s["learner"] - s["log"] - s["bank"], noise=most["noise"],
    )  # fmt: skip
    m, own = most["seconds"], most["tokens"]["own_tokens"]
    moving = max(1e-6, m["gather"] - own * (x["pickle_s"] + ranks * x["unpickle_s"]))
    reducing = max(1e-6, m["reduce"])
    links = Links((ranks - 1) * own * x["bytes"] / moving, 2 * (ranks - 1) / ranks * most["gradient_bytes"] / reducing)
    return work, links


def show(report: dict[str, Any]) -> None:
    found = {int(n): x for n, x in report["ranks"].items()}
    print(f"\n{report['settings']['size']}, {report['device']}, torch {report['torch']}, {found[1]['rows']} trajectories a rank")
    show_rates(found)
    if len(found) > 1:
        show_paper(found)


def show_rates(found: dict[int, dict[str, Any]]) -> None:
    one = found[min(found)]
    print("\n| ranks | rollout tok/s | learner tok/s | iteration tok/s |\n|---:|" + "---:|" * 3)
    for n, x in found.items():
        print(f"| {n} | " + " | ".join(f"{v:.0f} (x {v / one['rates'][k]:.2f})" for k, v in x["rates"].items()) + " |")
    print("\n| seconds | " + " | ".join(f"ranks: {n}" for n in found) + " |\n|---|" + "---:|" * len(found))
    for k in one["seconds"]:
        print(f"| {k} | " + " | ".join(f"{x['seconds'][k]:.4f}" for x in found.values()) + " |")
    for n, x in found.items():
        t, z, p = x["tokens"], x["lengths"], x["per_token"]
        of = n * x["rows"]
        print(
            f"\nranks: {n}. {of} trajectories of {t['rollout/tokens'] / of:.0f} tokens, {t['rollout/action_tokens'] / of:.0f} of them "
            f"sampled; behind the prompt {z['shortest']} to {z['longest']}, mean {z['mean']:.0f}, sd {z['sd'] / z['mean']:.0%} of it. "
            f"Gathered: {p['bytes']:.1f} bytes a token, {1e6 * p['pickle_s']:.2f} us to pickle, {1e6 * p['unpickle_s']:.2f} to unpickle; "
            f"{t['own_tokens'] * p['bytes'] / 2**20:.1f} MiB a rank. Reduced: {x['gradient_bytes'] / 2**20:.1f} MiB. "
            f"Ranks' own rollouts differ by {x['noise']:.1%} (sd). Peak: {x['peak_gib']:.1f} GiB."
        )


def show_paper(found: dict[int, dict[str, Any]]) -> None:
    work, links = on_paper(found)
    print(f"\nOn paper; links as fitted: gather {links.gather / 1e9:.2f} GB/s, reduction {links.reduce / 1e9:.2f} GB/s")
    keys = ("rollout", "gather", "update", "reduce", "leader", "step", "fixed", "seconds")
    print("\n| ranks | links | " + " | ".join(keys) + " | iteration tok/s | of W times one | measured |\n|---:|---|" + "---:|" * 11)
    one = predict(work, links, 1).rates()["iteration"]
    for n in (*found, 8, 64):
        for name, which in (("fitted", links), ("10 Gbit/s", NETWORK))[: 1 if n in found else 2]:
            p = predict(work, which, n)
            rate = p.rates()["iteration"]
            seen = f"{found[n]['rates']['iteration']:.0f} ({rate / found[n]['rates']['iteration'] - 1:+.1%})" if n in found else ""
            print(
                f"| {n} | {name} | "
                + " | ".join(f"{p.as_dict()[k]:.2f}" for k in keys)
                + f" | {rate:.0f} | {rate / n / one:.0%} | {seen} |"
            )
    print("\nHow much longer the longest episode of all ranks is than that of one, by the lengths' sd / mean, without a limit of turns:")
    print("\n| ranks | " + " | ".join(f"{x:g}" for x in SPREADS) + " |\n|---:|" + "---:|" * len(SPREADS))
    for n in (2, 8, 64):
        factors = (straggler(replace(work, spread=x, longest=math.inf, noise=0.0), n) for x in SPREADS)
        print(f"| {n} | " + " | ".join(f"{f:.2f}" for f in factors) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4B", help="of Qwen3, or nano")
    parser.add_argument("--rows", type=int, default=64, help="trajectories a rank")
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="the first has to be 1")
    parser.add_argument("--prompt", type=int, help="tokens; 1024")
    parser.add_argument("--turn-tokens", type=int, help="sampled in a turn, and about as many of the environment; 32")
    parser.add_argument("--turns", type=int, nargs=2, help="fewest and most; 8 16")
    parser.add_argument("--micro-batch", type=int, default=16384, help="tokens")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the weights")
    parser.add_argument("--out", type=Path, help="for scaling.json")
    parser.add_argument("--show", type=Path, help="a scaling.json: print its tables and run nothing")
    a, further = parser.parse_known_args()
    if a.show:
        show(json.loads(a.show.read_text(encoding="utf-8")))
        return
    if a.ranks[0] != 1 or a.rows % a.group or a.iterations < 2:
        parser.error("--ranks begins with 1, --rows is a multiple of --group, and there are two --iterations or more")
    prompt, turn_tokens, turns = SHAPES.get(a.size, (1024, 32, (8, 16)))
    a.prompt, a.turn_tokens, a.turns = a.prompt or prompt, a.turn_tokens or turn_tokens, a.turns or turns
    gpu = a.accelerator != "cpu" and torch.cuda.is_available()
    model = "nano" if a.size == "nano" else str(random_model(a.size, a.folder, "cuda" if gpu else "cpu"))
    if gpu:
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if gpu else "CPU"
    found: dict[int, dict[str, Any]] = {}
    report: dict[str, Any] = {"device": device, "torch": torch.__version__, "settings": {k: str(v) for k, v in vars(a).items()}}
    for n in a.ranks:
        print(f"\nranks: {n}", flush=True)
        lines = measure(a, model, n, further)
        found[n] = summary(lines)
        report |= {"ranks": found, "lines": {**report.get("lines", {}), n: lines}}
        if a.out:
            a.out.mkdir(parents=True, exist_ok=True)
            (a.out / "scaling.json").write_text(json.dumps(report), encoding="utf-8")
        show(report)


if __name__ == "__main__":
    main()
