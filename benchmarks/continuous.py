"""Continuous batching: how much of a rollout's time the GPU is busy, with episodes of 2 to 40 turns and environments that take their time.

    python benchmarks/continuous.py --size 0.6B --episodes 64 --group 8 --delay 0.05          # a GPU
    python benchmarks/continuous.py --size tiny --episodes 4 --group 2 --turns 2 4 --device cpu

Busy is the time in which a kernel or a copy runs on the GPU, by a profiler in a second run of the same rollout, as a share of that run and
of the first one, which has no profiler. On a CPU it is the time in the stepper's calls. The warm-up plays the episodes that start together.
`lockstep` gives all rows of a turn together and waits for all environments, as an engine without slots must.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import torch
from benchmarks.random_model import random_model
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from skillsd.policy import LoraSettings, Policy, PolicySettings
from skillsd.rollout import Chat, Collector, InProcessEngine, RolloutSettings, Row
from skillsd.rollout.engine import InProcessSession
from skillsd.rollout.step import Stepper
from skillsd.trajectory import Task


class Load(gymnasium.Env[str, str]):
    """A task's options name its number of turns and its prompt."""

    observation_space = action_space = gymnasium.spaces.Text(1)

    def __init__(self, delay: float, words: int) -> None:
        self.delay, self.words = delay, words

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        assert options is not None
        self.left, self.rng = options["turns"], random.Random(options["task_id"])
        return f"{options['prompt']} " + "up " * self.words * 4, {"task_id": options["task_id"], "instruction": ""}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        time.sleep(self.rng.expovariate(1 / self.delay) if self.delay else 0.0)
        self.left -= 1
        return "down " * self.words, 0.0, self.left == 0, False, {"completion": 0.0, "success": False}


class Steps:
    """Counts the stepper's calls, and the seconds in them."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        Stepper.feed, Stepper.decode = (self.around(f) for f in STEPS)  # type: ignore[method-assign]

    def around(self, step: Any) -> Any:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            out = step(*args)
            self.seconds += time.perf_counter() - start
            self.count += 1
            return out

        return timed


STEPS = Stepper.feed, Stepper.decode


def busy(profiled: Any, wall: float) -> float:
    """Seconds that the GPU worked: the union of its kernels and copies, those in CUDA graphs too."""
    events = (e for e in profiled.profiler.kineto_results.events() if e.device_type() == DeviceType.CUDA)
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events)
    total = end = 0
    for a, b in spans:
        total += max(0, b - max(a, end))
        end = max(a, b, end)
    covered = (end - spans[0][0]) / 1e9 if spans else 0.0
    if covered < 0.9 * wall:
        print(f"the profiler's {len(spans)} events cover {covered:.1f} of {wall:.1f} s: some may be lost", flush=True)
    return total / 1e9


def lockstep(open_session: Any, *args: Any) -> InProcessSession:
    session: InProcessSession = open_session(*args)
    session.continuous = False
    return session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.6B")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="episodes of one prompt")
    parser.add_argument("--rows", type=int, default=32, help="at one time")
    parser.add_argument("--turns", type=int, nargs=2, default=[2, 40])
    parser.add_argument("--turn-tokens", type=int, default=32)
    parser.add_argument("--words", type=int, default=60, help="of an observation; a prompt has four times as many")
    parser.add_argument("--delay", type=float, default=0.05, help="mean seconds of an environment's step, exponential")
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", default=["continuous", "lockstep"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    a = parser.parse_args()
    settings = PolicySettings(model=str(random_model(a.size, a.folder, a.device)), quantise="nf4", lora=LoraSettings(r=16))
    policy = Policy(settings, a.device)
    gymnasium.register("bench/Load-v0", Load, disable_env_checker=True, order_enforce=False)
    print(f"Qwen3-{a.size}, {a.episodes} episodes of {a.turns[0]} to {a.turns[1]} turns, {a.rows} at a time, {a.delay * 1e3:.0f} ms a step")
    print("| | seconds | sampled tok/s | steps | busy s | of the run | profiled s | busy of it |\n|---|" + "---:|" * 7, flush=True)
    rng = random.Random(0)
    rows = [Row(Task(str(i), options={"turns": rng.randint(*a.turns), "prompt": i // a.group})) for i in range(a.episodes)]
    for name in a.kinds:
        engine = InProcessEngine(policy)
        collector = Collector(
            "bench/Load-v0", dict(delay=a.delay, words=a.words), Chat(policy.tokenizer, policy.stop_ids), engine,
            RolloutSettings(max_turn_tokens=a.turn_tokens, max_rows=a.rows, env_workers=a.workers, max_trajectory_tokens=30000), 40000,
        )  # fmt: skip
        if name == "lockstep":
            engine.open = partial(lockstep, engine.open)  # type: ignore[method-assign]

        def collect(some: list[Row], collector: Collector = collector) -> tuple[float, int, Steps]:
            steps, start = Steps(), time.perf_counter()
            played = collector.collect(some, seed=0, iteration=0)
            return time.perf_counter() - start, sum(t.n_actions for t in played), steps

        collect(rows[: a.rows])
        wall, tokens, steps = collect(rows)
        profiled, seconds = wall, steps.seconds
        if policy.device.type == "cuda":
            with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as p:
                profiled = collect(rows)[0]
            seconds = busy(p, profiled)
        print(
            f"| {name} | {wall:.1f} | {tokens / wall:.0f} | {steps.count} | {seconds:.1f} | {seconds / wall:.0%} | {profiled:.1f} "
            f"| {seconds / profiled:.0%} |",
            flush=True,
        )
        collector.close()


if __name__ == "__main__":
    main()
