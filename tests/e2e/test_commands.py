"""Whole commands on tiny boards with the shipped agent: what a run leaves, and what can be done with it."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams import backend_context as hparams_context
from tests.tolerance import close
from transformers import AutoModelForCausalLM

from skillsd import cli, conf_dir
from skillsd.callbacks import tensorboard
from skillsd.files.run_folder import COMMAND_KEYS, read_validations
from skillsd.metrics import METRICS
from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence
from skillsd.policy.load import model_folder
from skillsd.skills import SkillBank
from skillsd.trajectory import Trajectory
from skillsd_sokoban.env import SokobanEnv

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start"),
]
KEYS = """iteration task_id member seed instruction prompt_ids token_ids action_mask logprobs turns reward completion success finish_reason
skill_id failure final_observation crc32""".split()
TINY: dict[str, Any] = {
    "trainer": {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu"},
    "model": {
            "policy": {"model": "nano", "lora": {"r": 4, "alpha": 8, "init": None}},
            "optimizer": {"lr": 5e-3, "warmup_steps": 0},
            "objective": {"distillation_weight": 0.01},
            "grad_norm_every": 2,
        },
    "data": {
            "env_kwargs": {
                "size": 6, "boxes": 1, "difficulties": {"short": {"lengths": [3, 6]}},
                "splits": {"train": {"short": 5}, "test": {"short": 4}},
                "max_turns": 6, "action_format": "bare", "prompts": {"instruction": ""},
            },
            "batch_tasks": 3, "group_size": 3, "rollout": {"max_rows": 16},
        },
}  # fmt: skip


def command(name: str, folder: Path, *flags: str) -> int:
    overlay = folder.with_suffix(".yaml")
    overlay.write_text(yaml.safe_dump(TINY))
    return cli.main([name, "-c", "sokoban", "-c", "method/skillsd", "-c", str(overlay), f"--trainer.default_root_dir={folder}", *flags])


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, only to be read."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert command("fit", folder) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def tell(capsys: Any) -> Callable[..., str]:
    """Run a command that succeeds; what it printed."""

    def call(name: str, folder: Path, *flags: str) -> str:
        assert command(name, folder, *flags) == 0
        return str(capsys.readouterr().out)

    return call


def panel(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "panel.json").read_text()))


def trajectories(folder: Path) -> list[Trajectory]:
    return [Trajectory.from_json(line) for line in (folder / "trajectories.jsonl").read_text().splitlines()]


# -- what a run leaves ------------------------------------------------------------------------------------------------------


def test_the_run_folder(finished):
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

    rows = list(csv.DictReader((finished / "metrics.csv").open()))
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


def test_steps_tokens_and_seconds(finished):
    """What an iteration cost, against the record: turns, tokens with their prompts, tokens that the learner scored, and times."""
    rows, played = list(csv.DictReader((finished / "metrics.csv").open())), trajectories(finished)
    with SkillBank(finished / "bank.sqlite", read_only=True) as bank:
        texts = {t.skill_id: bank.get(t.skill_id).golden_workflow for t in played if t.skill_id is not None}
    for row in rows:
        mine = [t for t in played if t.iteration == int(row["iteration"])]
        count = {k: float(row[k]) for k in METRICS if row[k]}
        assert count["rollout/env_steps"] == sum(len(t.turns) for t in mine)
        assert count["rollout/turns"] == pytest.approx(count["rollout/env_steps"] / len(mine))
        tokens = [len(t.prompt_ids) + len(t.token_ids) for t in mine]
        assert count["rollout/tokens"] == sum(tokens) and count["rollout/action_tokens"] == sum(t.n_actions for t in mine)
        # The teacher reads the same behind `solved none : MOVES\n`: a token each.
        taught = [n + len(texts[t.skill_id].split()) + 4 for n, t in zip(tokens, mine, strict=True) if t.skill_id is not None]
        assert count["learner/tokens"] == sum(tokens) + sum(taught) and len(taught) in (0, len(mine))
        assert (count["time/teacher_s"] > 1e-3) == bool(taught)
        seconds = {k: count[f"time/{k}_s"] for k in ("rollout", "teacher", "update", "summary")}
        assert all(0 <= x < 60 for x in seconds.values()) and min(seconds["rollout"], seconds["update"], seconds["summary"]) > 0
        assert 0.05 < count["memory/peak_gib"] < 64 and count["memory/micro_batch_tokens"] == 4096
        assert count["time/rollout_tokens_per_s"] == pytest.approx(count["rollout/tokens"] / seconds["rollout"])
        assert count["time/learner_tokens_per_s"] == pytest.approx(
            count["learner/tokens"] / (seconds["teacher"] + seconds["update"]), rel=1e-6
        )


@pytest.mark.slow
def test_the_progress_bar_and_a_profile(tell, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for Rich; a file would get a line an iteration instead
    monkeypatch.setenv("TERM", "xterm")
    out = tell("fit", tmp_path / "run", "--trainer.max_epochs=3", "--trainer.enable_progress_bar=true", "--trainer.profiler=pytorch")
    shown = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out).split())
    assert "iteration 1 of" not in shown
    assert all(re.search(rf"{name}: \d+\.\d", shown) for name in ("success", "tokens/s", "GiB")) and "it/s" in shown
    (trace,) = (tmp_path / "run" / "tensorboard").glob("*.pt.trace.json")
    names = {e.get("name", "") for e in json.loads(trace.read_text())["traceEvents"]}
    for part in ("ProfilerStep", "train_dataloader_next", "SingleDeviceStrategy.training_step", "aten::mm"):
        assert any(part in name for name in names), part


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


def events_of(folder: Path) -> EventAccumulator:
    """All of a run's TensorBoard."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=dict.fromkeys(("tensors", "scalars", "images", "histograms"), 0))
    return events.Reload()


def test_tensorboard(finished):
    events = events_of(finished)
    scalars = set(events.Tags()["scalars"])
    assert set(METRICS) - scalars == set()
    assert {"panel/success", "panel/completion"} <= scalars
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    assert [e.step for e in events.Scalars("loss/total")] == [0, 1, 2, 3] == [int(r["iteration"]) for r in rows]
    for name in METRICS:  # at each iteration in which it was measured, and at no other
        found, stands = [(e.step, e.value) for e in events.Scalars(name)], [(int(r["iteration"]), r[name]) for r in rows if r[name]]
        assert [step for step, _ in found] == [step for step, _ in stands], name
        assert [value for _, value in found] == pytest.approx([float(text) for _, text in stands], rel=1e-5, abs=1e-9)
    shares = events.Scalars("panel/success")
    assert [shares[k].value for k in (0, -1)] == pytest.approx([panel(finished)[when]["success"] for when in ("before", "after")])
    assert shares[0].step == 0
    # An episode and the bank's skills, at each epoch's start.
    first = [next(t for t in trajectories(finished) if t.iteration == i) for i in (0, 2)]
    texts = {
        name: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(f"{name}/text_summary")]
        for name in ("episode", "skills")
    }
    assert texts["episode"] == [(t.iteration, tensorboard.episode(t)) for t in first]
    assert first[1].turns[-1].observation.replace("\n", "\n    ") in texts["episode"][1][1]
    env = SokobanEnv(**TINY["data"]["env_kwargs"])
    images = events.Images("episode")
    assert [e.step for e in images] == [0, 2]
    for e, t in zip(images, first, strict=True):
        boards = [env.picture(o) for o in (*(turn.observation for turn in t.turns), t.final_observation)]
        assert np.array_equal(np.asarray(Image.open(BytesIO(e.encoded_image_string))), tensorboard.strip(boards))
    with SkillBank(finished / "bank.sqlite", read_only=True) as bank:
        past = [e for e in bank.events() if e.iteration <= 2]
        uses = {e.skill_id: sum(x.kind == "use" and x.skill_id == e.skill_id for x in past) for e in past if e.kind == "insert"}
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in texts["skills"][1][1].splitlines()[4:]]
        assert {int(r[0]): int(r[2]) for r in rows} == uses and max(uses.values()) > 0
        assert all(r[4] == bank.get(int(r[0])).golden_workflow for r in rows)


def test_tensorboard_compares_runs(finished, tell, tmp_path):
    """Token histograms agree with metrics.csv; TensorBoard's own plugin finds what two runs differ in and what each came to."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a").symlink_to(finished)
    other = tmp_path / "runs" / "b"
    tell("fit", other, "-c", "method/trace_gate", "--skills.min_reward=null", "--log.histogram_every=1", "--trainer.max_steps=3")

    events, rows = events_of(other), list(csv.DictReader((other / "metrics.csv").open()))
    assert len(rows) == 3
    histograms = {name: {e.step: e.histogram_value for e in events.Histograms(f"tokens/{name}")} for name in ("gap", "log_rho")}
    assert list(histograms["gap"]) == [1, 2]  # nobody has a skill yet, and the teacher is the student
    assert list(histograms["log_rho"]) == [0, 1, 2]
    for i, r in enumerate(rows):
        n = int(float(r["rollout/action_tokens"]))
        rho = histograms["log_rho"][i]
        assert rho.num == n == sum(rho.bucket)
        assert max(-rho.min, rho.max) == pytest.approx(float(r["policy/logp_drift_max"]))
        if i:  # the frozen teacher speaks to all
            gap, mean, std = histograms["gap"][i], float(r["teacher/gap_mean"]), float(r["teacher/gap_std"])
            assert gap.num == n == sum(gap.bucket) and gap.min <= mean <= gap.max
            assert gap.sum / n == pytest.approx(mean, rel=1e-4) and gap.sum_squares / n == pytest.approx(std**2 + mean**2, rel=1e-4)
    assert histograms["gap"][2].min < 0 < histograms["gap"][2].max  # told of the first epoch
    assert [e.step for e in events_of(finished).Histograms("tokens/log_rho")] == [0]  # every 10 unless told

    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs"))
    runs.Reload()
    hparams, ctx = hparams_context.Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(tmp_path)))), RequestContext()
    experiment = hparams.experiment_from_metadata(ctx, "", True, hparams.hparams_metadata(ctx, ""), None)
    where = "model.objective"
    differ = {h.name for h in experiment.hparam_infos if h.differs}
    assert {f"{where}.gate", f"{where}.loss", f"{where}.distillation_weight", "teacher.mode", "trainer.max_steps"} <= differ
    assert "model.optimizer.lr" not in differ and not any("root_dir" in h.name or "save_dir" in h.name for h in experiment.hparam_infos)
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=9, allowed_statuses=[api_pb2.STATUS_SUCCESS],
        col_params=[api_pb2.ColParams(metric=m.name) for m in experiment.metric_infos],
    )  # fmt: skip
    groups = list_session_groups.Handler(ctx, hparams, "", request).run().session_groups
    assert [g.name for g in groups] == ["a/tensorboard", "b/tensorboard"]
    for group, folder, gate in zip(groups, (finished, other), ("null", "skillsd.objective.TraceGate"), strict=True):
        assert group.hparams[f"{where}.gate"].string_value == gate
        values = {v.name.tag: v.value for v in group.metric_values}
        after = panel(folder)["after"]
        assert (values["final/success"], values["final/completion"]) == pytest.approx((after["success"], after["completion"]))


def test_the_closing_table_and_running_again(run, tell):
    """A finished run plays nothing: it prints its table."""
    stood = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "tensorboard" not in p.parts and p.name != "config.yaml"}
    out = tell("fit", run, "--ckpt_path", "last")
    assert "panel of 4 held-out episodes, 95% intervals" in out and "after - before, paired" in out
    for name, path in (("adapter", "adapter/student"), ("log", "metrics.csv"), ("trajectories", "trajectories.jsonl")):
        assert f"{name}: {run / path}\n" in out
    assert "skill bank: " in out and "of 5 tasks" in out
    assert "panel before" not in out and "panel after" not in out  # said when they are played
    assert [p.name for p, content in stood.items() if p.read_bytes() != content] == []


# -- how long a run is ------------------------------------------------------------------------------------------------------------


def budget(steps: int) -> str:
    return f"--trainer.callbacks+={{class_path: skillsd.callbacks.EnvStepBudget, init_args: {{steps: {steps}}}}}"


OWN_LENGTH = ["--trainer.max_epochs=40", "--model.optimizer.schedule_steps=8"]  # a cosine that no limit changes


def env_steps(folder: Path) -> list[float]:
    return [float(r["rollout/env_steps"]) for r in csv.DictReader((folder / "metrics.csv").open())]


def test_a_budget_of_environment_steps(tell, tmp_path):
    """Training stops after the iteration that reaches it; a resumed run counts on, and a finished one plays nothing more."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = tell("fit", whole, budget(150), *OWN_LENGTH)
    used = env_steps(whole)
    assert sum(used[:-1]) < 150 <= sum(used) and len(used) < 12
    assert "after - before, paired" in out and set(panel(whole)) == {"before", "after", "difference"}
    rates = [float(r["optimizer/lr"]) for r in csv.DictReader((whole / "metrics.csv").open())]
    assert rates == pytest.approx([5e-3 * 0.5 * (1 + math.cos(math.pi * min(i, 8) / 8)) for i in range(len(used))])
    state = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == len(used) and state["callbacks"]["EnvStepBudget"] == {"used": sum(used)}

    stood = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and "tensorboard" not in p.parts and p.name != "config.yaml"}
    out = tell("fit", whole, "--ckpt_path", "last", budget(150), *OWN_LENGTH)
    assert "after - before, paired" in out and "panel after:" not in out
    assert [p.name for p, content in stood.items() if p.read_bytes() != content] == []

    tell("fit", parts, budget(150), *OWN_LENGTH, "--trainer.max_steps=1")
    for limit in (["--trainer.max_steps=3"], []):
        tell("fit", parts, "--ckpt_path", "last", budget(150), *OWN_LENGTH, *limit)
    assert env_steps(parts) == used
    for name in ("trajectories.jsonl", "panel.json", "adapter/student/adapter_model.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()

    tell("fit", whole, "--ckpt_path", "last", budget(int(sum(used)) + 1), *OWN_LENGTH)  # a larger one goes on
    assert len(env_steps(whole)) == len(used) + 1 and env_steps(whole)[:-1] == used


CURVE = "--panel.every=1"


def test_a_learning_curve(run, tell, tmp_path):
    """Its points are panels of the agent at that iteration; training does not notice them."""
    folder = tmp_path / "curve"
    out = tell("fit", folder, CURVE)
    assert [line.partition(":")[0] for line in out.splitlines() if line.startswith("panel") and ": success" in line] == [
        "panel before", "panel after 1 iteration", *(f"panel after {i} iterations" for i in (2, 3)), "panel after",
    ]  # fmt: skip
    content = panel(folder)
    assert list(content) == ["before", "during", "after", "difference"] and list(content["during"]) == ["1", "2", "3"]
    assert {k: v for k, v in content.items() if k != "during"} == panel(run)
    timeless = [
        [{k: v for k, v in r.items() if not k.startswith(("time/", "memory/"))} for r in csv.DictReader((f / "metrics.csv").open())]
        for f in (run, folder)
    ]
    assert timeless[0] == timeless[1]
    for steps, shares in content["during"].items():
        part = tmp_path / f"part-{steps}"
        tell("fit", part, f"--trainer.max_steps={steps}")
        after = panel(part)["after"]
        assert shares == {"n": 4, "success": after["success"], "completion": after["completion"]}
    tell("fit", folder, "--ckpt_path", "last", CURVE)
    assert panel(folder) == content


def test_a_learning_curve_has_no_point_where_a_budget_ends(tell, tmp_path):
    """`after` is that point."""
    tell("fit", tmp_path / "run", CURVE, budget(60), "--trainer.max_epochs=40")
    n = len(env_steps(tmp_path / "run"))
    assert 1 < n < 8 and list(panel(tmp_path / "run")["during"]) == [str(k) for k in range(1, n)]


# -- methods ------------------------------------------------------------------------------------------------------------------------

METHODS = sorted(p.stem for p in (conf_dir() / "method").glob("*.yaml"))
TAUGHT_AT_ONCE = set("hindsight opid sibling ground_truth ema_teacher frozen_teacher opd topk_jsd rlsd off_policy_frozen".split())
"""Methods that need no bank: their teacher speaks in the first epoch, or may."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(tell, tmp_path, name):
    """Two epochs: without skills in the bank, and with. Who sees them, and whether the teacher speaks."""
    tell("fit", tmp_path / "run", "-c", f"method/{name}")
    rows = [{k: float(v) for k, v in r.items() if v} for r in csv.DictReader((tmp_path / "run" / "metrics.csv").open())]
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
    assert name in TAUGHT_AT_ONCE or all(r["teacher/k3"] == 0 for r in rows[:2])
    assert (name in ("opid", "rlsd")) == any(r["teacher/shift"] > 0 for r in rows)


def test_an_environment_that_has_no_solver(tmp_path, capsys, hosted, monkeypatch):
    monkeypatch.setattr(SokobanEnv, "solution", property(lambda env: getattr(env, "no solution")))
    monkeypatch.delattr(Hosted, "solution")
    monkeypatch.delattr(SokobanEnv, "picture")
    assert command("play", tmp_path / "none", hosted, "--model.policy.model=/no/such", f"--gif={tmp_path / 'a.gif'}") == 2
    told = "gif: skillsd_test/Hosted-v0 offers no picture(observation) to draw: leave out --gif.\n"
    assert capsys.readouterr() == ("", f"error: {told}") and Hosted.alive == 0 and not (tmp_path / "a.gif").exists()
    context = "--skills.context=skillsd.skills.GroundTruthContext"
    assert command("fit", tmp_path / "run", hosted, context) == 2
    assert "skills.context: skillsd_test/Hosted-v0 offers no solution(): choose another context" in capsys.readouterr().err
    assert Hosted.alive == 0


# -- validate, play, export -------------------------------------------------------------------------------------------------------


def test_validate(run, tell, tmp_path):
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "validations.jsonl"}
    out = tell("validate", run, "--ckpt_path", "last")
    (record,) = read_validations(run)
    assert record["levels"] == panel(run)["after"]["levels"] and record["step"] == len((run / "metrics.csv").read_text().splitlines()) - 1
    assert "validate 1" in out and "after - before, paired" in out
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "validations.jsonl"} == files

    fresh = tmp_path / "fresh"  # without a checkpoint: the agent as it is
    tell("validate", fresh)
    assert read_validations(fresh)[-1]["levels"] == panel(run)["before"]["levels"]
    assert sorted(p.name for p in fresh.iterdir()) == ["run.json", "validations.jsonl"]  # no run: a fit may begin here
    tell("validate", fresh, "--data.panel_adapter=null")
    assert read_validations(fresh)[-1]["levels"] == panel(run)["before"]["levels"]  # adapters begin at nothing
    start = f"--model.policy.lora.init={run / 'adapter' / 'student'}"
    tell("validate", fresh, start)
    assert read_validations(fresh)[-1]["levels"] == panel(run)["after"]["levels"] and len(read_validations(fresh)) == 3


def test_sampled_attempts_and_seeds(tell, tmp_path):
    flags = ["--data.panel_attempts=4", "--data.panel_temperature=1.0"]
    out = tell("validate", tmp_path / "a", *flags)
    (result,) = read_validations(tmp_path / "a")
    assert result["n"] == 16 and set(result["pass_at"]) == {"1", "2", "4"}
    one, two, four = (result["pass_at"][k] for k in "124")
    assert one == pytest.approx(result["success"]) and one <= two <= four
    assert f"validate 1: pass@1 {one:.3f}, pass@2 {two:.3f}, pass@4 {four:.3f}" in out

    tell("validate", tmp_path / "b", "--data.panel_seeds=[0, 1, 2]", "--data.panel_temperature=1.0")
    levels = read_validations(tmp_path / "b")[-1]["levels"]
    assert [x["seed"] for x in levels] == [s for s in range(3) for _ in range(4)]
    first = [x for x in result["levels"] if x["member"] == 0]
    assert levels[:4] == first  # the same noise, whatever else is played


def test_play(run, tell, tmp_path):
    plain = tell("play", tmp_path / "none", "--level", "1")
    start = "weights: nano, as it starts (no checkpoint); skill: none\n"
    assert plain.startswith(f"{start}task test-0001 short\n--- turn 1\n######") and "--- skill" not in plain
    assert "\n> " in plain and "success " in plain.splitlines()[-1]
    level = panel(run)["before"]["levels"][1]
    assert f"success {level['success']}" in plain and f"{level['turns']} turns" in plain

    shown = tell("play", tmp_path / "none", "--level", "1", "--skill", "true")
    assert "--- skill\nsolved none : " in shown and "skill: made from the environment's own solution" in shown.splitlines()[0]
    trained = tell("play", run, "--level", "1", "--ckpt_path", "last")
    assert f"success {panel(run)['after']['levels'][1]['success']}" in trained
    assert not (tmp_path / "none").exists()

    flags = ["--task", "test-0001", "--ckpt_path", "last"]
    assert tell("play", run, *flags) == trained == tell("play", run, "--level", "1")  # the last checkpoint is the default
    assert trained.startswith(f"weights: {run / 'checkpoints' / 'last.ckpt'}, iteration 4; skill: none\n")
    assert tell("play", run, "--level", "1", "--ckpt_path", "null") == plain
    assert tell("play", tmp_path / "none", "--task", "train-0002").startswith(f"{start}task train-0002 short\n--- turn 1\n######")
    with SkillBank(run / "bank.sqlite", read_only=True) as bank:
        task = next(iter(bank.tasks()))
        known = {s.skill_id for s in bank.skills(task)}
    skill = re.search(r"skill: (\d+) of .*bank.sqlite", tell("play", run, "--task", task, "--skill"))
    assert skill is not None and int(skill[1]) in known


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
    assert len(list(csv.DictReader((moved / "metrics.csv").open()))) == 6
    config = yaml.safe_load((moved / "config.yaml").read_text())
    assert config["trainer"]["default_root_dir"] == str(moved) and not set(COMMAND_KEYS) & set(config)
    assert not run.exists()

    assert cli.main(["fit", str(moved), "--overwrite", "--trainer.max_epochs=1"]) == 0
    assert len(list(csv.DictReader((moved / "metrics.csv").open()))) == 2
    assert cli.main(["fit", str(moved), f"--trainer.default_root_dir={tmp_path / 'second'}", "--trainer.max_epochs=1"]) == 0
    assert len(list(csv.DictReader((tmp_path / "second" / "metrics.csv").open()))) == 2 and (tmp_path / "second" / "tensorboard").is_dir()


class Hosted(SokobanEnv):
    """Sokoban whose host may lose an episode, with an agent of its own; it counts what was not closed."""

    alive = 0

    def __init__(self, lost_at: int = 0, solvable: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lost_at, self.known = lost_at, solvable
        Hosted.alive += 1

    @property
    def agents(self) -> dict[str, Callable[[], Any]]:
        return {"pusher": Pusher}

    def step(self, action: str) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        if self.lost_at and info["turn"] >= self.lost_at:
            return observation, 0.5, True, False, {**info, "failed": "the host\nis gone", "completion": 1.0}
        return observation, reward, terminated, truncated, info

    def solution(self) -> list[str] | None:
        return super().solution() if self.known else None

    def close(self) -> None:
        Hosted.alive -= 1


class Pusher:
    """Always to the left; it knows what it has seen."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def act(self, observation: str) -> str:
        self.seen.append(observation)
        return "left" if len(self.seen) % 2 else f"go {len(self.seen)}"


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The flag that chooses it."""
    gymnasium.register("skillsd_test/Hosted-v0", Hosted)
    monkeypatch.setattr(Hosted, "alive", 0)
    yield "--data.env=skillsd_test/Hosted-v0"
    del gymnasium.registry["skillsd_test/Hosted-v0"]


NO_MODEL = "--model.policy.model=/no/such/model"


def test_play_the_oracle(tell, tmp_path, hosted):
    """It needs no model, not even a tokenizer."""
    env = SokobanEnv(**TINY["data"]["env_kwargs"])
    for flags, task_id in ((["--level", "3"], "test-0003"), ([], "test-0000"), (["--task", "train-0004"], "train-0004")):
        observation, info = env.reset(options={"task_id": task_id})
        plan = env.solution()
        assert plan and len(plan) == info["optimal_length"]
        told = tell("play", tmp_path / "none", NO_MODEL, "--policy", "oracle", *flags)
        assert told.startswith(f"weights: none, oracle plays; skill: none\ntask {task_id} short\n--- turn 1\n{observation}\n> {plan[0]}\n")
        for action in plan:
            observation = env.step(action)[0]
        last = f"--- at the end\n{observation}\n--- done: success True, completion 1.00, reward 1.00, {len(plan)} turns\n"
        assert told.endswith(f"\n> {plan[-1]}\n{last}")
        assert told == tell("play", tmp_path / "none", NO_MODEL, hosted, "--policy=oracle", *flags)
        assert Hosted.alive == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("policy", ["oracle", "model"])
def test_play_as_a_gif(tell, tmp_path, hosted, policy):
    """A frame a turn and one of how it ends, each what the environment draws; nothing else is told or left than without."""
    flags = [hosted, "--policy", policy, "--level", "2"]
    plain = tell("play", tmp_path / "none", *flags)
    told = tell("play", tmp_path / "none", *flags, f"--gif={tmp_path / 'new' / 'a.gif'}")
    assert told == f"{plain}gif: {tmp_path / 'new' / 'a.gif'}\n" and Hosted.alive == 0 and not (tmp_path / "none").exists()
    env = SokobanEnv(**TINY["data"]["env_kwargs"])
    boards = [env.reset(options={"task_id": "test-0002"})[0]]
    boards += [env.step(line[2:])[0] for line in plain.splitlines() if line.startswith("> ")]
    with Image.open(tmp_path / "new" / "a.gif") as gif:
        assert gif.n_frames == len(boards) > 3
        for i, board in enumerate(boards):
            gif.seek(i)
            drawn = env.picture(board)
            off = np.abs(np.asarray(gif.convert("RGB"))[: len(drawn)] - drawn.astype(int))
            assert off.mean() < 4 and (off.max(2) > 60).mean() < 0.01  # the palette rounds


def test_play_an_agent_of_the_environment(tell, tmp_path, hosted):
    told = tell("play", tmp_path / "none", NO_MODEL, hosted, "--policy", "pusher", "--level", "1")
    answers = [line for line in told.splitlines() if line.startswith("> ")]
    assert answers == ["> left", "> go 2", "> left", "> go 4", "> left", "> go 6"]  # a new agent an episode
    assert told.count("could not be read") == 3
    assert told.splitlines()[-1].startswith("--- horizon: success False, completion 0.00") and told.endswith(" 6 turns\n")
    assert Hosted.alive == 0


@pytest.mark.parametrize("flags", [["--policy", "model"], ["--policy", "pusher"], ["--skill"]])
def test_play_an_episode_that_fails(tell, tmp_path, hosted, flags):
    told = tell("play", tmp_path / "none", hosted, "--data.env_kwargs.lost_at=2", *flags)
    assert told.splitlines()[-1] == "--- failed (environment: the host is gone): success False, completion 0.00, reward 0.00, 2 turns"
    assert Hosted.alive == 0


def test_play_where_no_solution_is_known(tell, tmp_path, hosted):
    told = tell("play", tmp_path / "none", NO_MODEL, hosted, "--data.env_kwargs.solvable=false", "--policy", "oracle")
    assert told.splitlines()[-1] == "--- no solution from here: success False, completion 0.00, reward 0.00, 0 turns"


BAD_PLAY: dict[str, tuple[list[str], str]] = {
    "level": (["--level", "4"], "level is 4: the panel has levels 0 to 3."),
    "level of the oracle": (["--policy", "oracle", "--level", "-1"], "level is -1: the panel has levels 0 to 3."),
    "task": (["--task", "1_1"], "task is 1_1: no task of the split test (test-0000, ...) nor of train (train-0000, ...)."),
    "both": (["--level", "0", "--task", "test-0000"], "level and task are both given: name the task to play with one of them."),
    "policy": (["--policy", "nosuch"], "policy is nosuch: with this environment choose one of model, oracle, pusher."),
    "skill": (
        ["--policy", "oracle", "--skill"],
        "skill: --policy oracle reads no prompt, so a skill would change nothing: leave out --skill.",
    ),
    "gif": (["--gif", "a.mp4"], "gif is a.mp4: give the name of a file that ends in .gif."),
    "checkpoint": (["--policy", "pusher", "--ckpt_path", "last"], "ckpt_path: --policy pusher loads no model: leave out --ckpt_path."),
}


@pytest.mark.parametrize("name", BAD_PLAY)
def test_play_what_is_not_there(tmp_path, capsys, hosted, name):
    flags, told = BAD_PLAY[name]
    assert command("play", tmp_path / "none", hosted, *flags) == 2
    out, err = capsys.readouterr()
    assert err == f"error: {told}\n" and out == "" and Hosted.alive == 0
    assert not (tmp_path / "none").exists()


def test_play_an_environment_without_extras(tmp_path, capsys, hosted, monkeypatch):
    monkeypatch.setattr(Hosted, "agents", None)
    monkeypatch.setattr(SokobanEnv, "solution", property(lambda env: getattr(env, "no solution")))
    monkeypatch.delattr(Hosted, "solution")
    monkeypatch.delattr(SokobanEnv, "picture")
    assert command("play", tmp_path / "none", hosted, "--model.policy.model=/no/such", f"--gif={tmp_path / 'a.gif'}") == 2
    told = "gif: skillsd_test/Hosted-v0 offers no picture(observation) to draw: leave out --gif.\n"
    assert capsys.readouterr() == ("", f"error: {told}") and Hosted.alive == 0 and not (tmp_path / "a.gif").exists()
    for policy, told in (
        ("oracle", "policy is oracle: the environment offers no solution() to replay: choose one of model.\n"),
        ("pusher", "policy is pusher: with this environment choose one of model.\n"),
    ):
        assert command("play", tmp_path / "none", hosted, NO_MODEL, "--policy", policy) == 2
        assert capsys.readouterr().err == f"error: {told}"


def test_a_solution_that_fails(tmp_path, capsys, hosted, monkeypatch):
    def fails(env: Any) -> None:
        raise RuntimeError("too large")

    monkeypatch.setattr(Hosted, "solution", fails)
    assert command("play", tmp_path / "none", hosted, "--policy", "oracle") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: data.env: ") and told.count("\n") == 1 and Hosted.alive == 0
    assert told.endswith(": solution() failed (raised: RuntimeError: too large): mend the environment.\n")


def test_a_reader_that_stops_reading():
    """`skillsd play | head`, with the pipe closed before anything is written."""
    command, environ = [sys.executable, "-m", "skillsd", "play", "--policy=oracle"], {**os.environ, "PYTHONUNBUFFERED": ""}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environ)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


def test_export(run, tell, tmp_path):
    out = tell("export", run, "--out", str(tmp_path / "exported"))
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


# -- settings -----------------------------------------------------------------------------------------------------------------------


def test_several_actions_a_turn_and_a_shaped_reward(tell, tmp_path):
    env = "--data.env_kwargs"
    tell(
        "fit", tmp_path / "run", "--trainer.max_epochs=1", f"{env}.actions_per_turn=3", f"{env}.distance_reward=0.1",
        f"{env}.invalid_penalty=0.25", "--data.rollout.max_turn_tokens=4", "--data.rollout.temperature=4",
    )  # fmt: skip
    played = trajectories(tmp_path / "run")
    assert len(played) == 15 and any(len(turn.action.split()) > 1 for t in played for turn in t.turns)
    assert all(t.n_actions <= 4 * len(t.turns) for t in played)
    shaped = {round(turn.reward, 6) for t in played for turn in t.turns}
    assert shaped - {0.0, 1.0}
    assert all(t.reward == pytest.approx(sum(turn.reward for turn in t.turns)) for t in played)


def test_any_logger(tell, tmp_path):
    folder = tmp_path / "run"
    logger = tmp_path / "logger.yaml"
    made = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder), "name": "csv", "version": ""}}
    logger.write_text(yaml.safe_dump({"trainer": {"logger": made}}))
    tell("fit", folder, "-c", str(logger), "--trainer.max_epochs=1")
    rows = list(csv.DictReader(next(folder.rglob("csv/**/metrics.csv")).open()))
    assert any(r.get("loss/total") for r in rows) and any(r.get("panel/success") for r in rows)
    assert "distillation_weight" in next(folder.rglob("csv/**/hparams.yaml")).read_text()
    assert not (folder / "tensorboard").exists()


def test_no_logger_and_no_distillation(tell, tmp_path):
    tell("fit", tmp_path / "run", "-c", "method/grpo", "--trainer.logger=false", "--trainer.max_epochs=2")
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert all(float(r["loss/distillation"]) == 0 == float(r["teacher/gap_mean"]) for r in rows) and len(rows) == 4
    assert all(float(r["loss/total"]) == float(r["loss/policy"]) for r in rows)


def test_a_panel_in_between(tell, tmp_path):
    tell("fit", tmp_path / "run", "--trainer.limit_val_batches=1.0", "--trainer.check_val_every_n_epoch=1")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("panel/success")) == 4  # before, after each epoch, and at the end
    assert list(panel(tmp_path / "run")) == ["before", "after", "difference"]


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
