"""A run that is killed with SIGKILL at any moment and resumed gives the same numbers, to the bit, as one that was not."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
STEPS = 9  # 3 epochs of 8 tasks, 3 an iteration: the last one of an epoch is a partial one

SERVER = """
import importlib, json, os, signal, sys
from functools import wraps
import torch
torch.set_num_threads(1)
from skillsd import cli
for name in ("skillsd_sokoban", "skillsd.skills.callback", "transformers.models.qwen3.modeling_qwen3", "torch.utils.tensorboard"):
    importlib.import_module(name)

def bomb(where, calls, after):
    # SIGKILL in the n-th call of a function, before or after it has done its work.
    module, _, name = where.partition(":")
    *path, last = name.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    work, left = getattr(owner, last), [calls]
    @wraps(work)
    def fused(*args, **kwargs):
        left[0] -= 1
        result = work(*args, **kwargs) if left[0] or after else None
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, last, fused)

for line in sys.stdin:
    args, log, fuse = json.loads(line)
    pid = os.fork()
    if not pid:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv = ["skillsd"]
        if fuse:
            bomb(*fuse)
        code = 3
        try:
            code = cli.main(args)
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

Bomb = tuple[str, int, bool]
"""Function, which of its calls in the process, and whether its work is done first."""


class Server:
    """A process with everything imported that forks one for each command: an import takes longer than a run of this size."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'envs'}"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
        )

    def start(self, args: list[str], log: Path, fuse: Bomb | None = None) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([args, str(log), fuse]) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Server, Server]]:
    """One for uninterrupted runs and one for killed ones, as they hash strings differently."""
    both = Server(), Server()
    yield both
    for server in both:
        server.process.communicate()


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

    def kill(self, where: str, calls: int, after: bool, *more: str) -> None:
        """Go on until the bomb explodes."""
        bomb = (where, calls, after)
        self.server.start(self.args("--ckpt_path", "last", *more), self.log, bomb)
        code = self.server.wait()
        assert code == -signal.SIGKILL, f"{bomb} did not explode: {code}\n{self.log.read_text()[-5000:]}"

    def kill_when(self, ready: Callable[[], bool], delay: float) -> bool:
        """Go on, and kill from outside `delay` seconds after `ready`. False if the run ended before."""
        pid = self.server.start(self.args("--ckpt_path", "last"), self.log)
        with suppress(ProcessLookupError):  # it has ended
            while not ready():
                os.kill(pid, 0)
                time.sleep(0.002)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        code = self.server.wait()
        assert code in (0, -signal.SIGKILL), self.log.read_text()[-5000:]
        return code != 0

    def rows(self) -> list[dict[str, str]]:
        path = self.folder / "metrics.csv"
        return list(csv.DictReader(path.open())) if path.is_file() else []

    def has_rows(self, n: int) -> bool:
        return self.folder.is_dir() and len(self.rows()) >= n

    def checkpoint(self) -> dict[str, Any]:
        return dict(torch.load(self.folder / "checkpoints" / "last.ckpt", weights_only=True))

    def record(self) -> dict[str, Any]:
        """All that a run leaves, but for how long things took."""
        db = sqlite3.connect(self.folder / "bank.sqlite")
        tables = {t: db.execute(f"SELECT * FROM {t} ORDER BY 1").fetchall() for t in ("setting", "skill", "event")}
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
            "checkpoint": {k: v for k, v in checkpoint.items() if k != "callbacks"},
            **tables,
        }


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, and where not."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def overlay(
    path: Path, bank: dict[str, Any], teacher: dict[str, Any], checkpoint: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None, panel: dict[str, Any] | None = None, actor: str = "student", **model: Any,
) -> Path:  # fmt: skip
    """Everything tiny; `bank`, `teacher`, `checkpoint` and `panel` are arguments of their callbacks."""
    named: dict[str, dict[str, Any]] = {
        "skillsd.callbacks.RunLog": {},
        "skillsd.callbacks.Panel": panel or {},
        "skillsd.callbacks.AdapterExport": {},
        "skillsd.callbacks.RunCheckpoint": checkpoint or {},
    }
    env = {
        "size": 6, "boxes": 1, "difficulties": {"short": {"lengths": [3, 6]}}, "splits": {"train": {"short": 8}, "test": {"short": 6}},
        "max_turns": 6, "action_format": "bare", "prompts": {"instruction": ""},
    }  # fmt: skip
    model = {
        "policy": {"model": "nano", "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "init": None}},
        "objective": {"distillation_weight": 0.05},
        "optimizer": {"lr": 2e-3, "warmup_steps": 2, "schedule": "cosine"},
        "grad_norm_every": 2,
        **model,
    }
    config = {
        "trainer": {
            "max_epochs": 3, "enable_progress_bar": False,
            "callbacks": [{"class_path": k, "init_args": v} for k, v in named.items()],
            **(trainer or {}),
        },
        "teacher": teacher,
        "skills": bank,
        "model": {"init_args": model},
        "data": {"init_args": {"env_kwargs": env, "batch_tasks": 3, "group_size": 2, "actor": actor, "rollout": {"max_rows": 4}}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
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
        "bank": RULES | {"refresh": "iteration", "capacity": 1, "booking": "gap"},
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

MOMENTS: list[tuple[str, int, bool]] = [
    ("skillsd.rollout.engine:InProcessSession.step", 3, False),  # in the `before` panel
    ("skillsd.callbacks.log:_append", 3, False),  # the first row stands, its trajectories do not; no checkpoint yet
    ("skillsd.callbacks.resume:_InPlace.save_checkpoint", 1, False),  # all is written, but not the first checkpoint
    ("skillsd.callbacks.resume:_InPlace.save_checkpoint", 1, True),  # and just after it
    ("skillsd.rollout.engine:InProcessSession.step", 4, True),  # in a rollout
    ("skillsd.policy.policy:Policy._score", 3, True),  # in a training step
    ("skillsd.module:SkillSD._step", 1, True),  # the optimizer has stepped, nothing is written
    ("skillsd.skills.bank:SkillBank.insert", 2, True),  # the bank is ahead of the log
    ("skillsd.callbacks.log:RunLog.on_train_batch_end", 1, True),  # the log is ahead of the checkpoint
    ("skillsd.callbacks.resume:_InPlace.save_checkpoint", 1, True),
    ("torch:save", 2, True),  # the checkpoint is made, not written
    ("skillsd.rollout.collector:Collector.collect", 2, False),
]
FEW: list[tuple[str, int, bool]] = [
    ("skillsd.skills.callback:SkillBankCallback.texts", 2, True),  # the summaries are made, the update is not
    ("skillsd.module:SkillSD._step", 1, True),
    ("skillsd.callbacks.log:RunLog.on_train_batch_end", 2, True),
    ("skillsd.rollout.collector:Collector.collect", 1, False),
]
"""For what differs from the others in few places."""
CURVE: list[tuple[str, int, bool]] = [
    ("skillsd.callbacks.panel:write_panel", 2, True),  # a point of the learning curve is ahead of the checkpoint
    ("skillsd.callbacks.panel:write_panel", 2, False),  # it is played, not written
]
END: list[tuple[str, int, bool]] = [
    ("skillsd.callbacks.panel:summarise", 1, False),  # the `after` panel is played, not written
    ("skillsd.callbacks.panel:write_panel", 1, True),
    ("skillsd.callbacks.export:export_adapter", 1, False),
    ("skillsd.callbacks.export:export_adapter", 1, True),
]


class EndedError(Exception):
    """Ends a run within the process."""


def tear(run: Run) -> None:
    """What a kill in the middle of a write leaves."""
    for name in ("metrics.csv", "trajectories.jsonl"):
        with (run.folder / name).open("a") as f:
            f.write('7,2,"torn')
    (run.folder / "checkpoints" / "last.ckpt.tmp").write_bytes(b"PK")


def test_one_kill(servers: tuple[Server, Server], tmp_path: Path) -> None:
    """The short version; also: running again, and what is refused."""
    file = overlay(tmp_path / "overlay.yaml", **VARIANTS["rules"])
    whole, killed = (Run(tmp_path / n, s, file) for n, s in zip(("whole", "killed"), servers, strict=True))
    whole.fit()
    killed.kill("skillsd.callbacks.log:RunLog.on_train_batch_end", 4, True)
    tear(killed)
    killed.resume()
    record = whole.record()
    assert_equal(killed.record(), record)

    assert len(record["metrics"]) == STEPS == len({row["iteration"] for row in record["metrics"]})
    assert [row["epoch"] for row in record["metrics"]] == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    assert len({row["loss/total"] for row in record["metrics"]}) > 5  # something was learnt from
    state = record["checkpoint"]["state_dict"]
    assert {k.split(".")[0] for k in state} == {"student", "teacher"} and all("lora_" in k for k in state)
    size = sum(t.numel() * t.element_size() for t in state.values())
    assert (whole.folder / "checkpoints" / "last.ckpt").stat().st_size < 2.5 * size + 200_000  # two moments of the student, no base
    assert [p.name for p in (killed.folder / "checkpoints").iterdir()] == ["last.ckpt"]

    text = killed.resume()  # a finished run: nothing is played, the table is printed
    assert "after - before" in text and "panel after:" not in text
    assert_equal(killed.record(), record)
    assert "--overwrite=true" in killed.fit(code=2)
    assert "other episodes" in killed.resume("--data.init_args.panel_attempts=2", code=2)
    assert_equal(killed.record(), record)


@pytest.mark.parametrize("variant", ["hindsight", "off_policy_dynamic"])
def test_one_kill_of_other_methods(servers: tuple[Server, Server], tmp_path: Path, variant: str) -> None:
    """Where the teacher's prompts are made of the rollout, or the teacher's weights make it."""
    file = overlay(tmp_path / "overlay.yaml", **VARIANTS[variant])
    whole, killed = (Run(tmp_path / n, s, file) for n, s in zip(("whole", "killed"), servers, strict=True))
    whole.fit()
    killed.kill("skillsd.module:SkillSD._step", 5, True)
    killed.resume()
    record = whole.record()
    assert_equal(killed.record(), record)
    if variant == "hindsight":
        assert list(record["panel"]["during"]) == ["2", "4", "6", "8"] and len(record["skill"]) > 20
        assert all(float(row["teacher/skill_share"]) == 1 for row in record["metrics"])  # from the first iteration on
    else:
        assert all(float(row["policy/logp_drift"]) == 0 for row in record["metrics"])
        assert [float(row["teacher/skill_share"]) for row in record["metrics"]] == [0] * 3 + [1] * 6


def test_base_summariser_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nano model never writes JSON; a stand-in does, from what names the noise. In process, ended by an exception."""
    from skillsd import cli
    from skillsd.callbacks import RunLog
    from skillsd.data import RolloutData

    asked: list[Any] = []

    def generate(self: RolloutData, conversations: list[Any], max_new_tokens: int, seed_keys: list[Any], adapter: Any = None) -> list[str]:
        asked.extend(seed_keys)
        texts = [f"key {seed} {iteration} {task_id} {member}" for seed, iteration, task_id, member in seed_keys]
        return [json.dumps({"success_analysis": t, "mistake_analysis": "none", "golden_workflow": "up"}) for t in texts]

    monkeypatch.setattr(RolloutData, "generate", generate)
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    file = overlay(tmp_path / "overlay.yaml", **VARIANTS["base"])
    whole, ended = (Run(tmp_path / n, None, file) for n in ("whole", "ended"))  # type: ignore[arg-type]
    try:
        assert cli.main(whole.args()) == 0
        keys, log = list(asked), RunLog.on_train_batch_end
        asked.clear()

        def end(self: RunLog, trainer: Any, *args: Any) -> None:
            log(self, trainer, *args)
            if trainer.global_step == 5:
                raise EndedError

        monkeypatch.setattr(RunLog, "on_train_batch_end", end)
        with pytest.raises(EndedError):
            cli.main(ended.args())
        monkeypatch.setattr(RunLog, "on_train_batch_end", log)
        assert cli.main(ended.args("--ckpt_path", "last")) == 0
    finally:
        torch.set_num_threads(threads)
    record = whole.record()
    assert_equal(ended.record(), record)
    assert len(keys) == len(set(keys)) == 48 == len(record["skill"])
    assert set(asked) == set(keys)
    assert record["metrics"][-1]["skills/failed"] == "0.0"


def test_equal_adapters_that_are_not_one() -> None:
    """After a step without a gradient the tensors are equal, and yet both adapters are scored: a checkpoint keeps that."""
    from skillsd.module import SkillSD
    from skillsd.policy import PolicySettings

    one, other = SkillSD(PolicySettings("nano")), SkillSD(PolicySettings("nano"))
    checkpoint: dict[str, Any] = {}
    one.configure_model()
    other.configure_model()
    for changed in (False, True):
        if changed:
            one.policy.student_changed()
        one.on_save_checkpoint(checkpoint)
        other.on_load_checkpoint(checkpoint)
        other.load_state_dict(one.state_dict())
        assert other.policy.teacher_is_student is not changed


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_kills(servers: tuple[Server, Server], tmp_path: Path, variant: str) -> None:
    """Killed at every kind of moment, one after the other, in one run."""
    file = overlay(tmp_path / "overlay.yaml", **VARIANTS[variant])
    whole, killed = (Run(tmp_path / n, s, file) for n, s in zip(("whole", "killed"), servers, strict=True))
    whole.fit()
    moments = {"hindsight": FEW + CURVE, "off_policy_dynamic": FEW[1:]}.get(variant, MOMENTS)
    for i, bomb in enumerate(moments):
        killed.kill(*bomb)
        if i == 4:
            tear(killed)
    for bomb in END:
        killed.kill(*bomb)
    killed.resume()
    record = whole.record()
    assert_equal(killed.record(), record)
    failed = [float(row["skills/failed"]) for row in record["metrics"]]
    assert failed[-1] == (48.0 if variant == "base" else 0.0)


@pytest.mark.slow
def test_random_moments(servers: tuple[Server, Server], tmp_path: Path) -> None:
    """Killed from outside, whatever it is doing."""
    file = overlay(tmp_path / "overlay.yaml", **VARIANTS["ema"])
    whole, killed = (Run(tmp_path / n, s, file) for n, s in zip(("whole", "killed"), servers, strict=True))
    whole.fit()
    draw, kills = random.Random(1), 0
    for goal in (0, 1, 3, 4, 6, 8, 9):
        kills += killed.kill_when(partial(killed.has_rows, goal), draw.uniform(0, 0.3))
    killed.resume()
    assert kills >= 4
    assert_equal(killed.record(), whole.record())


@pytest.mark.slow
def test_every_checkpoint(servers: tuple[Server, Server], tmp_path: Path) -> None:
    """A finished run, continued from each of its checkpoints, ends as it did; so does one that is stopped after every iteration."""
    constant = {"optimizer": {"lr": 2e-3, "schedule": "constant"}}  # a cosine's length is the run's, which max_steps changes
    file = overlay(tmp_path / "overlay.yaml", **VARIANTS["rules"], **constant)
    whole = Run(tmp_path / "whole", servers[0], file)
    again, steps = (Run(tmp_path / n, servers[1], file) for n in ("again", "steps"))
    keep = tmp_path / "keep.yaml"
    overlay(keep, VARIANTS["rules"]["bank"], VARIANTS["rules"]["teacher"], {"save_top_k": -1}, **constant)
    whole.overlay = keep
    whole.fit()
    record = whole.record()
    checkpoints = sorted((whole.folder / "checkpoints").glob("epoch*.ckpt"))
    assert len(checkpoints) == STEPS
    for path in checkpoints:
        shutil.rmtree(again.folder, ignore_errors=True)
        shutil.copytree(whole.folder, again.folder)
        again.fit(f"--ckpt_path={again.folder / 'checkpoints' / path.name}")
        assert_equal(again.record(), record)

    steps.kill("skillsd.callbacks.panel:summarise", 2, False, "--trainer.max_steps=1")
    assert "panel after:" in steps.resume("--trainer.max_steps=1")  # no step is left, but the last panel is
    for k in range(1, STEPS):
        steps.resume(f"--trainer.max_steps={k}")
        assert len(steps.rows()) == k
    steps.resume()
    assert_equal(steps.record(), record)


@pytest.mark.slow
def test_command(tmp_path: Path, servers: tuple[Server, Server]) -> None:
    """The command itself, killed during its first checkpoints."""
    file = overlay(tmp_path / "overlay.yaml", **VARIANTS["rules"])
    whole, killed = (Run(tmp_path / n, s, file) for n, s in zip(("whole", "killed"), servers, strict=True))
    whole.fit()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'envs'}"}
    command = [sys.executable, "-m", "skillsd", *killed.args("--ckpt_path", "last")]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(killed.rows()) < 4 and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    assert_equal(killed.record(), whole.record())
