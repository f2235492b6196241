"""A process with everything imported that forks those of each job: an import takes longer than a run of the tests' size."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "skillsd.cli.launch", "skillsd_sokoban", "transformers.models.qwen3.modeling_qwen3", "torch.utils.tensorboard",
)  # fmt: skip
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
"""On a CPU numbers are equal to the bit."""

Child = tuple[dict[str, str], str, str]
"""A process of a job: more environment variables, the file that it prints to, and the file for what its function returns."""


class ForkServer:
    """The process that forks; one job at a time.

    Args:
        modules: What is imported beside MODULES.
        environment: More variables of all processes.
    """

    def __init__(self, *modules: str, environment: dict[str, str] | None = None) -> None:
        self.process = python("-m", "tests.fork_server", *MODULES, *modules, environment=ON_CPU | (environment or {}))

    def fork(self, target: str, args: Sequence[Any], children: Sequence[Child], limit: float = float("inf")) -> list[int]:
        """Call `module:function` with args (JSON) once in each of the children; their pids. After `limit` seconds they are killed."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([target, args, children, limit]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def join(self) -> list[int]:
        """The exit statuses of the job's processes, when all have ended."""
        return self._answer()

    def close(self) -> None:
        self.process.communicate()

    def _answer(self) -> list[int]:
        assert self.process.stdout is not None
        return list(json.loads(self.process.stdout.readline()))


def python(*args: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start Python on the clone's modules, one thread wide."""
    path = ":".join(filter(None, (*(str(ROOT / x) for x in ("src", "envs", "")), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path} | environment
    return subprocess.Popen([sys.executable, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)


def work(target: str, args: Sequence[Any], environment: dict[str, str], log: str, result: str) -> None:
    """Do a child's part of a job and end the process."""
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    torch.set_num_threads(1)
    module, _, name = target.partition(":")
    code = 3
    try:
        torch.save(getattr(importlib.import_module(module), name)(*args), result)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def main(modules: Sequence[str]) -> None:
    """Answer each line of the standard input, a job, with the pids of its processes and then their exit statuses."""
    torch.set_num_threads(1)
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        target, args, children, limit = json.loads(line)
        running: dict[int, int] = {}
        for i, child in enumerate(children):
            pid = os.fork()
            if not pid:
                work(target, args, *child)
            running[pid] = i
        print(json.dumps(list(running)), flush=True)
        codes, until = [0] * len(children), time.monotonic() + limit
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0 if pid else 0.01)
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
