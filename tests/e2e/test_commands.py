"""Every method's fit, and what else is done with runs: validate, export, and a pre-training whose model is trained on."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from tests.e2e.commands import command, metrics, panel, trajectories
from tests.tolerance import close
from transformers import AutoModelForCausalLM

from skillsd import cli, conf_dir
from skillsd.files.run_folder import read_validations
from skillsd.policy import LoraSettings, Policy, PolicySettings
from skillsd.policy.load import model_folder

METHODS = sorted(p.stem for p in (conf_dir() / "method").glob("*.yaml"))


TEACHES_FROM_THE_START = set("hindsight opid sibling ground_truth ema_teacher frozen_teacher opd topk_jsd rlsd off_policy_frozen".split())
"""Methods that need no bank: their teacher speaks in the first epoch, or may."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(output_of, tmp_path, name):
    """Two epochs: without skills in the bank, and with. Who sees them, and whether the teacher speaks."""
    output_of("fit", tmp_path / "run", "-c", f"method/{name}")
    rows = [{k: float(v) for k, v in r.items() if v} for r in metrics(tmp_path / "run")]
    assert len(rows) == 4 and all(math.isfinite(v) for r in rows for v in r.values())
    played = trajectories(tmp_path / "run")
    plain = {t.task_id: t.prompt_ids for t in played if t.iteration < 2}  # there is no skill yet
    assert all(t.prompt_ids == plain[t.task_id] for t in played if t.iteration < 2)
    with_skill = {t.prompt_ids != plain[t.task_id] for t in played if t.iteration >= 2}
    assert with_skill == {"skill_grpo": {True}, "ucob_pairs": {False, True}}.get(name, {name.startswith("off_policy")})
    silent = name in ("grpo", "skill_grpo", "no_skill")
    for r in rows:
        assert silent <= (r["loss/distillation"] == r["teacher/gap_mean"] == 0)
        assert r["loss/total"] == pytest.approx(r["loss/policy"] + r["loss/distillation"], abs=1e-9)
    assert silent or any(r["teacher/k3"] > 0 for r in rows[2:])
    assert name in TEACHES_FROM_THE_START or all(r["teacher/k3"] == 0 for r in rows[:2])
    assert (name in ("opid", "rlsd")) == any(r["teacher/shift"] > 0 for r in rows)


def test_validate_plays_the_panel_of_a_checkpoint(run, output_of, tmp_path):
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "validations.jsonl"}
    out = output_of("validate", run, "--ckpt_path", "last")
    (record,) = read_validations(run)
    assert record["levels"] == panel(run)["after"]["levels"] and record["step"] == len((run / "metrics.csv").read_text().splitlines()) - 1
    assert "validate 1" in out and "after - before, paired" in out
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "validations.jsonl"} == files

    fresh = tmp_path / "fresh"  # without a checkpoint: the agent as it is
    output_of("validate", fresh)
    assert read_validations(fresh)[-1]["levels"] == panel(run)["before"]["levels"]
    assert sorted(p.name for p in fresh.iterdir()) == ["run.json", "validations.jsonl"]  # no run: a fit may begin here
    output_of("validate", fresh, "--data.panel_adapter=null")
    assert read_validations(fresh)[-1]["levels"] == panel(run)["before"]["levels"]  # adapters begin at nothing
    start = f"--model.policy.lora.init={run / 'adapter' / 'student'}"
    output_of("validate", fresh, start)
    assert read_validations(fresh)[-1]["levels"] == panel(run)["after"]["levels"] and len(read_validations(fresh)) == 3


def test_sampled_attempts_and_seeds(output_of, tmp_path):
    flags = ["--data.panel_attempts=4", "--data.panel_temperature=1.0"]
    out = output_of("validate", tmp_path / "a", *flags)
    (result,) = read_validations(tmp_path / "a")
    assert result["n"] == 16 and set(result["pass_at"]) == {"1", "2", "4"}
    one, two, four = (result["pass_at"][k] for k in "124")
    assert one == pytest.approx(result["success"]) and one <= two <= four
    assert f"validate 1: pass@1 {one:.3f}, pass@2 {two:.3f}, pass@4 {four:.3f}" in out

    output_of("validate", tmp_path / "b", "--data.panel_seeds=[0, 1, 2]", "--data.panel_temperature=1.0")
    levels = read_validations(tmp_path / "b")[-1]["levels"]
    assert [x["seed"] for x in levels] == [s for s in range(3) for _ in range(4)]
    first = [x for x in result["levels"] if x["member"] == 0]
    assert levels[:4] == first  # the same noise, whatever else is played


def test_the_exported_adapter_is_the_run_s(run, output_of, tmp_path):
    out = output_of("export", run, "--out", str(tmp_path / "exported"))
    assert out.strip().endswith(f"adapter: {tmp_path / 'exported'}")
    ids = torch.tensor([trajectories(run)[0].prompt_ids])
    base = AutoModelForCausalLM.from_pretrained(model_folder("nano"))
    with torch.no_grad():
        plain = base(ids).logits
        logits = PeftModel.from_pretrained(base, tmp_path / "exported")(ids).logits
    policy = Policy(PolicySettings(lora=LoraSettings(r=4, alpha=8)))
    policy.load_adapter_state(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    with policy.acting("student"):
        close(logits, policy.base(ids).logits)
    assert (logits - plain).abs().max() > 1e-3
    assert "4 iterations" in (tmp_path / "exported" / "README.md").read_text()


def test_pretraining_without_teacher_and_bank(capsys, tmp_path):
    """What made the nano agent, in small: its callbacks are not those of Skill-SD, and its model can be trained on."""
    folder, lengths = tmp_path / "base", '{"wide": {"lengths": [3, 6]}, "short": {"lengths": [3, 6]}}'
    env = [f"--data.env_kwargs.difficulties={lengths}", "--data.env_kwargs.boxes=1"]
    env += ['--data.env_kwargs.splits={"pretrain": {"wide": 1}, "test": {"short": 2}}', "--data.num_workers=0"]
    size = ["--data.demonstrations.episodes=8", "--data.batch_size=4", "--trainer.enable_progress_bar=false"]
    flags = [f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu", *env, *size]
    assert cli.main(["pretrain", "-c", "pretrain/nano-sokoban", *flags]) == 0
    said = capsys.readouterr().out
    assert all(f"panel {name}" in said for name in ("plain", "own", "shuffled")) and not (folder / "bank.sqlite").exists()
    assert command("fit", tmp_path / "run", f"--model.policy.model={folder / 'model'}", "--trainer.max_steps=1") == 0
