"""Studies of a fake `skillsd fit`: a script of milliseconds that behaves like it at the edges."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from skillsd.study import study

FAKE = r"""
import json, os, random, signal, sys, time
from pathlib import Path
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--"))
configs = [Path(b).stem for a, b in zip(sys.argv[1:], sys.argv[2:]) if a == "-c"]
method = configs[1] if len(configs) > 1 else "plain"
folder, seed = Path(flags["trainer.default_root_dir"]), int(flags["seed_everything"])
assert flags["ckpt_path"] == "last" and (folder / "cell.json").is_file()
plan = json.loads(Path(os.environ["FAKE_PLAN"]).read_text())
behaviour = plan.get(f"{method}-{seed}", {})
with open(os.environ["FAKE_PLAN"] + ".calls", "a") as f:
    f.write(f"{method} {seed} {os.environ['OMP_NUM_THREADS']}\n")
until = time.monotonic() + 60
while len(Path(os.environ["FAKE_PLAN"] + ".calls").read_text().splitlines()) < behaviour.get("meet", 0):
    if time.monotonic() > until:
        sys.exit("error: the others did not come")
    time.sleep(0.02)
print(*(Path(b).read_text().strip() for a, b in zip(sys.argv[1:], sys.argv[2:]) if a == "-c"), flush=True)
print("fake fit", method, seed, "on gpu", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if behaviour.get("deaf"):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
folder.mkdir(parents=True, exist_ok=True)
metrics = folder / "metrics.csv"
n_rows = len(metrics.read_text().splitlines()) - 1 if metrics.is_file() else 0
names = ["iteration", "epoch", "reward/success", "reward/completion", "teacher/gap_mean", "policy/entropy", "grad_norm/policy",
         "grad_norm/distillation", "rollout/env_steps", "rollout/tokens", "learner/tokens", "time/rollout_s", "time/teacher_s",
         "time/update_s", "time/summary_s"]
if not n_rows:
    metrics.write_text(",".join(names) + "\n")
skip = "," if method == "grpo" else ""
for i in range(n_rows, 4):
    time.sleep(behaviour.get("sleep", 0))
    if behaviour.get("fail_at") == i:
        sys.exit("error: made to fail")
    teacher = ["", 0.5] if method == "grpo" else [0.25, 0.5]
    row = [i, 0, 0.1 * i, 0.2 * i, *teacher, 2.0 if i % 2 == 0 else "", 0.5 if i % 2 == 0 else "", 10 + seed, 100, 300, 1.5, 0.25, 0.5, ""]
    with metrics.open("a") as f:
        f.write(",".join(map(str, row)) + "\n")
    if behaviour.get("kill_at") == i and n_rows == 0:
        os.kill(os.getpid(), signal.SIGKILL)
after = random.Random(f"{method}{seed}").uniform(0.6, 0.7) + plan.get("gain", {}).get(method, 0)
def panel(success):
    levels = [{"task_id": f"t{k}", "member": 0, "seed": 0, "success": True, "completion": 1.0} for k in range(plan.get("n", 3))]
    return {"n": len(levels), "success": success, "completion": success / 2, "success_interval": [0, 1], "levels": levels}
content = {"before": panel(0.5), "during": {"2": panel(0.55)}, "after": panel(after)}
if behaviour.get("no_after"):
    del content["after"]
(folder / "run.json").write_text(json.dumps({"format": 2, "checkpoints": "checkpoints", "discarding": False}))
(folder / "panel.json").write_text(json.dumps(content))
"""


class Studies:
    """`skillsd study` in a folder of its own, with the fake fit.

    Attributes:
        plan: What the fake does: "method-seed" -> {sleep, fail_at, kill_at, deaf, no_after, meet: how many
            cells must have begun before it goes on}; gain, method -> share.
    """

    def __init__(self, base: Path, capsys: Any = None) -> None:
        self.base, self.folder, self.capsys, self.plan = base, base / "out", capsys, {}
        self.fake, self.plan_file = base / "fake.py", base / "plan.json"
        self.fake.write_text(FAKE)
        for name in ("plain", "grpo", "skillsd", "shuffled"):
            (base / f"{name}.yaml").write_text(f"name: {name}\n")

    def find(self, name: str) -> str:
        return name if Path(name).is_absolute() else str(self.base / f"{name}.yaml")

    def args(self, *flags: str, methods: tuple[str, ...] = ("grpo", "skillsd"), seeds: tuple[int, ...] = (0, 1)) -> list[str]:
        given = {m: [m] for m in methods}
        return [
            "--configs=[plain]", f"--methods={json.dumps(given)}", f"--seeds={json.dumps(seeds)}", f"--folder={self.folder}", *flags,
        ]  # fmt: skip

    def command(self) -> list[str]:
        self.plan_file.write_text(json.dumps(self.plan))
        return [sys.executable, str(self.fake)]

    def __call__(self, *flags: str, grace: float = 5.0, **kwargs: Any) -> int:
        code = study(self.args(*flags, **kwargs), self.find, self.command(), grace)
        self.out = self.capsys.readouterr().out if self.capsys else ""
        return code

    def calls(self) -> list[str]:
        """Which cells were run since the last look."""
        path = self.base / "plan.json.calls"
        lines = path.read_text().splitlines() if path.is_file() else []
        path.unlink(missing_ok=True)
        return lines

    def record(self, method: str, seed: int) -> dict[str, Any]:
        return json.loads((self.folder / "cells" / method / f"seed-{seed}" / "cell.json").read_text())


@pytest.fixture
def studies(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Studies:
    """One of your own. Its pictures are empty: they take most of a report's time, and `finished_study` has real ones."""
    monkeypatch.setenv("FAKE_PLAN", str(tmp_path / "plan.json"))
    monkeypatch.setattr("skillsd.study.plots.png", lambda figure: EMPTY_PNG)
    return Studies(tmp_path, capsys)


EMPTY_PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
METHODS, SEEDS = ("grpo", "skillsd", "shuffled"), (0, 1, 2)
"""Methods and seeds of `finished_study`."""


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Studies:
    """A finished study of three methods, one of them a control, and three seeds; only to be read."""
    base = tmp_path_factory.mktemp("finished")
    made = Studies(base)
    made.plan = {"gain": {"skillsd": 0.3}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_PLAN", str(base / "plan.json"))
        assert made("--controls={shuffled: skillsd}", "--set.trainer.max_epochs=3", methods=METHODS, seeds=SEEDS) == 0
    return made
