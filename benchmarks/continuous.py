"""Continuous batching: how much of a rollout's time the GPU is busy, with episodes of 2 to 40 turns and environments that take their time.

    python -m benchmarks.continuous --size 0.6B --episodes 64 --group 8 --delay 0.05          # a GPU
    python -m benchmarks.continuous --size tiny --episodes 4 --group 2 --turns 2 4 --device cpu

Busy is the share of the time in which a kernel or a copy runs on the GPU, by a profiler in windows of 40 steps in every 160, of a second
run of the same rollout. On a CPU it is the time in the stepper's calls. The warm-up plays the episodes that start together.
`lockstep` gives all rows of a turn together and waits for all environments, as an engine without slots must.
"""

from __future__ import annotations

import argparse
import random
import sys
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

from skillsd.engines.in_process import CUDA_PREFILL, InProcessEngine, InProcessSession
from skillsd.engines.step import Stepper
from skillsd.policy import CacheBudget, LoraSettings, Policy, PolicySettings
from skillsd.rollout import Chat, Collector, Episode, RolloutSettings
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
    """Counts the stepper's calls and the seconds in them; with a window, profiles that many steps out of every four times as many."""

    def __init__(self, window: int = 0) -> None:
        self.window, self.count, self.seconds = window, 0, 0.0
        self.busy = self.profiled = 0.0
        self.profiler: Any = None
        Stepper.feed, Stepper.decode = (self.around(f) for f in STEPS)  # type: ignore[method-assign]

    def around(self, step: Any) -> Any:
        def timed(*args: Any) -> Any:
            if self.window and self.count % (4 * self.window) == self.window:
                self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA]).__enter__()
                torch.cuda.synchronize()
                self.began = time.perf_counter()
            elif self.profiler and self.count % (4 * self.window) == 2 * self.window:
                self.close()
            start = time.perf_counter()
            out = step(*args)
            self.seconds += time.perf_counter() - start
            self.count += 1
            return out

        return timed

    def close(self) -> None:
        """Ends a window. What the rollout does meanwhile is in no window."""
        if self.profiler:
            torch.cuda.synchronize()
            self.profiled += time.perf_counter() - self.began
            self.profiler.__exit__(None, None, None)
            self.busy += busy(self.profiler)
            self.profiler = None


STEPS = Stepper.feed, Stepper.decode


def busy(profiled: Any) -> float:
    """Seconds that the GPU worked: the union of its kernels and copies, those in CUDA graphs too."""
    events = (e for e in profiled.profiler.kineto_results.events() if e.device_type() == DeviceType.CUDA)
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events)
    total = end = 0
    for a, b in spans:
        total += max(0, b - max(a, end))
        end = max(a, b, end)
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
    parser.add_argument("--window", type=int, default=40, help="steps that are profiled, of every four times as many")
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", default=["continuous", "lockstep"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    a = parser.parse_args()
    settings = PolicySettings(model=str(random_model(a.size, a.folder, a.device)), quantise="nf4", lora=LoraSettings(r=16))
    policy = Policy(settings, a.device)
    gymnasium.register("bench/Load-v0", Load, disable_env_checker=True, order_enforce=False)
    print(f"Qwen3-{a.size}, {a.episodes} episodes of {a.turns[0]} to {a.turns[1]} turns, {a.rows} at a time, {a.delay * 1e3:.0f} ms a step")
    print("| | seconds | sampled tok/s | steps | measured s | busy |\n|---|" + "---:|" * 5, flush=True)
    rng = random.Random(0)
    rows = [Episode(Task(str(i), options={"turns": rng.randint(*a.turns), "prompt": i // a.group})) for i in range(a.episodes)]
    longest = 5 * a.words + a.turns[1] * (a.words + a.turn_tokens + 20)
    for name in a.kinds:
        engine = InProcessEngine(policy)
        policy.cache_budget = CacheBudget(a.rows, longest, True, CUDA_PREFILL)  # as the memory plan gives where there is enough
        collector = Collector(
            "bench/Load-v0", dict(delay=a.delay, words=a.words), Chat(policy.tokenizer, policy.stop_ids), engine,
            RolloutSettings(max_turn_tokens=a.turn_tokens, max_rows=a.rows, env_workers=a.workers, max_trajectory_tokens=longest), longest,
        )  # fmt: skip
        if name == "lockstep":
            engine.open = partial(lockstep, engine.open)  # type: ignore[method-assign]

        def collect(some: list[Episode], window: int = 0, collector: Collector = collector) -> tuple[float, int, Steps]:
            steps, start = Steps(window), time.perf_counter()
            played = collector.collect(some, seed=0, iteration=0)
            seconds = time.perf_counter() - start
            steps.close()
            return seconds, sum(t.n_actions for t in played), steps

        for _ in range(2):  # shapes are recorded when they are met again
            print(f"{name}: warm-up of {collect(rows[: a.rows])[0]:.1f} s", file=sys.stderr, flush=True)
        wall, tokens, steps = collect(rows)
        seconds, measured = steps.seconds, wall
        if policy.device.type == "cuda":
            profiled = collect(rows, a.window)[2]
            seconds, measured = profiled.busy, profiled.profiled
        print(f"| {name} | {wall:.1f} | {tokens / wall:.0f} | {steps.count} | {measured:.1f} | {seconds / measured:.0%} |", flush=True)
        collector.close()


if __name__ == "__main__":
    main()
