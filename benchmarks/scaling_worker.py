"""A rank of benchmarks.scaling: `skillsd` with its parts timed from within, a line of JSON an iteration in $SCALING_OUT/rank-N.jsonl.

Each wait for other ranks is made a barrier of its own before the collective, so that waiting and moving bytes are measured separately.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from skillsd import parallel
from skillsd.batch import Batch
from skillsd.callbacks import RunCheckpoint, RunLog
from skillsd.cli import main as skillsd
from skillsd.data import GroupStream
from skillsd.learner import Learner
from skillsd.module import SkillSD
from skillsd.skills.callback import SkillBankCallback
from skillsd.trajectory import TrajectoryGroup

PARTS: dict[str, tuple[type, str]] = {
    "stream": (GroupStream, "_groups"),  # until this rank has the whole batch
    "rollout": (GroupStream, "_play"),
    "learner": (SkillSD, "training_step"),
    "update": (Learner, "_within_memory"),  # forward and backward of this rank's rows, teacher included
    "batch": (Batch, "from_groups"),  # the whole batch as rows
    "log": (RunLog, "on_train_batch_end"),
    "bank": (SkillBankCallback, "on_train_batch_end"),
    "checkpoint": (RunCheckpoint, "on_train_batch_end"),
}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Watch:
    """Seconds by part, of the iteration under way."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.within: list[str] = []
        self.lines: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.local_groups: list[TrajectoryGroup] = []
        self.began = self.last = 0.0
        self.rank = self.gradient_bytes = 0
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, self.around(part, getattr(owner, name)))
        for name in ("gather", "broadcast", "all_reduce_sum"):
            setattr(parallel, name, self.together(name, getattr(parallel, name)))

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = now()
            if part == "stream":
                self.end(start)
            self.within.append(part)
            try:
                out = function(*args, **kwargs)
            finally:
                self.within.pop()
                self.last = now()
                self.seconds[part] += self.last - start
            if part == "learner":
                self.note(out["metrics"], args[1])
            return out

        return call

    def together(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if parallel.world() == 1:
                return function(*args)
            key = f"{self.within[-1] if self.within else 'elsewhere'} {name}"
            start = now()
            dist.barrier(group=parallel._gloo_group())
            met = now()
            out = function(*args)
            self.seconds[f"{key} wait"] += met - start
            self.seconds[key] += now() - met
            if name == "all_reduce_sum":
                self.gradient_bytes = sum(t.numel() * t.element_size() for t in args[0])
            return out

        return call

    def note(self, metrics: Mapping[str, float], groups: Sequence[TrajectoryGroup]) -> None:
        self.rank, self.local_groups = parallel.rank(), [groups[i] for i in parallel.share(len(groups))]
        self.facts = {k: metrics[k] for k in ("rollout/tokens", "rollout/action_tokens", "learner/tokens", "memory/peak_gib")}
        self.facts["lengths"] = [len(t.token_ids) for g in groups for t in g.trajectories]
        self.facts["own_tokens"] = sum(len(t.prompt_ids) + len(t.token_ids) for g in self.local_groups for t in g.trajectories)

    def end(self, at: float) -> None:
        """Close the iteration under way, if there is one."""
        if self.facts:
            self.lines.append({"seconds": dict(self.seconds), "whole_s": at - self.began, **self.facts})
        self.seconds.clear()
        self.began = at


def pickled(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """What gathering groups takes by token of prompt and episode: bytes, seconds to pickle and to unpickle."""
    tokens = sum(len(t.prompt_ids) + len(t.token_ids) for g in groups for t in g.trajectories)
    start = time.perf_counter()
    data = pickle.dumps(groups)
    made = time.perf_counter()
    pickle.loads(data)
    return {"bytes": len(data) / tokens, "pickle_s": (made - start) / tokens, "unpickle_s": (time.perf_counter() - made) / tokens}


def main() -> int:
    watch = Watch()
    code = skillsd(sys.argv[1:])
    watch.end(watch.last)
    if not code:
        lines = [*watch.lines, {"gather": pickled(watch.local_groups), "gradient_bytes": watch.gradient_bytes}]
        file = Path(os.environ["SCALING_OUT"], f"rank-{watch.rank}.jsonl")
        file.with_suffix(".tmp").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        file.with_suffix(".tmp").rename(file)  # somebody waits for it
    return code


if __name__ == "__main__":
    sys.exit(main())
