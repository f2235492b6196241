"""Every file under conf/: parsed as `skillsd fit` does, instantiated, and played for a moment. Hub models are tiny random ones here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import yaml
from bitsandbytes.nn import Linear4bit

import skillsd.cli
from skillsd import conf_dir
from skillsd.callbacks import TeacherSync
from skillsd.errors import ConfigError
from skillsd.pretrain import DemonstrationData
from skillsd.rollout import Row
from skillsd.skills import SKILL_TEMPLATE, BaseSummariser, RulesSummariser
from skillsd.skills.callback import SkillBankCallback

CONF = conf_dir()
FILES = sorted(p.relative_to(CONF).as_posix() for p in CONF.rglob("*.yaml"))
OVERLAYS = ("method/", "model/", "hardware/")
GENERIC = ["model/smollm2-135m.yaml", "model/qwen3-0.6b.yaml", "model/qwen3-4b.yaml"]
"""Overlays that serve any experiment."""
SOKOBAN, APPWORLD = "skillsd_sokoban:skillsd/Sokoban-v0", "skillsd_appworld:skillsd/AppWorld-v0"
EXPERIMENTS = ["sokoban.yaml", *(name for name in FILES if name == "appworld.yaml")]
TINY = {"Qwen/Qwen3": "qwen3", "smollm2": "llama"}
"""How a model's name begins -> the architecture that stands for it."""


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / name).read_text())


def named_model(files: list[str]) -> str:
    """The model of the last file that names one."""
    names = [read(f)["model"]["init_args"].get("policy", {}).get("model") for f in files]
    return next(n for n in reversed(names) if n)


@pytest.fixture
def fit(monkeypatch, tmp_path, tiny_model) -> Callable[..., Any]:
    """Files and flags -> what `skillsd fit` has made of them, just before it would run."""
    made = []

    class Stopped(skillsd.cli.CLI):
        def _run_subcommand(self, subcommand: str) -> None:
            made.append(self)

    monkeypatch.setattr(skillsd.cli, "CLI", Stopped)

    def make(files: list[str], *flags: str) -> Any:
        stand_in = [f"--model.init_args.policy.model={tiny_model(a)}" for n, a in TINY.items() if named_model(files).startswith(n)]
        configs = [x for f in files for x in ("-c", str(CONF / f))]
        assert skillsd.cli.main(["fit", *configs, f"--trainer.default_root_dir={tmp_path}", *stand_in, *flags]) == 0
        return made.pop()

    return make


def bank(cli: Any) -> SkillBankCallback:
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, SkillBankCallback))
    return callback


def configured(cli: Any) -> Any:
    """Load the model and join the three parts, as Lightning does."""
    cli.model.configure_model()
    cli.trainer.strategy.connect(cli.model)
    cli.datamodule.trainer = cli.trainer
    return cli.model.policy


def play(cli: Any) -> None:
    """A training episode and one of the panel, with short answers."""
    data = cli.datamodule
    data.setup("fit")
    data.rollout.max_turn_tokens = min(4, data.rollout.max_turn_tokens)
    rows = [Row(data.train_tasks[0]), Row(data.panel_tasks[0])]
    for t in data.collector.collect(rows, seed=0, iteration=0):
        assert t.turns and sum(t.action_mask) > 0 and len(t.token_ids) == len(t.logprobs)
        assert bool(t.instruction) == (data.env_kwargs.get("prompts") is None)


@pytest.mark.parametrize("name", FILES)
def test_every_file_instantiates(fit, name, tmp_path, monkeypatch):
    cli = fit(["sokoban.yaml", name] if name.startswith(OVERLAYS) else [name])
    policy = configured(cli)
    quantised = any(isinstance(m, Linear4bit) for m in policy.base.modules())
    assert quantised == (cli.model.settings.quantise == "nf4")
    if isinstance(cli.datamodule, DemonstrationData):
        ids, labels = cli.datamodule._set()[0]
        assert len(ids) == len(labels) and max(labels) >= 0
    elif cli.datamodule.env_id == APPWORLD:  # its tests play it; without its install it says how to get it
        monkeypatch.setenv("SKILLSD_APPWORLD", str(tmp_path / "none"))
        monkeypatch.delenv("APPWORLD_ROOT", raising=False)
        with pytest.raises(ConfigError, match="appworld download data" if "paper" in name else "make appworld"):
            cli.datamodule.setup("fit")
    else:
        play(cli)


def test_method_model_and_hardware_stack(fit, tiny_model):
    base = fit(["sokoban.yaml"])
    cli = fit(["sokoban.yaml", "method/grpo.yaml", "model/smollm2-sokoban.yaml", "hardware/8gb.yaml"])
    model, data = cli.model, cli.datamodule
    assert model.objective.distillation_weight == 0 and model.objective.clip_high == 0.28  # method
    assert (model.settings.model, model.settings.lora.targets) == (tiny_model("llama"), "all-linear")  # model
    assert (model.optim.lr, model.optim.schedule) == (5e-5, base.model.optim.schedule)
    assert (data.rollout.max_turn_tokens, data.rollout.max_rows, data.group_size) == (16, 4, 4)  # hardware over model over experiment
    assert (model.settings.head_chunk, model.settings.gradient_checkpointing, model.micro_batch_tokens) == (256, True, 4096)
    assert "prompts" not in data.env_kwargs and data.env_kwargs["separator"] == " "
    assert [type(c) for c in cli.trainer.callbacks] == [type(c) for c in base.trainer.callbacks]
    assert bank(cli).template.startswith("success_analysis: {success_analysis}\n")
    policy = configured(cli)
    assert policy.base.config.model_type == "llama" and policy.base.is_gradient_checkpointing
    play(cli)


def test_lists_merge_in_overlays(fit, tmp_path):
    """`callbacks+:` appends; a list of the same length changes items in place. The latter must come first."""
    more = tmp_path / "more.yaml"
    more.write_text(
        "trainer:\n  callbacks+:\n    - class_path: skillsd.callbacks.Panel\n      init_args: {before: false}\nmodel: {init_args: {}}\n"
    )
    files = ["sokoban.yaml", "model/smollm2-sokoban.yaml", str(more)]
    config = fit(files).config["fit"].trainer.callbacks
    listed = read("sokoban.yaml")["trainer"]["callbacks"]
    assert [c.class_path for c in config] == [*(c["class_path"] for c in listed), "skillsd.callbacks.Panel"]
    assert config[-1].init_args.before is False and config[1].init_args.summariser.init_args.joiner == ", "


@pytest.mark.parametrize("name", [*GENERIC, "model/smollm2-sokoban.yaml"])
def test_a_model_overlay_changes_the_skill_texts_alone(fit, tmp_path, name):
    """Its list has the experiment's items, so what the experiment says of the others stays."""
    listed = [c["class_path"] for c in read("sokoban.yaml")["trainer"]["callbacks"]]
    assert [c["class_path"] for c in read(name)["trainer"]["callbacks"]] == listed
    other = tmp_path / "other.yaml"
    settings = {"TeacherSync": {"mode": "ema", "rate": 0.5}, "SkillBankCallback": {"capacity": 3}, "Panel": {"before": False}}
    items = [{"class_path": c, "init_args": settings.get(c.rpartition(".")[2], {})} for c in listed]
    other.write_text(yaml.safe_dump({"trainer": {"callbacks": items}, "model": {"init_args": {}}}))
    cli = fit(["sokoban.yaml", str(other), name])
    (sync,) = (c for c in cli.trainer.callbacks if isinstance(c, TeacherSync))
    assert (sync.mode, sync.rate, bank(cli).bank_settings["capacity"]) == ("ema", 0.5, 3)
    if name in GENERIC:
        assert isinstance(bank(cli).summariser, BaseSummariser) and bank(cli).template == SKILL_TEMPLATE


def test_a_later_flag_overrides_the_file(fit, tmp_path):
    cli = fit(
        ["sokoban-paper.yaml"], "--model.init_args.optimizer.lr=1e-6", "--data.init_args.env_kwargs.max_turns=7", "--seed_everything=3"
    )
    assert cli.model.optim.lr == 1e-6 and cli.datamodule.seed == 3
    assert cli.datamodule.env_kwargs["max_turns"] == 7 and cli.datamodule.env_kwargs["boxes"] == 2
    assert Path(cli.trainer.logger.save_dir) == tmp_path  # ${...default_root_dir} follows its flag


def test_the_paper_s_setting(fit):
    cli = fit(["sokoban-paper.yaml"])
    cli.datamodule.setup("validate")
    data, model = cli.datamodule, cli.model
    train = [t.difficulty for t in data._tasks("train", "train_split")]
    assert [train.count(d) for d in ("depth15", "depth20", "depth25")] == [29, 48, 19]
    assert [t.difficulty for t in data.panel_tasks] == ["depth25"] * 64
    assert (data.batch_tasks, data.group_size, data.rollout.temperature, data.panel_temperature) == (16, 4, 1.0, 0.0)
    assert (data.rollout.max_prompt_tokens, data.rollout.max_trajectory_tokens) == (8192, 20480)
    assert (model.objective.clip_low, model.objective.clip_high, model.objective.distillation_weight) == (0.2, 0.28, 0.001)
    assert (model.optim.weight_decay, model.settings.quantise, model.settings.lora.r, model.settings.lora.alpha) == (0.0, "nf4", 16, 32)
    assert read("sokoban-paper.yaml")["model"]["init_args"]["policy"]["model"] == "Qwen/Qwen3-4B-Instruct-2507"
    callback = bank(cli)
    assert callback.context.c == 2**0.5 and callback.refresh_when == "iteration" and callback.template == SKILL_TEMPLATE
    assert isinstance(callback.summariser, RulesSummariser) and callback.summariser._solved == RulesSummariser()._solved


def skill_texts(experiment: str) -> tuple[Any, str]:
    (item,) = (c for c in read(experiment)["trainer"]["callbacks"] if c["class_path"].endswith("SkillBankCallback"))
    return item["init_args"]["summariser"], item["init_args"]["template"]


PAIRS = [("sokoban.yaml", "pretrain/nano-sokoban.yaml"), ("model/smollm2-sokoban.yaml", "pretrain/smollm2-sokoban.yaml")]


@pytest.mark.parametrize(("experiment", "pretraining"), PAIRS)
def test_an_agent_is_trained_on_the_texts_it_was_taught(experiment, pretraining):
    """Skills, prompts, answers and the horizon: in pre-training as in reinforcement learning."""
    taught, trained = read(pretraining)["data"]["init_args"], read(experiment)["data"]["init_args"]
    assert (taught["rules"], taught["template"]) == skill_texts(experiment)
    shown = {**taught["env_kwargs"], **taught.get("panel_env_kwargs", {})}
    assert [shown.get(k) for k in ("action_format", "separator", "prompts", "max_turns")] == [
        trained["env_kwargs"].get(k) for k in ("action_format", "separator", "prompts", "max_turns")
    ]


def test_the_nano_agent_s_two_panels_are_the_same_levels():
    kwargs = [read(name)["data"]["init_args"]["env_kwargs"] for name in PAIRS[0]]
    envs: list[Any] = [gymnasium.make("skillsd_sokoban:skillsd/Sokoban-v0", disable_env_checker=True, **k) for k in kwargs]
    tasks = [e.unwrapped.tasks("test") for e in envs]
    assert tasks[0] == tasks[1] and len(tasks[0]) >= 256
    for t in tasks[0]:
        first, second = (e.reset(options={"task_id": t["task_id"]})[0] for e in envs)
        assert first == second


@pytest.mark.parametrize("name", GENERIC)
def test_a_model_overlay_keeps_the_experiment_s_tasks(name):
    """It goes through env_overrides, which leave what makes the levels alone, and says nothing of the size of an iteration."""
    given = read(name)["data"]["init_args"]
    assert set(given) == {"env_overrides", "rollout"} and set(given["env_overrides"]) == {SOKOBAN}
    assert set(given["env_overrides"][SOKOBAN]) == {"max_turns", "action_format", "separator", "prompts"}


@pytest.mark.parametrize("name", GENERIC)
def test_a_model_overlay_s_entry_is_for_its_environment_alone(fit, name):
    """After another experiment the Sokoban entry is ignored: an unknown keyword would end the run."""
    base, here = fit(["sokoban.yaml"]).datamodule, fit(["sokoban.yaml", name]).datamodule
    elsewhere = fit(["sokoban.yaml", name], f"--data.init_args.env={APPWORLD}").datamodule
    assert here.env_kwargs == {**base.env_kwargs, "max_turns": 14, "action_format": "fenced", "separator": " ", "prompts": None}
    assert elsewhere.env_kwargs == base.env_kwargs and here.batch_tasks == elsewhere.batch_tasks == base.batch_tasks


@pytest.mark.parametrize(("experiment", "name"), [(e, n) for e in EXPERIMENTS for n in GENERIC])
def test_a_model_overlay_serves_every_experiment(fit, experiment, name):
    """Whatever summariser and wrapper the experiment has, the overlay's stand afterwards, and a prompt of 2,000 tokens has room."""
    base, cli = fit([experiment]), fit([experiment, name])
    assert [type(c) for c in cli.trainer.callbacks] == [type(c) for c in base.trainer.callbacks]
    summariser, small = bank(cli).summariser, "smollm2" in name
    assert isinstance(summariser, BaseSummariser) and bank(cli).template == SKILL_TEMPLATE
    assert bool(summariser.questions) == small and summariser.max_new_tokens == (128 if small else 512)
    assert read(name)["trainer"]["default_root_dir"] == f"runs/{Path(name).stem}"
    rollout = cli.datamodule.rollout
    limits = (rollout.max_turn_tokens, rollout.max_trajectory_tokens)
    assert limits == ((128, 4096) if small else (512, 8192))
    assert not small or 2_000 + rollout.max_trajectory_tokens + 3 * summariser.max_new_tokens < 8_192  # the context of SmolLM2
    assert cli.datamodule.train_split == base.datamodule.train_split and cli.datamodule.group_size == base.datamodule.group_size
