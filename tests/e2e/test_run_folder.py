"""What a fit leaves in its run folder, and how a finished run is named and run again."""

from __future__ import annotations

import csv
import json
import math
import re

import pytest
import torch
import yaml
from tests.e2e.commands import metrics, panel, trajectories, unchanged

from skillsd import cli
from skillsd.files.run_folder import COMMAND_KEYS
from skillsd.metrics import METRICS
from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence
from skillsd.skills import SkillBank

KEYS = """iteration task_id member seed instruction prompt_ids token_ids action_mask logprobs turns reward completion success finish_reason
skill_id failure final_observation crc32""".split()


def test_a_run_folder_holds_these_files_rows_and_skills(finished):
    assert sorted(p.name for p in finished.iterdir()) == [
        "adapter", "bank.sqlite", "checkpoints", "config.yaml", "metrics.csv", "panel.json", "run.json", "tensorboard", "trajectories.jsonl"
    ]  # fmt: skip
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == ["last.ckpt", "previous.ckpt"]
    assert sorted(p.name for p in (finished / "adapter" / "student").iterdir()) == [
        "README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "base.json"
    ]  # fmt: skip
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["trainer"]["default_root_dir"] == str(finished) and config["seed_everything"] == 0
    assert config["data"]["env_kwargs"]["splits"]["train"] == {"short": 5}

    rows = metrics(finished)
    assert list(rows[0]) == ["iteration", "epoch", *METRICS]
    assert [(r["iteration"], r["epoch"]) for r in rows] == [("0", "0"), ("1", "0"), ("2", "1"), ("3", "1")]
    optional = {"grad_norm/policy", "grad_norm/distillation"}
    assert all(math.isfinite(float(r[k])) for r in rows for k in METRICS if k not in optional)
    assert [bool(r["grad_norm/policy"]) for r in rows] == [True, False, True, False]
    assert [float(r["teacher/skill_share"]) for r in rows] == [0, 0, 1, 1]

    content = panel(finished)
    assert list(content) == ["before", "after", "difference"]
    assert [x["task_id"] for x in content["after"]["levels"]] == [f"test-{i:04d}" for i in range(4)]
    with SkillBank(finished / "bank.sqlite", read_only=True) as bank:
        assert len(bank) == float(rows[-1]["skills/bank"]) > 0 and len(bank.tasks()) == 5


def test_steps_and_tokens_are_those_of_the_record(finished):
    """What an iteration cost, against the record: turns, tokens with their prompts, tokens that the learner scored, and times."""
    rows, played = metrics(finished), trajectories(finished)
    with SkillBank(finished / "bank.sqlite", read_only=True) as bank:
        texts = {t.skill_id: bank.get(t.skill_id).golden_workflow for t in played if t.skill_id is not None}
    for row in rows:
        episodes = [t for t in played if t.iteration == int(row["iteration"])]
        count = {k: float(row[k]) for k in METRICS if row[k]}
        assert count["rollout/env_steps"] == sum(len(t.turns) for t in episodes)
        assert count["rollout/turns"] == pytest.approx(count["rollout/env_steps"] / len(episodes))
        tokens = [len(t.prompt_ids) + len(t.token_ids) for t in episodes]
        assert count["rollout/tokens"] == sum(tokens) and count["rollout/action_tokens"] == sum(t.n_actions for t in episodes)
        # The teacher reads the same behind `solved none : MOVES\n`: a token each.
        teacher_tokens = [n + len(texts[t.skill_id].split()) + 4 for n, t in zip(tokens, episodes, strict=True) if t.skill_id is not None]
        assert count["learner/tokens"] == sum(tokens) + sum(teacher_tokens) and len(teacher_tokens) in (0, len(episodes))
        assert (count["time/teacher_s"] > 1e-3) == bool(teacher_tokens)
        seconds = {k: count[f"time/{k}_s"] for k in ("rollout", "teacher", "update", "summary")}
        assert all(0 <= x < 60 for x in seconds.values()) and min(seconds["rollout"], seconds["update"], seconds["summary"]) > 0
        assert 0.05 < count["memory/peak_gib"] < 64 and count["memory/micro_batch_tokens"] == 4096
        assert count["time/rollout_tokens_per_s"] == pytest.approx(count["rollout/tokens"] / seconds["rollout"])
        assert count["time/learner_tokens_per_s"] == pytest.approx(
            count["learner/tokens"] / (seconds["teacher"] + seconds["update"]), rel=1e-6
        )


def test_the_record_can_be_scored_again(finished):
    lines = (finished / "trajectories.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 5 * 3 and all(list(json.loads(x)) == KEYS for x in lines)
    assert all(list(turn) == ["observation", "action", "reward", "valid"] for x in lines for turn in json.loads(x)["turns"])
    played = trajectories(finished)
    order = [(t.iteration, t.member) for t in played]
    assert order == [(i, m) for i, n in enumerate((3, 2, 3, 2)) for _ in range(n) for m in range(3)]
    for t in played:
        assert len(t.token_ids) == len(t.action_mask) == len(t.logprobs) and t.seed == 0
        assert t.n_actions == len(t.turns) and t.reward == pytest.approx(sum(turn.reward for turn in t.turns))
        assert (t.skill_id is not None) == (t.iteration >= 2)
    # The first iteration's by the agent as it is shipped, the next one's no longer.
    policy = Policy(PolicySettings(lora=LoraSettings(r=4, alpha=8)))
    for iteration, agrees in ((0, True), (3, False)):
        rows = [t for t in played if t.iteration == iteration]
        with torch.no_grad():
            logp = policy.score("student", [TokenSequence(t.prompt_ids, t.token_ids, t.action_mask) for t in rows]).logp
        off = max(abs(a - b) for x, t in zip(logp.tolist(), rows, strict=True) for a, b in zip(x, t.logprobs, strict=False))
        assert (off < 1e-4) == agrees


def test_several_actions_a_turn_and_a_shaped_reward(output_of, tmp_path):
    env = "--data.env_kwargs"
    output_of(
        "fit", tmp_path / "run", "--trainer.max_epochs=1", f"{env}.actions_per_turn=3", f"{env}.distance_reward=0.1",
        f"{env}.invalid_penalty=0.25", "--data.rollout.max_turn_tokens=4", "--data.rollout.temperature=4",
    )  # fmt: skip
    played = trajectories(tmp_path / "run")
    assert len(played) == 15 and any(len(turn.action.split()) > 1 for t in played for turn in t.turns)
    assert all(t.n_actions <= 4 * len(t.turns) for t in played)
    shaped = {round(turn.reward, 6) for t in played for turn in t.turns}
    assert shaped - {0.0, 1.0}
    assert all(t.reward == pytest.approx(sum(turn.reward for turn in t.turns)) for t in played)


@pytest.mark.slow
def test_the_progress_bar_and_a_profile(output_of, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for Rich; a file would get a line an iteration instead
    monkeypatch.setenv("TERM", "xterm")
    out = output_of("fit", tmp_path / "run", "--trainer.max_epochs=3", "--trainer.enable_progress_bar=true", "--trainer.profiler=pytorch")
    shown = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out).split())
    assert "iteration 1 of" not in shown
    assert all(re.search(rf"{name}: \d+\.\d", shown) for name in ("success", "tokens/s", "GiB")) and "it/s" in shown
    (trace,) = (tmp_path / "run" / "tensorboard").glob("*.pt.trace.json")
    names = {e.get("name", "") for e in json.loads(trace.read_text())["traceEvents"]}
    for part in ("ProfilerStep", "train_dataloader_next", "SingleDeviceStrategy.training_step", "aten::mm"):
        assert any(part in name for name in names), part


def test_a_finished_run_that_is_run_again_prints_its_table(run, output_of):
    """A finished run plays nothing: it prints its table."""
    before = unchanged(run)
    out = output_of("fit", run, "--ckpt_path", "last")
    assert "panel of 4 held-out episodes, 95% intervals" in out and "after - before, paired" in out
    for name, path in (("adapter", "adapter/student"), ("log", "metrics.csv"), ("trajectories", "trajectories.jsonl")):
        assert f"{name}: {run / path}\n" in out
    assert "skill bank: " in out and "of 5 tasks" in out
    assert "panel before" not in out and "panel after" not in out  # said when they are played
    assert unchanged(run) == before


def test_a_run_is_named_by_its_folder(run, capsys, tmp_path):
    """Also one that has been moved: every command takes it where it is, and nothing goes where it was."""
    moved = run.rename(tmp_path / "moved")
    for named in (str(moved), str(moved / "config.yaml")):
        capsys.readouterr()
        assert cli.main(["play", named, "--level", "1"]) == 0
        assert capsys.readouterr().out.startswith(f"weights: {moved / 'checkpoints' / 'last.ckpt'}, iteration 4;")
        assert cli.main(["show", named, "--json"]) == 0 and json.loads(capsys.readouterr().out)
    assert cli.main(["validate", "-c", str(moved / "config.yaml")]) == 0
    assert cli.main(["export", "--out", str(tmp_path / "adapter"), str(moved)]) == 0 and (tmp_path / "adapter").is_dir()
    assert cli.main(["fit", str(moved), "--trainer.max_epochs=3"]) == 0
    assert len(metrics(moved)) == 6
    config = yaml.safe_load((moved / "config.yaml").read_text())
    assert config["trainer"]["default_root_dir"] == str(moved) and not set(COMMAND_KEYS) & set(config)
    assert not run.exists()

    assert cli.main(["fit", str(moved), "--overwrite", "--trainer.max_epochs=1"]) == 0
    assert len(metrics(moved)) == 2
    assert cli.main(["fit", str(moved), f"--trainer.default_root_dir={tmp_path / 'second'}", "--trainer.max_epochs=1"]) == 0
    assert len(list(csv.DictReader((tmp_path / "second" / "metrics.csv").open()))) == 2 and (tmp_path / "second" / "tensorboard").is_dir()
