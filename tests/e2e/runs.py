"""Whole tiny runs in processes of their own, which can be killed or denied the disk at a given moment; what they leave, compared."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import yaml
from tests.conftest import SHAPE, WIDE
from tests.e2e.commands import boards, metrics
from tests.fork_server import ROOT, ForkServer, python
from tests.ranks import near
from transformers import AutoModelForCausalLM, Qwen3Config

from skillsd import cli
from skillsd.files.checkpoint import newest_good, read_checkpoint
from skillsd.policy.nano import build_tokenizer

STEPS = 9  # 3 epochs of 8 tasks, 3 an iteration: the last one of an epoch is a partial one

Bomb = tuple[str, int, bool]
"""Function, which of its calls in the process, and whether its work is done first."""
Fault = tuple[str, int, int, int]
"""Folder, which of the calls that change something in it fails (0: none), with what errno, and whether all after it fail too."""


def plant(where: str, calls: int, after: bool) -> None:
    """SIGKILL this process in the n-th call of a function, before or after it has done its work."""
    module, _, name = where.partition(":")
    *path, last = name.split(".")
    owner: Any = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    function, left = getattr(owner, last), calls

    @wraps(function)
    def bombed(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        result = function(*args, **kwargs) if left or after else None
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, last, bombed)


def command(args: list[str], bomb: Bomb | None, fault: Fault | None) -> None:
    """`skillsd ARGS` in this process, which ends with it."""
    sys.argv = ["skillsd"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    if bomb:
        plant(*bomb)
    library = ctypes.CDLL(None)
    if fault:
        library.fault_arm(fault[0].encode(), *fault[1:])
    code = 3
    try:
        code = cli.main(args)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    if fault:
        library.fault_first.restype = ctypes.c_char_p
        print("disk calls:", library.fault_count(), library.fault_hits(), library.fault_first().decode(), flush=True)
    os._exit(code)


class Server(ForkServer):
    """Runs one command after another, each in a process of its own.

    Args:
        preload: A shared library that stands in for functions of libc (`faults.c`).
        environment: More variables.
    """

    def __init__(self, preload: Path | None = None, environment: dict[str, str] | None = None) -> None:
        self.preload = preload
        super().__init__(__name__, environment=(environment or {}) | ({} if preload is None else {"LD_PRELOAD": str(preload)}))

    def start(self, args: list[str], log: Path, bomb: Bomb | None = None, fault: Fault | None = None) -> int:
        """Begin a command; its pid."""
        (pid,) = self.fork(f"{__name__}:command", [args, bomb, fault], [({}, str(log), os.devnull)])
        return pid

    def wait(self) -> int:
        """Its exit status."""
        (code,) = self.join()
        return code


class Fresh(Server):
    """The same on a GPU, with a new process for each command: CUDA does not survive a fork."""

    def __init__(self) -> None:
        self.preload = None

    def start(self, args: list[str], log: Path, bomb: Bomb | None = None, fault: Fault | None = None) -> int:
        job = json.dumps([f"{__name__}:command", [args, bomb, fault], {}, str(log), os.devnull])
        code = "import json, sys; from tests.fork_server import work; work(*json.loads(sys.argv[1]))"
        self.process = python("-c", code, job, environment={})
        return self.process.pid

    def wait(self) -> int:
        return self.process.wait()

    def close(self) -> None:
        pass


class Run:
    """A run folder, its overlay, and what to do with it."""

    def __init__(self, folder: Path, server: Server, overlay: Path) -> None:
        self.folder, self.server, self.overlay, self.log = folder, server, overlay, folder.with_suffix(".log")

    def args(self, *more: str) -> list[str]:
        configs = [x for c in ("conf/sokoban.yaml", "conf/method/skillsd.yaml", str(self.overlay)) for x in ("-c", c)]
        return ["fit", *configs, f"--trainer.default_root_dir={self.folder}", *more]

    def fit(self, *more: str, code: int = 0) -> str:
        self.server.start(self.args(*more), self.log)
        found, text = self.server.wait(), self.log.read_text()
        assert found == code, text[-5000:]
        return text

    def resume(self, *more: str, code: int = 0) -> str:
        return self.fit("--ckpt_path", "last", *more, code=code)

    def bombed(self, bomb: Bomb, *more: str) -> bool:
        """Go on; whether the bomb exploded before the run ended."""
        self.server.start(self.args("--ckpt_path", "last", *more), self.log, bomb)
        return self._killed()

    def kill(self, where: str, calls: int, after: bool, *more: str) -> None:
        """Go on until the bomb explodes."""
        bomb = (where, calls, after)
        assert self.bombed(bomb, *more), f"{bomb} did not explode\n{self.log.read_text()[-5000:]}"

    def _killed(self) -> bool:
        code = self.server.wait()
        assert code in (0, -signal.SIGKILL), f"{code}\n{self.log.read_text()[-5000:]}"
        return code != 0

    def fail(self, n: int, code: int, lasting: bool) -> tuple[int, str, int]:
        """Go on while the n-th call that changes a file of the run, and perhaps all after it, fails with errno `code`.

        Returns:
            the exit status, what was printed, and how many such calls there were.
        """
        self.server.start(self.args("--ckpt_path", "last"), self.log, None, (str(self.folder), n, code, int(lasting)))
        status, text = self.server.wait(), self.log.read_text()
        counted = re.search(r"disk calls: (\d+) (\d+)", text)
        assert counted, text[-3000:]
        assert not n or int(counted[2]), f"there is no call {n}"
        return status, text, int(counted[1])

    def survives(self, n: int, code: int, lasting: bool, record: dict[str, Any]) -> None:
        """A run from the start that meets such a disk (`fail`): one line, an exit code that is not 0, the last checkpoint whole; then it
        goes on and leaves `record`. After a single failure, as SQLite tries some calls again, it may also leave `record` at once."""
        shutil.rmtree(self.folder, ignore_errors=True)
        status, text, _ = self.fail(n, code, lasting)
        lines = [x for x in text.splitlines() if x.startswith("error: ")]
        refused = status == 2 and len(lines) == 1 and "Traceback" not in text
        assert refused or (status == 0 and not lines and not lasting), f"{status}: {text[-3000:]}"
        found = newest_good(self.folder / "checkpoints")
        if found is not None:
            read_checkpoint(found)
        if refused:
            self.resume()
        assert_equal(self.record(), record, f"call {n}")

    def stop_when(self, ready: Callable[[], bool], number: int, delay: float = 0.0) -> tuple[int, float, str]:
        """Go on and send a signal; the exit status, the seconds until the end, and what was printed."""
        pid = self.server.start(self.args("--ckpt_path", "last"), self.log)
        while not ready():
            os.kill(pid, 0)
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(pid, number)
        started = time.monotonic()
        status = self.server.wait()
        return status, time.monotonic() - started, self.log.read_text()

    def kill_when(self, ready: Callable[[], bool], delay: float) -> bool:
        """Go on, and kill from outside `delay` seconds after `ready`. False if the run ended before."""
        pid = self.server.start(self.args("--ckpt_path", "last"), self.log)
        with suppress(ProcessLookupError):  # it has ended
            while not ready():
                os.kill(pid, 0)
                time.sleep(0.002)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        return self._killed()

    def rows(self) -> list[dict[str, str]]:
        return metrics(self.folder) if (self.folder / "metrics.csv").is_file() else []

    def has_rows(self, n: int) -> bool:
        return self.folder.is_dir() and len(self.rows()) >= n

    def checkpoint(self) -> dict[str, Any]:
        return dict(torch.load(self.folder / "checkpoints" / "last.ckpt", weights_only=True))

    def record(self) -> dict[str, Any]:
        """All that a run leaves, but for how long things took."""
        db = sqlite3.connect(self.folder / "bank.sqlite")
        tables = {t: sorted(db.execute(f"SELECT * FROM {t}")) for t in ("head", "event", "skill", "state")}
        journal = db.execute("PRAGMA journal_mode").fetchone()[0]
        db.close()
        checkpoint = self.checkpoint()
        checkpoint["run_log"].pop("metrics.csv")
        loop = checkpoint["loops"]["fit_loop"]
        checkpoint["loops"] = {k: v for k, v in loop.items() if "val_loop" not in k}  # a resumed run counts its validations differently
        return {
            "metrics": [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in self.rows()],
            "trajectories": (self.folder / "trajectories.jsonl").read_bytes(),
            "panel": json.loads((self.folder / "panel.json").read_text()),
            "adapter": (self.folder / "adapter" / "student" / "adapter_model.safetensors").read_bytes(),
            "checkpoint": {k: v for k, v in checkpoint.items() if k not in ("callbacks", "settings")},
            "journal": journal,
            **tables,
        }


def build_faults(folder: Path) -> Path | None:
    """The library that makes calls fail; None where there is no C compiler or no Linux."""
    compiler, library = shutil.which("cc") or shutil.which("gcc"), folder / "faults.so"
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    source = ROOT / "tests" / "torture" / "faults.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, and where not."""
    near(a, b, 0.0, where)


def overlay(
    path: Path, bank: dict[str, Any], teacher: dict[str, Any], checkpoint: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None, panel: dict[str, Any] | None = None, actor: str = "student",
    callbacks: Sequence[dict[str, Any]] = (), data: dict[str, Any] | None = None, log: dict[str, Any] | None = None, **model: Any,
) -> Path:  # fmt: skip
    """Everything tiny; `bank`, `teacher`, `checkpoint`, `panel` and `log` are arguments of their callbacks."""
    model = {
        "policy": {"model": "nano", "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "init": None}},
        "objective": {"distillation_weight": 0.05},
        "optimizer": {"lr": 2e-3, "warmup_steps": 2, "schedule": "cosine"},
        "grad_norm_every": 2,
        **model,
    }
    config = {
        "trainer": {
            "max_epochs": 3, "enable_progress_bar": False, "callbacks": list(callbacks), **(trainer or {}),
        },
        "teacher": teacher,
        "skills": bank,
        "log": log or {},
        "panel": panel or {},
        "checkpoint": checkpoint or {},
        "model": model,
        "data": {"env_kwargs": boards(8, 6), "batch_tasks": 3, "group_size": 2, "actor": actor, "rollout": {"max_rows": 4}, **(data or {})},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


RULES: dict[str, Any] = {
    "template": "{success_analysis} {mistake_analysis} : {golden_workflow}\n",
    "summariser": {
        "class_path": "skillsd.skills.RulesSummariser",
        "init_args": {
            "joiner": " ", "solved_success": "solved", "solved_mistakes": "none", "solved_workflow": "{workflow}",
            "unsolved_success": "unsolved", "unsolved_mistakes": "avoid", "unsolved_workflow": "{workflow}",
        },
    },
}  # fmt: skip
BASE: dict[str, Any] = {"summariser": {"class_path": "skillsd.skills.BaseSummariser", "init_args": {"max_new_tokens": 6}}}
VARIANTS: dict[str, dict[str, Any]] = {
    "rules": {"bank": RULES, "teacher": {"mode": "sync", "every": 1}},
    "ema": {
        "bank": RULES | {"refresh": "iteration", "capacity": 1, "value_estimate": "gap"},
        "teacher": {"mode": "ema", "rate": 0.3},
        "checkpoint": {"every_n_train_steps": 2},
    },
    "base": {"bank": BASE, "trainer": {"limit_val_batches": 1.0}, "teacher": {"mode": "sync", "every": 2}},
    "hindsight": {
        "bank": RULES | {"context": {"class_path": "skillsd.skills.HindsightContext"}},
        "teacher": {"mode": "sync", "every": 1},
        "panel": {"every": 2},
    },
    "off_policy_dynamic": {"bank": RULES, "teacher": {"mode": "sync", "every": 1}, "actor": "teacher"},
}

GPU_ROUNDING = 0.01
"""Between the same numbers of two runs on a GPU: bfloat16 has 8 bits."""


def close_on_a_gpu(record: dict[str, Any], whole: dict[str, Any]) -> str:
    """Numbers of the first iteration that differs, if any; from the next one on another token may have been sampled.

    Returns:
        what differs, and by how much of itself (of 0.1 if it is smaller).

    Raises:
        AssertionError: A number differs by more than GPU_ROUNDING.
    """
    pairs = list(zip(record["metrics"], whole["metrics"], strict=True))
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        return ""
    both = {k: (float(v), float(pairs[place][1][k])) for k, v in pairs[place][0].items() if v != pairs[place][1][k]}
    off = {k: abs(a - b) / max(abs(a), abs(b), 0.1) for k, (a, b) in both.items()}
    key = max(off, key=lambda k: off[k])
    off_by = f"iteration {place}, {key}: {off[key]:.2g}"
    assert off[key] <= GPU_ROUNDING, off_by
    return off_by


def nf4_policy(folder: Path) -> dict[str, Any]:
    """Settings of a policy on a tiny Qwen3 of random weights, written to `folder`, in nf4: on a GPU with the kernels and CUDA graphs."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=len(tokenizer), **SHAPE | WIDE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder), "quantise": "nf4", "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "init": None}}
