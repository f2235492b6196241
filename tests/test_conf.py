"""Every file under conf/: parsed as `skillsd fit` does, instantiated, and played for a moment. Hub models are tiny random ones here."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import yaml
from bitsandbytes.nn import Linear4bit
from lightning.pytorch.loggers import TensorBoardLogger

import skillsd.cli.launch
from skillsd import conf_dir
from skillsd.callbacks import EnvStepBudget, Panel, RunCheckpoint, RunLog, TeacherSync
from skillsd.cli.standard import STANDARD
from skillsd.config_errors import leaves
from skillsd.errors import ConfigError
from skillsd.pretrain import DemonstrationData
from skillsd.rollout import Episode
from skillsd.skills import SKILL_TEMPLATE, BaseSummariser, NoContext, RulesSummariser
from skillsd.skills.callback import SkillBankCallback
from skillsd.skills.selection import TRANSCRIPT_TEMPLATE, SkillSelection
from skillsd.study.cells import make_cells
from skillsd.study.settings import read_settings
from skillsd.trajectory import Trajectory, Turn

CONF = conf_dir()
EVERY = sorted(p.relative_to(CONF).as_posix() for p in CONF.rglob("*.yaml"))
STUDIES = [name for name in EVERY if name.startswith("study/")]
"""Read by another command."""
FILES = [name for name in EVERY if name not in STUDIES]
OVERLAYS = ("method/", "model/", "hardware/")
GENERIC = ["model/smollm2-135m.yaml", "model/qwen3-0.6b.yaml", "model/qwen3-4b.yaml"]
"""Overlays that serve any experiment."""
SOKOBAN, APPWORLD = "skillsd_sokoban:skillsd/Sokoban-v0", "skillsd_appworld:skillsd/AppWorld-v0"
EXPERIMENTS = ["sokoban.yaml", *(name for name in FILES if name == "appworld.yaml")]
ALL_EXPERIMENTS = [name for name in FILES if "/" not in name]
TINY = {"Qwen/Qwen3": "qwen3", "smollm2": "llama"}
"""How a model's name begins -> the architecture that stands for it."""


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / name).read_text())


def named_model(files: list[str]) -> str:
    """The model of the last file that names one."""
    names = [read(f).get("model", {}).get("policy", {}).get("model") for f in files]
    return next(n for n in reversed(names) if n)


@pytest.fixture
def fit(monkeypatch, tmp_path, tiny_model) -> Callable[..., Any]:
    """Files and flags -> what `skillsd fit` has made of them, just before it would run."""
    made = []

    class Stopped(skillsd.cli.launch.CLI):
        def _run_subcommand(self, subcommand: str) -> None:
            made.append(self)

    monkeypatch.setattr(skillsd.cli.launch, "CLI", Stopped)

    def make(files: list[str], *flags: str) -> Any:
        key = "--model.policy"
        stand_in = [f"{key}.model={tiny_model(a)}" for n, a in TINY.items() if named_model(files).startswith(n)]
        if stand_in:  # with the template of its own tokenizer, which knows no other's closing mark
            stand_in.append(f"{key}.chat_template=null")
        configs = [x for f in files for x in ("-c", str(CONF / f))]
        command = "pretrain" if files[0].startswith("pretrain/") else "fit"
        assert skillsd.cli.main([command, *configs, f"--trainer.default_root_dir={tmp_path}", *stand_in, *flags]) == 0
        return made.pop()

    return make


def bank(cli: Any) -> SkillSelection:
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, SkillBankCallback))
    return callback.selection


def sync(cli: Any) -> TeacherSync:
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, TeacherSync))
    return callback


def kinds(cli: Any) -> list[type]:
    return [type(c) for c in cli.trainer.callbacks]


def resolved(cli: Any) -> dict[str, Any]:
    """The configuration, but for the files that it came from."""
    return {k: v for k, v in cli.config["fit"].as_dict().items() if k != "config"}


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
    rows = [Episode(data.train_tasks[0]), Episode(data.panel_tasks[0])]
    for t in data.collector.collect(rows, seed=0, iteration=0):
        assert t.turns and sum(t.action_mask) > 0 and len(t.token_ids) == len(t.logprobs)
        assert bool(t.instruction) == (data.env_kwargs.get("prompts") is None)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("method/")])  # a method has a test of its own
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
    cli = fit(["sokoban.yaml", "method/grpo.yaml", "model/smollm2-sokoban.yaml", "hardware/8gb.yaml", "hardware/2gpu.yaml"])
    assert (cli.trainer.world_size, type(cli.trainer.strategy).__name__) == (2, "DDPStrategy")
    model, data = cli.model, cli.datamodule
    assert model.objective.distillation_weight == 0 and model.objective.clip_high == 0.28  # method
    assert (model.settings.model, model.settings.lora.targets) == (tiny_model("llama"), "all-linear")  # model
    assert (model.optim.lr, model.optim.schedule) == (5e-5, base.model.optim.schedule)
    assert (data.rollout.max_turn_tokens, data.rollout.max_rows, data.group_size) == (16, 8, 4)  # hardware over model over experiment
    assert (model.settings.head_chunk, model.settings.gradient_checkpointing, model.learner.micro_batch_tokens) == (256, True, 8192)
    assert "prompts" not in data.env_kwargs and data.env_kwargs["separator"] == " "
    assert kinds(cli) == kinds(base)
    assert bank(cli).template.startswith("success_analysis: {success_analysis}\n")
    policy = configured(cli)
    assert policy.base.config.model_type == "llama" and policy.base.is_gradient_checkpointing
    play(cli)


def test_lists_merge_in_overlays(fit, tmp_path):
    """`callbacks+:` appends; a list of the same length changes items in place, and leaves what it does not name."""

    def overlay(name: str, at: str, **arguments: Any) -> str:
        items = [{"class_path": f"lightning.pytorch.callbacks.{c}", "init_args": arguments if c == at else {}} for c in listed]
        (tmp_path / name).write_text(yaml.safe_dump({"trainer": {"callbacks": items}}))
        return str(tmp_path / name)

    listed = ["LearningRateMonitor", "DeviceStatsMonitor"]
    more = tmp_path / "more.yaml"
    more.write_text("trainer:\n  callbacks+:\n    - {class_path: skillsd.callbacks.EnvStepBudget, init_args: {steps: 9}}\n")
    a, b = overlay("a.yaml", listed[0], log_momentum=True), overlay("b.yaml", listed[0], log_weight_decay=True)
    config = fit(["sokoban.yaml", a, b, str(more)]).config["fit"].trainer.callbacks
    assert [c.class_path.split(".")[-1] for c in config] == [*listed, "EnvStepBudget"] and config[-1].init_args.steps == 9
    assert config[0].init_args.log_momentum and config[0].init_args.log_weight_decay


# -- `teacher:` and `skills:` -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_EXPERIMENTS)
def test_the_callbacks_that_every_run_has(fit, name, tmp_path):
    """Those that act come first: what is logged and saved at an iteration's end includes theirs. No experiment lists any."""
    cli = fit([name])
    assert [k for k in kinds(cli) if k in STANDARD.values()] == list(STANDARD.values())
    assert set(read(name)["trainer"]) == {"default_root_dir", "max_epochs"}
    assert isinstance(cli.trainer.logger, TensorBoardLogger) and Path(cli.trainer.logger.log_dir) == tmp_path / "tensorboard"
    assert (
        kinds(cli)[:2] == [TeacherSync, SkillBankCallback]
        and sync(cli).mode == ("frozen" if name == "sokoban.yaml" else "sync")
        and sync(cli).every == 1
    )


def test_they_are_set_in_a_file_and_by_flags(fit, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("teacher: {mode: ema, rate: 0.5}\nskills: {capacity: 3, refresh: iteration, template: '{golden_workflow}'}\n")
    base, cli = fit(["sokoban.yaml"]), fit(["sokoban.yaml", str(file)])
    assert (sync(cli).mode, sync(cli).rate, sync(cli).every) == ("ema", 0.5, 1)
    assert (bank(cli).bank_settings["capacity"], bank(cli).refresh, bank(cli).template) == (3, "iteration", "{golden_workflow}")
    assert bank(cli).summariser._solved == bank(base).summariser._solved  # the rest stays
    assert bank(cli).transcript_template == bank(base).transcript_template == "solved none : {actions}\n"
    flags = ["--teacher.rate=0.25", "--skills.context=skillsd.skills.NoContext", "--skills.capacity=null", "--skills.template=null"]
    both = fit(["sokoban.yaml", str(file)], *flags)
    assert (sync(both).mode, sync(both).rate) == ("ema", 0.25)
    assert isinstance(bank(both).context, NoContext) and bank(both).bank_settings["capacity"] is None
    assert (bank(both).template, bank(both).refresh) == (SKILL_TEMPLATE, "iteration")
    assert sync(fit(["sokoban.yaml"], "--teacher.mode=ema")).mode == "ema"
    context = "--skills.context={class_path: skillsd.skills.BankContext, init_args: {c: 0.5}}"
    assert bank(fit(["sokoban.yaml"], context)).context.c == 0.5
    assert bank(fit(["sokoban.yaml"], "--skills.summariser.init_args.joiner=;")).summariser.joiner == ";"


@pytest.mark.parametrize("name", [*GENERIC, "model/smollm2-sokoban.yaml"])
def test_a_model_overlay_changes_the_skill_texts_alone(fit, tmp_path, name):
    """What an experiment, or another overlay, says of the teacher, the bank and the callbacks stays."""
    given = read(name)
    assert set(given["trainer"]) == {"default_root_dir"} and "teacher" not in given
    assert set(given["skills"]) == {"summariser", "template", "transcript_template"}
    other = tmp_path / "other.yaml"
    settings = {"teacher": {"mode": "ema", "rate": 0.5}, "skills": {"capacity": 3, "context": {"class_path": "skillsd.skills.NoContext"}}}
    other.write_text(yaml.safe_dump({"panel": {"before": False}, **settings}))
    for files in (["sokoban.yaml", str(other), name], ["sokoban.yaml", name, str(other)]):
        cli = fit(files)
        assert (sync(cli).mode, sync(cli).rate, bank(cli).bank_settings["capacity"]) == ("ema", 0.5, 3)
        assert isinstance(bank(cli).context, NoContext)
        assert [c.before for c in cli.trainer.callbacks if isinstance(c, Panel)] == [False]
        if name in GENERIC:
            assert isinstance(bank(cli).summariser, BaseSummariser)
            assert (bank(cli).template, bank(cli).transcript_template) == (SKILL_TEMPLATE, TRANSCRIPT_TEMPLATE)


# -- methods ------------------------------------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"weight": 0.0},
    "skillsd": {},
    "opd": {"policy": 0.0, "weight": 1.0, "teacher": "frozen"},
    "skill_grpo": {"weight": 0.0, "actor": "student_with_skill"},
    "frozen_teacher": {"teacher": "frozen"},
    "ema_teacher": {"teacher": "ema", "rate": 0.05},
    "off_policy_frozen": {"teacher": "frozen", "actor": "teacher"},
    "off_policy_dynamic": {"actor": "teacher"},
    "no_skill": {"context": "NoContext"},
    "shuffled_skill": {"context": "ShuffledContext"},
    "hindsight": {"context": "HindsightContext"},
    "sibling": {"context": "SiblingContext"},
    "sdar": {"signal": "GatedLogRatio", "weight": 0.01},
    "opid": {"signal": "GapAdvantage", "placement": "advantage", "context": "HindsightContext"},
    "rlsd": {"signal": "GapMultiplier", "placement": "multiplier", "weight": 0.5, "weight_steps": 50, "every": 10},
    "sdpg_gate": {"signal": "FullReverseKL", "gate": "PositiveGate", "filter": "zero_variance"},
    "topk_jsd": {"signal": "TopKJSD", "teacher": "ema", "rate": 0.05},
    "ucob_pairs": {"signal": "TwoViewKL", "weight": 0.1, "gate": "SigmoidGate", "actor": "half_with_skill"},
    "trace_gate": {"signal": "FullReverseKL", "weight": 1.0, "gate": "TraceGate", "teacher": "frozen", "least": 1.0},
    "ground_truth": {"signal": "FullReverseKL", "weight": 1.0, "teacher": "frozen", "context": "GroundTruthContext"},
}
METHODS |= {
    "no_skill_trace_gate": METHODS["trace_gate"] | METHODS["no_skill"],
    "shuffled_trace_gate": METHODS["trace_gate"] | METHODS["shuffled_skill"],
}
"""Overlay -> in what it differs from Skill-SD as in the paper."""
SKILL_SD: dict[str, Any] = {
    "signal": "SampledReverseKL", "placement": "loss", "policy": 1.0, "weight": 0.001, "weight_steps": 0, "gate": "NoneType",
    "filter": "none",
    "teacher": "sync", "every": 1, "rate": 0.05, "context": "BankContext", "actor": "student",
    "least": -math.inf,
}  # fmt: skip


def method(cli: Any) -> dict[str, Any]:
    o = cli.model.objective
    return {
        "signal": type(o.signal).__name__, "placement": o.placement, "policy": o.policy_weight, "weight": o.distillation_weight,
        "weight_steps": o.weight_steps, "gate": type(o.gate).__name__, "filter": o.group_filter, "teacher": sync(cli).mode,
        "every": sync(cli).every, "rate": sync(cli).rate, "context": type(bank(cli).context).__name__, "actor": cli.datamodule.actor,
        "least": bank(cli).min_reward,
    }  # fmt: skip


METHOD_KEYS = ("method", "teacher", "skills.context", "skills.min_reward", "data.actor", "model.objective")
"""What is a method's, with all below it. Model and hardware overlays set none of it, so the order of overlays does not matter."""


def sets(name: str) -> dict[str, Any]:
    """What a file sets, by dotted key."""
    return dict(leaves(read(name)))


def of_a_method(key: str) -> bool:
    return any(key == k or key.startswith(f"{k}.") for k in METHOD_KEYS)


def test_every_method_is_listed():
    assert {f"method/{name}.yaml" for name in METHODS} == {name for name in FILES if name.startswith("method/")}


@pytest.mark.parametrize("experiment", ALL_EXPERIMENTS)
def test_an_experiment_is_skill_sd_unless_another_was_confirmed(fit, experiment):
    """The paper's Skill-SD, but for the one where another setting was confirmed to be better."""
    cli = fit([experiment])
    assert method(cli) == SKILL_SD | (METHODS["trace_gate"] if experiment == "sokoban.yaml" else {})
    assert (cli.model.objective.clip_low, cli.model.objective.clip_high) == (0.2, 0.28)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_file_sets_its_method_and_nothing_else(fit, name):
    """It is what it is for, after the experiment that differs most from the paper, and it sets nothing else anywhere."""
    assert all(key.startswith("method.") for key in sets(f"method/{name}.yaml"))
    cli = fit(["sokoban.yaml", f"method/{name}.yaml"])
    assert method(cli) == SKILL_SD | METHODS[name]
    assert (cli.model.objective.clip_low, cli.model.objective.clip_high) == (0.2, 0.28)


def test_a_method_goes_before_or_after_a_model(fit):
    """They set different keys, so either order gives the same: for one pair through the command, for all others by their keys."""
    for overlay in (n for n in FILES if n.startswith(("model/", "hardware/"))):
        assert not any(map(of_a_method, sets(overlay)))
    for model, summariser, begins in (
        ("smollm2-sokoban", RulesSummariser, "success_analysis: "),
        ("qwen3-0.6b", BaseSummariser, "# Notes"),
    ):
        files = ["method/opid.yaml", f"model/{model}.yaml"]
        first, last = fit(["sokoban.yaml", *files]), fit(["sokoban.yaml", *reversed(files)])
        assert resolved(first) == resolved(last) and method(first) == method(last) == SKILL_SD | METHODS["opid"]
        assert type(bank(last).summariser) is summariser and bank(last).template.startswith(begins)


def kind(method: str) -> str:
    """A control changes its method's configuration; all others are their overlay."""
    return method if method.endswith("_trace_gate") else "plain"


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_s_cell_trains_its_method(fit, name, monkeypatch):
    """Each is what its method is by itself, and plays the panel in between; it logs, and can be continued."""
    cells = make_cells(read_settings(["-c", str(CONF / name)]), lambda n: str(CONF / n))
    assert len({c.method for c in cells}) * len({c.seed for c in cells}) == len(cells)
    for cell in cells:
        assert kind(cell.method) != "plain" or f"method/{cell.method}.yaml" in cell.configs, cell
    of_each = {kind(cell.method): cell for cell in reversed(cells)}  # methods alone are another test's
    for cell in of_each.values():
        cli = fit(list(cell.configs), *cell.flags)
        assert method(cli) == SKILL_SD | METHODS[cell.method]
        assert [k for k in kinds(cli) if k in STANDARD.values()] == [TeacherSync, SkillBankCallback, RunLog, Panel, RunCheckpoint]
        (log, saver) = (next(c for c in cli.trainer.callbacks if type(c) is k) for k in (RunLog, RunCheckpoint))
        assert not log.trajectories and saver._every_n_train_steps > 1 and EnvStepBudget in kinds(cli)
        assert cli.datamodule.seed == cell.seed
        (panel,) = (c for c in cli.trainer.callbacks if isinstance(c, Panel))
        assert panel.before and panel.after and panel.every > 0


def test_a_flag_can_set_null(fit):
    """Settings within settings and classes have their defaults too; a later flag counts."""
    flags = ["--model.policy.lora.init=null", "--model.objective.gate", "null"]
    cli = fit(["sokoban.yaml"], *flags, "--model.optimizer.lr=1e-3")
    assert cli.model.settings.lora.init is None and cli.model.objective.gate is None and cli.model.optim.lr == 1e-3
    assert type(cli.model.objective.signal).__name__ == "FullReverseKL" and cli.model.settings.lora.r == 16  # the rest stays
    last = fit(["sokoban.yaml"], *flags, "--model.policy.lora.init=nano-recover")
    assert last.model.settings.lora.init == "nano-recover"


def test_a_study_s_cells_start_from_its_agent(fit):
    """The first study was made of the agent as shipped, the confirmation of the one that recovers."""
    recovers = ("study/sokoban-confirm.yaml", "study/sokoban-shuffled.yaml")
    for name, init, lr in (("study/sokoban-nano.yaml", None, 2e-4), *((name, "nano-recover", 4e-4) for name in recovers)):
        cell = make_cells(read_settings(["-c", str(CONF / name)]), lambda n: str(CONF / n))[0]
        cli = fit(list(cell.configs), *cell.flags)
        assert (cli.model.settings.lora.init, cli.model.optim.lr) == (init, lr)


def test_a_later_flag_overrides_the_file(fit, tmp_path):
    cli = fit(["sokoban-paper.yaml"], "--model.optimizer.lr=1e-6", "--data.env_kwargs.max_turns=7", "--seed_everything=3")
    assert cli.model.optim.lr == 1e-6 and cli.datamodule.seed == 3
    assert cli.datamodule.env_kwargs["max_turns"] == 7 and cli.datamodule.env_kwargs["boxes"] == 2
    assert Path(cli.trainer.logger.save_dir) == tmp_path


def test_the_paper_s_setting(fit):
    cli = fit(["sokoban-paper.yaml"])
    cli.datamodule.setup("validate")
    data, model = cli.datamodule, cli.model
    train = [t.difficulty for t in data.tasks("train", "train_split")]
    assert [train.count(d) for d in ("depth15", "depth20", "depth25")] == [29, 48, 19]
    assert [t.difficulty for t in data.panel_tasks] == ["depth25"] * 64
    assert (data.batch_tasks, data.group_size, data.rollout.temperature, data.panel_temperature) == (16, 4, 1.0, 0.0)
    assert (data.rollout.max_prompt_tokens, data.rollout.max_trajectory_tokens) == (8192, 20480)
    assert (model.objective.clip_low, model.objective.clip_high, model.objective.distillation_weight) == (0.2, 0.28, 0.001)
    assert (model.optim.weight_decay, model.settings.quantise, model.settings.lora.r, model.settings.lora.alpha) == (0.0, "nf4", 16, 32)
    assert read("sokoban-paper.yaml")["model"]["policy"]["model"] == "Qwen/Qwen3-4B-Instruct-2507"
    callback = bank(cli)
    assert callback.context.c == 2**0.5 and callback.refresh == "iteration" and callback.template == SKILL_TEMPLATE
    assert isinstance(callback.summariser, RulesSummariser) and callback.summariser._solved == RulesSummariser()._solved


def skill_texts(experiment: str) -> tuple[Any, str]:
    given = read(experiment)["skills"]
    return given["summariser"], given["template"]


PAIRS = [
    ("sokoban.yaml", "pretrain/nano-sokoban.yaml"),
    ("sokoban.yaml", "pretrain/nano-recover.yaml"),
    ("model/smollm2-sokoban.yaml", "pretrain/smollm2-sokoban.yaml"),
]


@pytest.mark.parametrize(("experiment", "pretraining"), PAIRS)
def test_an_agent_is_trained_on_the_texts_of_its_pre_training(experiment, pretraining):
    """Skills, prompts, answers and the horizon: in pre-training as in reinforcement learning."""
    cloned, trained = read(pretraining)["data"], read(experiment)["data"]
    assert (cloned["rules"], cloned["template"]) == skill_texts(experiment)
    shown = {**cloned["env_kwargs"], **cloned.get("panel_env_kwargs", {})}
    assert [shown.get(k) for k in ("action_format", "separator", "prompts", "max_turns")] == [
        trained["env_kwargs"].get(k) for k in ("action_format", "separator", "prompts", "max_turns")
    ]


def test_a_sibling_s_attempt_uses_the_texts_of_the_pre_training(fit):
    """An attempt that went straight to the solution reads like the skill of it."""
    turns = tuple(Turn(f"s{i}", a, 0.0) for i, a in enumerate(("up", "left", "up")))
    solved = Trajectory(0, "t", 0, 0, "", (1,), (2,), (True,), (-0.1,), turns, 1.0, 1.0, True, "done")
    callback = bank(fit(["sokoban.yaml", "method/sibling.yaml"]))
    (skill,) = callback.summariser.summarise([solved])
    assert callback._text(solved) == callback._text(skill) == "solved none : up left up\n"


def test_the_nano_agent_s_two_panels_are_the_same_levels():
    kwargs = [read(name)["data"]["env_kwargs"] for name in PAIRS[0]]
    envs: list[Any] = [gymnasium.make("skillsd_sokoban:skillsd/Sokoban-v0", disable_env_checker=True, **k) for k in kwargs]
    tasks = [e.unwrapped.tasks("test") for e in envs]
    assert tasks[0] == tasks[1] and len(tasks[0]) >= 256
    for t in tasks[0][::8]:
        first, second = (e.reset(options={"task_id": t["task_id"]})[0] for e in envs)
        assert first == second


@pytest.mark.parametrize("name", GENERIC)
def test_a_model_overlay_keeps_the_experiment_s_tasks(name):
    """It goes through env_overrides, which leave what makes the levels alone, and says nothing of the size of an iteration."""
    given = read(name)["data"]
    assert set(given) == {"env_overrides", "rollout"} and set(given["env_overrides"]) == {SOKOBAN}
    assert set(given["env_overrides"][SOKOBAN]) == {"max_turns", "action_format", "separator", "prompts"}


@pytest.mark.parametrize("name", GENERIC)
def test_a_model_overlay_s_entry_is_for_its_environment_alone(fit, name):
    """After another experiment the Sokoban entry is ignored: an unknown keyword would end the run."""
    base, here = fit(["sokoban.yaml"]).datamodule, fit(["sokoban.yaml", name]).datamodule
    elsewhere = fit(["sokoban.yaml", name], f"--data.env={APPWORLD}").datamodule
    assert here.env_kwargs == {**base.env_kwargs, "max_turns": 14, "action_format": "fenced", "separator": " ", "prompts": None}
    assert elsewhere.env_kwargs == base.env_kwargs and here.batch_tasks == elsewhere.batch_tasks == base.batch_tasks


@pytest.mark.parametrize(("experiment", "name"), [(e, n) for e in EXPERIMENTS for n in GENERIC])
def test_a_model_overlay_serves_every_experiment(fit, experiment, name):
    """Whatever summariser and wrapper the experiment has, the overlay's stand afterwards, and a prompt of 2,000 tokens has room."""
    base, cli = fit([experiment]), fit([experiment, name])
    assert kinds(cli) == kinds(base)
    summariser, small = bank(cli).summariser, "smollm2" in name
    assert isinstance(summariser, BaseSummariser) and bank(cli).template == SKILL_TEMPLATE
    assert bool(summariser.questions) == small and summariser.max_new_tokens == (128 if small else 512)
    assert read(name)["trainer"]["default_root_dir"] == f"runs/{Path(name).stem}"
    rollout = cli.datamodule.rollout
    limits = (rollout.max_turn_tokens, rollout.max_trajectory_tokens)
    assert limits == ((128, 4096) if small else (512, 8192))
    assert not small or 2_000 + rollout.max_trajectory_tokens + 3 * summariser.max_new_tokens < 8_192  # the context of SmolLM2
    assert cli.datamodule.train_split == base.datamodule.train_split and cli.datamodule.group_size == base.datamodule.group_size
