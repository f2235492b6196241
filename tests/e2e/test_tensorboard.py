"""A run's TensorBoard, read back with TensorBoard's own reader and its plugin of hyper-parameters."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams import backend_context as hparams_context
from tests.e2e.commands import TINY, command, metrics, panel, trajectories

from skillsd.callbacks import tensorboard
from skillsd.metrics import METRICS
from skillsd.skills import SkillBank
from skillsd_sokoban.env import SokobanEnv


def events_of(folder: Path) -> EventAccumulator:
    """All of a run's TensorBoard."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=dict.fromkeys(("tensors", "scalars", "images", "histograms"), 0))
    return events.Reload()


def test_tensorboard_holds_each_metric_where_it_was_measured(finished):
    events = events_of(finished)
    scalars = set(events.Tags()["scalars"])
    assert set(METRICS) - scalars == set()
    assert {"panel/success", "panel/completion"} <= scalars
    rows = metrics(finished)
    assert [e.step for e in events.Scalars("loss/total")] == [0, 1, 2, 3] == [int(r["iteration"]) for r in rows]
    for name in METRICS:  # at each iteration in which it was measured, and at no other
        found, stands = [(e.step, e.value) for e in events.Scalars(name)], [(int(r["iteration"]), r[name]) for r in rows if r[name]]
        assert [step for step, _ in found] == [step for step, _ in stands], name
        assert [value for _, value in found] == pytest.approx([float(text) for _, text in stands], rel=1e-5, abs=1e-9)
    shares = events.Scalars("panel/success")
    assert [shares[k].value for k in (0, -1)] == pytest.approx([panel(finished)[when]["success"] for when in ("before", "after")])
    assert shares[0].step == 0


def test_tensorboard_holds_an_episode_its_boards_and_the_bank_at_each_epoch_s_start(finished):
    events = events_of(finished)
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


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three iterations of trace_gate, whose frozen teacher speaks to all, with histograms at each."""
    folder = tmp_path_factory.mktemp("traced") / "run"
    flags = ["--skills.min_reward=null", "--log.histogram_every=1", "--trainer.max_steps=3"]
    assert command("fit", folder, "-c", "method/trace_gate", *flags) == 0
    return folder


def test_histograms_of_tokens_agree_with_the_metrics(finished, traced):
    events, rows = events_of(traced), metrics(traced)
    assert len(rows) == 3
    histograms = {name: {e.step: e.histogram_value for e in events.Histograms(f"tokens/{name}")} for name in ("gap", "log_rho")}
    assert list(histograms["gap"]) == [1, 2]  # nobody has a skill yet, and the teacher is the student
    assert list(histograms["log_rho"]) == [0, 1, 2]
    for i, r in enumerate(rows):
        n = int(float(r["rollout/action_tokens"]))
        rho = histograms["log_rho"][i]
        assert rho.num == n == sum(rho.bucket)
        assert max(-rho.min, rho.max) == pytest.approx(float(r["policy/logp_drift_max"]))
        if i:
            gap, mean, std = histograms["gap"][i], float(r["teacher/gap_mean"]), float(r["teacher/gap_std"])
            assert gap.num == n == sum(gap.bucket) and gap.min <= mean <= gap.max
            assert gap.sum / n == pytest.approx(mean, rel=1e-4) and gap.sum_squares / n == pytest.approx(std**2 + mean**2, rel=1e-4)
    assert histograms["gap"][2].min < 0 < histograms["gap"][2].max  # skills of the first epoch
    assert [e.step for e in events_of(finished).Histograms("tokens/log_rho")] == [0]  # every 10 by default


def test_tensorboard_s_own_plugin_compares_runs(finished, traced, tmp_path):
    """It finds what two runs differ in and what each came to."""
    (tmp_path / "runs").mkdir()
    for name, folder in (("a", finished), ("b", traced)):
        (tmp_path / "runs" / name).symlink_to(folder)
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
    for group, folder, gate in zip(groups, (finished, traced), ("null", "skillsd.objective.TraceGate"), strict=True):
        assert group.hparams[f"{where}.gate"].string_value == gate
        values = {v.name.tag: v.value for v in group.metric_values}
        after = panel(folder)["after"]
        assert (values["final/success"], values["final/completion"]) == pytest.approx((after["success"], after["completion"]))


def test_a_panel_at_every_epoch_is_logged(output_of, tmp_path):
    output_of("fit", tmp_path / "run", "--trainer.limit_val_batches=1.0", "--trainer.check_val_every_n_epoch=1")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("panel/success")) == 4  # before, after each epoch, and at the end
    assert list(panel(tmp_path / "run")) == ["before", "after", "difference"]


def test_another_logger_gets_the_numbers(output_of, tmp_path):
    folder = tmp_path / "run"
    logger = tmp_path / "logger.yaml"
    made = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder), "name": "csv", "version": ""}}
    logger.write_text(yaml.safe_dump({"trainer": {"logger": made}}))
    output_of("fit", folder, "-c", str(logger), "--trainer.max_epochs=1")
    rows = metrics(next(folder.rglob("csv/**/metrics.csv")).parent)
    assert any(r.get("loss/total") for r in rows) and any(r.get("panel/success") for r in rows)
    assert "distillation_weight" in next(folder.rglob("csv/**/hparams.yaml")).read_text()
    assert (folder / "tensorboard").exists()  # beside it
