"""How long a run is: a budget of environment steps, and a learning curve whose points training does not notice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.e2e.commands import metrics, panel, unchanged


def budget(steps: int) -> str:
    return f"--trainer.callbacks+={{class_path: skillsd.callbacks.EnvStepBudget, init_args: {{steps: {steps}}}}}"


OWN_LENGTH = ["--trainer.max_epochs=40", "--model.optimizer.schedule_steps=8"]  # a cosine that no limit changes


CURVE = "--panel.every=1"


def env_steps(folder: Path) -> list[float]:
    return [float(r["rollout/env_steps"]) for r in metrics(folder)]


def test_a_budget_of_environment_steps(output_of, tmp_path):
    """Training stops after the iteration that reaches it; a resumed run counts on, and a finished one plays nothing more."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = output_of("fit", whole, budget(150), *OWN_LENGTH)
    used = env_steps(whole)
    assert sum(used[:-1]) < 150 <= sum(used) and len(used) < 12
    assert "after - before, paired" in out and set(panel(whole)) == {"before", "after", "difference"}
    rates = [float(r["optimizer/lr"]) for r in metrics(whole)]
    assert rates == pytest.approx([5e-3 * 0.5 * (1 + math.cos(math.pi * min(i, 8) / 8)) for i in range(len(used))])
    state = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == len(used) and state["callbacks"]["EnvStepBudget"] == {"used": sum(used)}

    before = unchanged(whole)
    out = output_of("fit", whole, "--ckpt_path", "last", budget(150), *OWN_LENGTH)
    assert "after - before, paired" in out and "panel after:" not in out
    assert unchanged(whole) == before

    output_of("fit", parts, budget(150), *OWN_LENGTH, "--trainer.max_steps=1")
    for limit in (["--trainer.max_steps=3"], []):
        output_of("fit", parts, "--ckpt_path", "last", budget(150), *OWN_LENGTH, *limit)
    assert env_steps(parts) == used
    for name in ("trajectories.jsonl", "panel.json", "adapter/student/adapter_model.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()

    output_of("fit", whole, "--ckpt_path", "last", budget(int(sum(used)) + 1), *OWN_LENGTH)  # a larger one goes on
    assert len(env_steps(whole)) == len(used) + 1 and env_steps(whole)[:-1] == used


def test_a_learning_curve(run, output_of, tmp_path):
    """Its points are panels of the agent at that iteration; training does not notice them."""
    folder = tmp_path / "curve"
    out = output_of("fit", folder, CURVE)
    assert [line.partition(":")[0] for line in out.splitlines() if line.startswith("panel") and ": success" in line] == [
        "panel before", "panel after 1 iteration", *(f"panel after {i} iterations" for i in (2, 3)), "panel after",
    ]  # fmt: skip
    content = panel(folder)
    assert list(content) == ["before", "during", "after", "difference"] and list(content["during"]) == ["1", "2", "3"]
    assert {k: v for k, v in content.items() if k != "during"} == panel(run)
    timeless = [[{k: v for k, v in r.items() if not k.startswith(("time/", "memory/"))} for r in metrics(f)] for f in (run, folder)]
    assert timeless[0] == timeless[1]
    for steps, shares in content["during"].items():
        part = tmp_path / f"part-{steps}"
        output_of("fit", part, f"--trainer.max_steps={steps}")
        after = panel(part)["after"]
        assert shares == {"n": 4, "success": after["success"], "completion": after["completion"]}
    output_of("fit", folder, "--ckpt_path", "last", CURVE)
    assert panel(folder) == content


def test_a_learning_curve_has_no_point_where_a_budget_ends(output_of, tmp_path):
    """`after` is that point."""
    output_of("fit", tmp_path / "run", CURVE, budget(60), "--trainer.max_epochs=40")
    n = len(env_steps(tmp_path / "run"))
    assert 1 < n < 8 and list(panel(tmp_path / "run")["during"]) == [str(k) for k in range(1, n)]
