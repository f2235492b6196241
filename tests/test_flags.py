"""Each parameter of Lightning's Trainer works or is refused with the key to use, and every run has what it needs without being asked."""

from __future__ import annotations

import csv
import json
import logging
import re
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment

from skillsd import cli
from skillsd.callbacks import EnvStepBudget, Panel, PeerWatch, RunLog
from skillsd.cli import flags as table
from skillsd.cli.standard import STANDARD, UNFIT, check_trainer, complete, complete_pretraining, order_callbacks
from skillsd.errors import ConfigError
from skillsd.module import SkillSD
from skillsd.optimizer import OptimizerSettings
from skillsd.policy import PolicySettings
from skillsd.pretrain import Cloning
from skillsd.rollout import RolloutSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")
OTHER: dict[str, Any] = {
    "precision": "bf16-mixed", "fast_dev_run": True, "limit_train_batches": 1, "overfit_batches": 2, "limit_test_batches": 3,
    "limit_predict_batches": 3, "val_check_interval": 0.5, "num_sanity_val_steps": 2, "accumulate_grad_batches": 4,
    "gradient_clip_val": 0.5, "gradient_clip_algorithm": "value", "use_distributed_sampler": False, "barebones": True,
    "sync_batchnorm": True, "reload_dataloaders_every_n_epochs": 1, "enable_autolog_hparams": False, "model_registry": "registry",
    "optimizer": "torch.optim.Adam", "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR"},
}  # fmt: skip
"""For each parameter that is refused, a value that means something."""


# -- the table --------------------------------------------------------------------------------------------------------------------


def parser() -> LightningArgumentParser:
    made = LightningArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    made.add_argument("-c", "--config", action="config")
    table.add_seed(made)
    table.add_trainer_arguments(made)
    return made


def test_every_parameter_of_the_trainer_is_in_the_table_once():
    assert sorted([*table.WORKS, *table.REFUSED]) == sorted(table.trainer_parameters())
    assert set(OTHER) == {*table.REFUSED, *table.NO_TRAINER}


@pytest.mark.parametrize("name", OTHER)
def test_what_does_not_work_is_refused_with_its_cure(tmp_path, name):
    key = name if name in table.NO_TRAINER else f"trainer.{name}"
    refusal = table.refusals()[key]
    file = tmp_path / "x.yaml"
    made = parser()
    for value, taken in [(OTHER[name], False), *((x, True) for x in refusal.neutral)]:
        file.write_text(yaml.safe_dump({"trainer": {name: value}} if key != name else {name: value}))
        for args in ([f"--{key}={json.dumps(value)}"], [f"--config={file}"]):
            if taken:
                assert str(made.parse_args(args)[key]) == str(value)
            else:
                with pytest.raises(ArgumentError) as e:
                    made.parse_args(args)
                assert key in str(e.value) and refusal.cure in str(e.value)


def test_help_and_print_config_show_what_works(capsys):
    made = parser()
    help, config = made.format_help(), made.get_defaults()["trainer"].as_dict()
    assert all(f"--trainer.{name}" in help and name in config for name in table.WORKS)
    assert not any(f"--trainer.{name}" in help or name in config for name in table.REFUSED)
    assert config["devices"] == config["log_every_n_steps"] == 1 and config["enable_model_summary"] is False
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    shown = capsys.readouterr().out
    assert "--model.policy.model" in shown and "--method" in shown
    assert "os.getcwd" not in shown and "hpc" not in shown and "0x" not in shown
    assert "--optimizer" not in shown and "--lr_scheduler" not in shown and all(f"--{key}." in shown for key in STANDARD)


def test_help_lists_settings_and_opens_with_those_of_skillsd(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    shown = capsys.readouterr().out
    keys = ["model.optimizer.lr", "model.objective.clip_low", "data.rollout.max_rows", "trainer.max_epochs"]
    assert [shown.find(f"--{key} ") for key in keys] == sorted(shown.index(f"--{key} ") for key in keys)
    assert "torch.optim" not in shown


def test_pretraining_names_its_own_key(capsys):
    """RolloutSettings stand under `model` there."""
    assert cli.main(["pretrain", "-c", "pretrain/nano-sokoban", "--model.rollout.env_timeout=-1"]) == 2
    assert "model.rollout.env_timeout" in capsys.readouterr().err


def test_a_parameter_of_a_later_lightning_is_refused(monkeypatch):
    given = table.trainer_parameters()

    def later(self: Any, *, turbo: int = 3, max_epochs: int = 1) -> None: ...

    monkeypatch.setattr(table, "trainer_parameters", lambda: given | {"turbo": 3})
    assert "new in this Lightning" in table.refusals()["trainer.turbo"].cure
    monkeypatch.setattr(table, "trainer_parameters", lambda: {k: v for k, v in given.items() if k != "model_registry"})
    assert "trainer.model_registry" not in table.refusals()  # nor is one missed that is gone


@pytest.mark.parametrize("seed", ["true", "false", "null", "-1", "4294967296", "1.5", "x"])
def test_a_seed_outside_32_bits_is_refused(seed):
    assert parser().parse_args(["--seed_everything=4294967295"]).seed_everything == 2**32 - 1
    with pytest.raises(ArgumentError, match="seed_everything"):
        parser().parse_args([f"--seed_everything={seed}"])


def test_numbers_that_lightning_stumbles_over():
    table.check_values(table.trainer_parameters())
    for name, minimum in table.MINIMA.items():
        table.check_values({"check_val_every_n_epoch": 1, name: minimum})
        with pytest.raises(ConfigError, match=f"trainer.{name} is "):
            table.check_values({"check_val_every_n_epoch": 1, name: minimum - 1})
    with pytest.raises(ConfigError, match="check_val_every_n_epoch is null"):
        table.check_values({"check_val_every_n_epoch": None})


# -- what every run has -------------------------------------------------------------------------------------------------------------


class Own(L.Callback):
    """A callback of the user's."""


class OwnPanel(Panel):
    """A piece that was changed."""


def standard() -> dict[str, L.Callback]:
    return {key: kind() for key, kind in STANDARD.items()}


def names(callbacks: list[L.Callback]) -> list[str]:
    return [type(c).__name__ for c in callbacks]


def test_the_order_of_callbacks(capsys):
    """Whatever is given: who ends the run by the clock, who acts, who records; of checkpoints the run's own first."""
    acting, recording = (
        ["TeacherSync", "SkillBankCallback", "Diagnostics", "ProgressLog"],
        ["RunLog", "Panel", "AdapterExport", "MemoryPlan"],
    )
    assert names(order_callbacks(standard(), [])) == [*acting, "RunCheckpoint", *recording, "PeerWatch"]
    given = [ModelCheckpoint(), Own(), PeerWatch(), EnvStepBudget(1)]
    found = order_callbacks(standard(), given, max_time="00:00:00:01")
    assert names(found) == ["Timer", *acting, "RunCheckpoint", *names(given), *recording]
    assert L.Trainer(callbacks=found, logger=False, accelerator="cpu").checkpoint_callback is found[5]
    assert names(order_callbacks(standard(), [Own(), Timer("00:00:00:01")]))[0] == "Timer"
    assert names(order_callbacks(standard(), [], ["log", "panel", "adapter", "checkpoint"])) == [*acting, "MemoryPlan", "PeerWatch"]
    assert names(order_callbacks({}, [Own()])) == ["ProgressLog", "Own", "MemoryPlan", "PeerWatch"]

    capsys.readouterr()
    changed = order_callbacks(standard(), [OwnPanel(every=3), Own()])
    assert names(changed) == [*acting, "RunCheckpoint", "Own", "RunLog", "OwnPanel", "AdapterExport", "MemoryPlan", "PeerWatch"]
    assert "OwnPanel" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="OwnPanel and OwnPanel"):
        order_callbacks(standard(), [OwnPanel(), OwnPanel()])
    with pytest.raises(ConfigError, match="max_time"):
        order_callbacks(standard(), [Timer("00:00:00:01")], max_time="00:00:00:01")


@pytest.mark.parametrize("key", STANDARD)
def test_a_standard_callback_in_the_list_is_refused_with_its_key(key):
    with pytest.raises(ConfigError, match=f"trainer.callbacks: .*`{key}:`"):
        order_callbacks(standard(), [STANDARD[key]()])


def test_callbacks_of_lightning_that_do_not_fit_are_refused():
    for kind, cure in UNFIT.items():
        with pytest.raises(ConfigError, match=re.escape(cure)):
            order_callbacks(standard(), [kind.__new__(kind)])


def trainer_config(**changes: Any) -> dict[str, Any]:
    return table.trainer_parameters() | table.DEFAULTS | changes


def test_pretraining_has_none_of_them():
    made = complete_pretraining(trainer_config())
    assert (
        names(made["callbacks"]) == ["ProgressLog", "MemoryPlan", "PeerWatch"] and not made["logger"] and not made["enable_checkpointing"]
    )
    assert made["limit_val_batches"] is None  # it plays its panel as Lightning's validation
    with pytest.raises(ConfigError, match=r"trainer\.enable_checkpointing"):
        complete_pretraining(trainer_config(enable_checkpointing=True))


def test_other_commands_than_fit(tmp_path, capsys):
    """A validation plays the panel, whatever a fit does without."""
    made = standard() | {"panel": Panel(enabled=False), "log": RunLog(enabled=False)}
    config = complete(trainer_config(limit_val_batches=0), made, "validate")
    assert config["limit_val_batches"] is None and {"Panel"} == {"Panel", "RunLog"} & set(names(config["callbacks"]))
    assert capsys.readouterr().out == ""


def test_plugins_are_cluster_environments():
    complete(trainer_config(plugins=[LightningEnvironment()]), standard(), "fit")
    with pytest.raises(ConfigError, match=r"model\.policy\.dtype"):
        complete(trainer_config(plugins=HalfPrecision("bf16-true")), standard(), "fit")


def test_a_run_without_an_end_has_no_cosine():
    endless = L.Trainer(max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu")
    cosine = SkillSD(PolicySettings("nano"), optimizer=OptimizerSettings(schedule="cosine"))
    with pytest.raises(ConfigError, match="schedule_steps"):
        check_trainer(endless, cosine)
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs"):
        check_trainer(endless, Cloning(PolicySettings("nano")))
    check_trainer(endless, SkillSD(PolicySettings("nano"), optimizer=OptimizerSettings(schedule="cosine", schedule_steps=9)))
    check_trainer(L.Trainer(max_epochs=-1, max_steps=3, logger=False, enable_checkpointing=False, accelerator="cpu"), cosine)


def test_an_answer_fits_the_model():
    """A small agent that does not stop plays every answer to its limit."""
    settings = RolloutSettings()
    assert [settings.turn_tokens(n) for n in (16, 2048, 8192, 1 << 18)] == [1, 64, 256, 512]
    assert RolloutSettings(max_turn_tokens=7).turn_tokens(2048) == 7


# -- runs ---------------------------------------------------------------------------------------------------------------------------

ENV = {
    "size": 6, "boxes": 1, "difficulties": {"short": {"lengths": [3, 5]}}, "splits": {"train": {"short": 4}, "test": {"short": 2}},
    "max_turns": 3, "action_format": "bare", "prompts": {"instruction": ""},
}  # fmt: skip
EXPERIMENT = {
    "trainer": {"default_root_dir": "run", "max_epochs": 1},
    "model": {"policy": {"model": "nano"}},
    "data": {"env": "skillsd_sokoban:skillsd/Sokoban-v0", "env_kwargs": ENV, "batch_tasks": 2, "group_size": 2},
}
"""All that an experiment has to say."""


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """`skillsd fit` of the experiment in a run folder of this name; what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    Path("x.yaml").write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")

    def run(folder: str, *args: str, code: int = 0) -> str:
        assert cli.main(["fit", "-c", "x.yaml", f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu", *args]) == code
        out, err = capsys.readouterr()
        assert code == 0 or (err.startswith("error: ") and err.count("\n") == 1)
        return out if code == 0 else err

    return run


def rows(folder: str, timeless: bool = True) -> list[dict[str, str]]:
    found = csv.DictReader((Path(folder) / "metrics.csv").open())
    return [{k: v for k, v in r.items() if not (timeless and k.startswith(("time/", "memory/")))} for r in found]


def test_an_experiment_of_one_s_own_is_recorded_and_continued(fit):
    out = fit("run")
    assert "this run leaves" not in out and "rollout.max_turn_tokens: 64" in out
    assert sorted(p.name for p in Path("run").iterdir() if not p.name.startswith(".")) == [
        "adapter", "bank.sqlite", "checkpoints", "config.yaml", "metrics.csv", "panel.json", "run.json", "tensorboard",
        "trajectories.jsonl",
    ]  # fmt: skip
    assert {"before", "after"} <= set(json.loads(Path("run/panel.json").read_text(encoding="utf-8"))) and len(rows("run")) == 2
    first, bank = rows("run"), Path("run/bank.sqlite").stat().st_size
    fit("run", "--trainer.max_epochs=2", "--ckpt_path", "last")
    assert rows("run")[:2] == first and [r["iteration"] for r in rows("run")] == ["0", "1", "2", "3"]
    assert float(rows("run")[-1]["teacher/skill_share"]) == 1 and Path("run/bank.sqlite").stat().st_size >= bank


def test_flags_that_only_look_change_no_number(fit, caplog):
    """The flags that look at a run, or say how it computes, all at once: the numbers are those of a run without them."""
    quiet = ["--panel.enabled=false", "--trainer.max_steps=2"]
    fit("plain", *quiet, "--trainer.logger=false")
    caplog.set_level(logging.INFO)
    fit(
        "looked", *quiet, "--trainer.deterministic=true", "--trainer.benchmark=false", "--trainer.inference_mode=false",
        "--trainer.detect_anomaly=true", "--trainer.enable_model_summary=true", "--trainer.profiler=simple", "--trainer.logger=true",
        "--trainer.log_every_n_steps=2", "--trainer.enable_progress_bar=false", "--trainer.num_nodes=1", "--trainer.devices=auto",
        "--trainer.limit_val_batches=1", "--trainer.check_val_every_n_epoch=1", "--trainer.precision=32-true",
        "--trainer.plugins=lightning.fabric.plugins.environments.LightningEnvironment",
    )  # fmt: skip
    assert rows("looked") == rows("plain") and not Path("plain/tensorboard").exists()
    assert "training_step" in Path("looked/tensorboard/fit-profile.txt").read_text(encoding="utf-8")


def test_limits_of_a_run_s_length_combine(fit):
    """No end but a budget or the clock; a smallest length that a budget does not undercut."""
    less = ["--panel.enabled=false", "--adapter.enabled=false", "--trainer.logger=false"]
    budget = "--trainer.callbacks+={class_path: skillsd.callbacks.EnvStepBudget, init_args: {steps: 1}}"
    out = fit("budget", *less, budget, "--trainer.max_epochs=-1", "--trainer.min_steps=3")
    assert len(rows("budget")) == 3 and "no panel (panel.enabled), no adapter" in out
    fit("epochs", *less, budget, "--trainer.max_epochs=-1", "--trainer.min_epochs=2")
    assert len(rows("epochs")) == 4
    fit("clock", *less, "--trainer.max_epochs=null", "--trainer.max_time=00:00:00:01")
    assert rows("clock")
    assert "no iteration was trained" in fit("none", *less, "--trainer.max_steps=0")


def test_a_run_that_records_nothing_says_so(fit):
    out = fit(
        "bare", "--panel.enabled=false", "--log.enabled=false", "--adapter.enabled=false", "--trainer.enable_checkpointing=false",
        "--trainer.logger=false", "--trainer.max_steps=1",
    )  # fmt: skip
    assert all(word in out for word in ("log.enabled", "panel.enabled", "adapter.enabled", "trainer.enable_checkpointing"))
    assert {p.name for p in Path("bare").iterdir() if not p.name.startswith(".")} == {"bank.sqlite", "config.yaml", "run.json"}


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--trainer.precision=bf16-mixed"], "model.policy.dtype"),
        (["--optimizer.lr=1"], "model.optimizer"),
        (["--trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch"),
        (["--trainer.accelerator=tpu"], "trainer"),
        (["--trainer.profiler=xla"], "trainer.profiler"),
        (["--trainer.max_epochs=-1", "--model.optimizer.schedule=cosine"], "model.optimizer.schedule_steps"),
        (["--ckpt_path=last", "--trainer.enable_checkpointing=false"], "trainer.enable_checkpointing"),
        (["--ckpt_path=best"], "ckpt_path"),
        (["--log.trajectories=null"], "log.trajectories"),
        (["--panel.every=-1"], "panel.every"),
    ],
)
def test_refused_before_anything_is_written(fit, flags, key):
    assert key in fit("run", *flags, code=2)
    assert not Path("run").exists()
