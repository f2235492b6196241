"""Whole commands on AppWorld's real engine, with a tiny random model: the machinery, not the agent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.e2e.commands import metrics, panel, trajectories

from skillsd import cli
from skillsd.data import RolloutData
from skillsd.files.run_folder import read_validations
from skillsd_appworld import paths


@pytest.fixture(scope="module", autouse=True)
def appworld() -> None:
    try:
        paths.find_python()
        paths.find_root("tiny")
    except FileNotFoundError as e:
        pytest.skip(f"AppWorld is not set up ({e})")


@pytest.fixture(scope="module")
def finished(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of two iterations, and the overlay that it was made with."""
    folder = tmp_path_factory.mktemp("appworld")
    overlay = folder / "tiny.yaml"
    overlay.write_text(
        yaml.safe_dump(
            {
                "trainer": {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu", "default_root_dir": str(folder / "run")},
                "model": {
                        "policy": {"model": tiny_model("llama"), "quantise": "none", "lora": {"r": 4, "alpha": 8}, "context_length": 8192}
                    },
                "data": {
                        "env_overrides": {
                            "skillsd_appworld:skillsd/AppWorld-v0": {
                                "limit": 3, "max_turns": 2, "turn_seconds": 20, "prompts": {"instruction": "Use the APIs."},
                            }
                        },
                        "batch_tasks": 3, "group_size": 2, "rollout": {"max_turn_tokens": 8, "max_rows": 6, "env_workers": 3},
                    },
            }
        )
    )  # fmt: skip
    assert cli.main(["fit", "-c", "appworld", "-c", str(overlay)]) == 0
    return folder / "run", overlay


def test_skill_sd_iterations_on_the_real_engine(finished):
    folder, _ = finished
    played = trajectories(folder)
    assert len(played) == 2 * 3 * 2 and {len(t.turns) for t in played} == {2}
    for t in played:
        assert t.instruction == "Use the APIs." and "\nTask: " in t.turns[0].observation
        assert t.finish_reason == "horizon" and "no code" in t.turns[1].observation and t.failure == ""
        assert 0 < t.completion < 1 and t.reward == t.completion  # doing nothing passes some tests, not all
    rows = metrics(folder)
    assert len(rows) == 2 and all(math.isfinite(float(r["loss/total"])) and float(r["rollout/failed"]) == 0 for r in rows)
    assert float(rows[0]["skills/bank"]) + float(rows[0]["skills/failed"]) == 6
    for when in ("before", "after"):
        result = panel(folder)[when]
        assert result["task_goal_completion"] == result["scenario_goal_completion"] == 0 and result["n"] == 3


def test_validate_prints_goal_completions(finished, capsys):
    _, overlay = finished
    assert cli.main(["validate", "-c", "appworld", "-c", str(overlay), "--trainer.default_root_dir", str(overlay.parent / "other")]) == 0
    out = capsys.readouterr().out
    assert "task goal completion 0.000" in out and "scenario goal completion 0.000" in out
    assert read_validations(overlay.parent / "other")[0]["completion"] > 0


@pytest.mark.parametrize(("policy", "success"), [("oracle", "True"), ("explorer", "False")])
def test_play_without_a_model(policy, success, capsys):
    """The whole path through commands, data and environment; the model that the file names need not be there."""
    flags = ["--model.policy.model=/no/such/model", "--policy", policy, "--level", "50"]
    assert cli.main(["play", "-c", "appworld", *flags]) == 0
    out = capsys.readouterr().out
    assert f"--- done: success {success}" in out and "complete_task" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.env_kwargs.source=official"], "official AppWorld data is not there: get it with `appworld download data`"),
        (["--data.panel_split=test_normal"], "data.panel_split: split = 'test_normal': unknown"),
        (["--data.env_kwargs.max_turns=0"], "max_turns = 0"),
        (["--data.env_kwargs.python=/bin/true"], "AppWorld"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("APPWORLD_ROOT", raising=False)
    model = [
        "--model.policy.model=nano",
        "--model.policy.quantise=none",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    ]
    assert cli.main(["fit", "-c", "appworld", *model, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_ground_truth_is_the_engine_s_own_solution(finished, tmp_path, monkeypatch):
    """Its code, run on the engine, is in front of the teacher's prompt from the first iteration on."""
    _, overlay = finished
    workflows: dict[str, str] = {}
    solve = RolloutData.solution

    def note(self: RolloutData, task_id: str, summariser: Any) -> Any:
        skill = solve(self, task_id, summariser)
        workflows[task_id] = skill.golden_workflow
        return skill

    monkeypatch.setattr(RolloutData, "solution", note)
    rules = "{class_path: skillsd.skills.RulesSummariser, init_args: {unsolved_workflow: '{workflow}', solved_workflow: '{workflow}'}}"
    flags = [f"--skills.summariser={rules}", "--skills.context=skillsd.skills.GroundTruthContext", "--trainer.max_epochs=1"]
    assert cli.main(["fit", "-c", "appworld", "-c", str(overlay), f"--trainer.default_root_dir={tmp_path / 'run'}", *flags]) == 0
    (row,) = metrics(tmp_path / "run")
    assert float(row["teacher/skill_share"]) == 1 and float(row["teacher/dropped_rows"]) == 0 and float(row["teacher/k3"]) > 0
    assert len(workflows) == 3 and all("apis." in text for text in workflows.values())
