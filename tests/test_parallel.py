"""What several ranks share out, tell each other and add up; then each context and each actor on two of them, against one."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from tests.e2e.runs import assert_equal
from tests.ranks import Ranks, bank_rows, near, torchrun
from tests.sokoban import KWARGS, TEMPLATE, make_data, rules
from tests.training import quiet_trainer

from skillsd import cli
from skillsd import parallel as r
from skillsd.callbacks import TeacherSync
from skillsd.errors import ConfigError
from skillsd.module import SkillSD
from skillsd.objective import Objective
from skillsd.optimizer import OptimizerSettings
from skillsd.policy import LoraSettings, Policy, PolicySettings
from skillsd.skills import (
    BankContext,
    BaseSummariser,
    GroundTruthContext,
    HindsightContext,
    NoContext,
    ShuffledContext,
    SiblingContext,
)
from skillsd.skills.callback import SkillBankCallback
from skillsd.strategy import check_strategy

ENV = KWARGS | {"size": 6, "boxes": 3, "splits": {"train": {"short": 3}, "test": {"short": 1}}, "max_turns": 6}
LR = 1e-7
"""So small that what rounding does to an update is not seen in the next gradient: AdamW makes a whole step of the smallest gradient."""
VARIANTS: dict[str, dict[str, Any]] = {
    "bank": {"bank": {"value_estimate": "gap", "refresh": "iteration", "capacity": 2}, "micro_batch_tokens": 64},
    "base": {"summariser": lambda: BaseSummariser(4, template="{conversation} {question}", system="", form="fields")},
    "shuffled": {"context": ShuffledContext},
    "hindsight": {"context": HindsightContext},
    "sibling": {"context": SiblingContext},
    "ground_truth": {"context": GroundTruthContext},
    "none": {"context": NoContext},
    "student_with_skill": {"actor": "student_with_skill"},
    "half_with_skill": {"actor": "half_with_skill"},
    "teacher": {"actor": "teacher"},
    "one_row": {
        "env_kwargs": ENV | {"splits": {"train": {"short": 1}, "test": {"short": 1}}}, "group_size": 1,
        "objective": Objective(distillation_weight=1.0, policy_weight=0.0),
    },
}  # fmt: skip
"""An iteration visits all 3 tasks: one rank plays two of them. The last variant leaves a rank without a task and without a row to train on,
and at first both without a gradient."""


# -- on the ranks -------------------------------------------------------------------------------------------------------------


def exchanged() -> dict[str, Any]:
    """What a rank learns from another."""
    before = (r.rank(), r.world(), r.is_rank_zero(), r.name())
    dist.init_process_group("gloo")
    me = r.rank()
    r.print_rank_zero(f"said by {me}")
    sums = [torch.tensor([1.0 + me, 2.0]), torch.full((2, 1), 10.0 * me)]
    views = [x.T if x.dim() == 2 else x for x in sums]
    r.all_reduce_sum(views)
    r.all_reduce_sum([])
    whole = torch.tensor([2**62 + me])
    r.all_reduce_sum([whole])
    value = {"rank": me}
    found = r.gather(value)
    return {
        "before": before, "after": (me, r.world(), r.is_rank_zero(), r.name()), "share": list(r.share(5)),
        "theirs": list(r.share(5, of=1 - me)),
        "balanced": r.balanced([1, 5, 2, 2]), "sums": sums, "whole": whole, "gathered": found, "own": found[me] is value,
        "ragged": r.gather("x" * (1 + 1000 * me)), "broadcast": r.broadcast(("from", me)), "again": r.gather(None),
        "most": r.all_reduce_max(3 - me),
    }  # fmt: skip


def lost(what: str) -> str:
    """What rank 0 says when rank 1 has ended."""
    dist.init_process_group("gloo")
    r.gather(None)
    if not r.is_rank_zero():
        os._exit(7)
    try:
        r.all_reduce_sum([torch.zeros(3)]) if what == "all_reduce_sum" else getattr(r, what)(0)
    except r.PeerLost as e:
        return str(e)
    return "nobody was missed"


class Watch(L.Callback):
    """What an iteration leaves."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        timeless = {k: v for k, v in outputs["metrics"].items() if not k.startswith(("time/", "memory/"))}
        played = [(t.task_id, t.member, t.token_ids, t.skill_id, g.teacher_prompts[i]) for g in batch for i, t in enumerate(g.trajectories)]
        grads = [p.grad.flatten() for p in module.policy.student_parameters() if p.grad is not None]
        self.seen.append({
            "metrics": timeless, "played": played, "group_gap": outputs["group_gap"], "grad": torch.cat(grads) if grads else None,
            "adapters": {k: v.clone() for k, v in module.policy.adapter_state().items()},
        })  # fmt: skip


def trained(folder: str) -> dict[str, list[dict[str, Any]]]:
    """Two epochs of every variant: of each iteration what it leaves, and on rank 0 the bank."""
    found: dict[str, Any] = {}
    world = int(os.environ.get("WORLD_SIZE", 1))
    policy = Policy(PolicySettings(model="nano", lora=LoraSettings(init="nano-recover")), "cpu")
    start = {k: v.clone() for k, v in policy.adapter_state().items()}
    for name, variant in VARIANTS.items():
        settings = {"env_kwargs": ENV, "batch_tasks": 3, "group_size": 3} | variant
        bank = SkillBankCallback(
            settings.pop("summariser", rules)(), settings.pop("context", BankContext)(), template=TEMPLATE, **settings.pop("bank", {})
        )
        module = SkillSD(
            policy.settings, settings.pop("objective", Objective(distillation_weight=0.5)), OptimizerSettings(lr=LR),
            grad_norm_every=1, micro_batch_tokens=settings.pop("micro_batch_tokens", 4096),
        )  # fmt: skip
        policy.load_adapter_state(start)
        module.policy, policy.teacher_is_student, watch = policy, True, Watch()
        trainer = quiet_trainer(
            TeacherSync(), bank, watch, devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=2,
            default_root_dir=f"{folder}/{name}",
        )  # fmt: skip
        trainer.fit(module, datamodule=make_data(**settings))
        found[name] = watch.seen
        if r.is_rank_zero():
            found[f"{name} bank"] = bank_rows(Path(folder) / name)
    return found


# -- what is asserted ---------------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 100), world=st.integers(1, 9))
def test_shares_are_a_partition(n, world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r, "world", lambda: world)
        shares = [list(r.share(n, of=i)) for i in range(world)]
        assert [*chain(*shares)] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        patch.setattr(r, "rank", lambda: world - 1)
        assert list(r.share(n)) == shares[-1]


@given(costs=st.lists(st.integers(0, 1000), max_size=40), world=st.integers(1, 9))
def test_balanced_is_a_partition_of_about_equal_sums(costs, world):
    parts = []
    for i in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(r, "world", lambda: world)
            patch.setattr(r, "rank", lambda i=i: i)
            parts.append(r.balanced(costs))
    assert sorted(chain(*parts)) == list(range(len(costs))) and all(p == sorted(p) for p in parts)
    sums = [sum(costs[i] for i in p) for p in parts]
    assert max(sums) - min(sums) <= max(costs, default=0)


@pytest.mark.parametrize(
    "environment, number",
    [({}, 0), ({"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "1"}, 3), ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, 2),
     ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, 1), ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, 1), ({"GROUP_RANK": "1"}, 1),
     ({"RANK": "", "LOCAL_RANK": "x"}, 0), ({"RANK": "3"}, 0), ({"SLURM_PROCID": "2"}, 0),
     ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_JOB_NAME": "interactive"}, 0)],
)  # fmt: skip
def test_rank_before_they_have_met(monkeypatch, environment, number):
    only(monkeypatch, environment)
    assert (r.rank(), r.is_rank_zero(), r.world()) == (number, number == 0, 1)


def only(monkeypatch, environment):
    """What launchers set: this and nothing else."""
    for name in (*r._NUMBERS, *r._SIZES, "TORCHELASTIC_RUN_ID", "MASTER_PORT", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(r, "_single", False)


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "1", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}, {"SLURM_PROCID": "1"}, {"SLURM_NTASKS": "4"}, {"NODE_RANK": "x"},
     {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0"}],
)  # fmt: skip
def test_what_a_launcher_has_left_is_said_and_ignored_by_a_run_on_one_device(monkeypatch, capsys, environment):
    only(monkeypatch, environment)
    r.settle(False)
    said = capsys.readouterr().err
    assert all(name in said for name in environment if name not in ("SLURM_NODEID",)) and said.count("\n") == 1
    assert not environment.keys() & os.environ.keys() and r.is_rank_zero()
    r.settle(False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "environment, number",
    [({}, 0), ({"RANK": "1", "SLURM_PROCID": "1", "WORLD_SIZE": "2"}, 0), ({"MASTER_PORT": "1", "LOCAL_RANK": "1", "NODE_RANK": "0"}, 1),
     ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1),
     ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}, 1)],
)  # fmt: skip
def test_launchers_are_believed_where_several_are_asked_for(monkeypatch, environment, number):
    only(monkeypatch, environment)
    r.settle(True)
    assert r.rank() == number


@pytest.mark.parametrize(
    "several, environment, name",
    [(True, {"LOCAL_RANK": "1"}, "LOCAL_RANK"), (True, {"LOCAL_RANK": "x"}, "LOCAL_RANK"), (True, {"NODE_RANK": "1"}, "NODE_RANK"),
     (True, {"SLURM_NTASKS": "4"}, "SLURM_PROCID"), (False, {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, "trainer.devices"),
     (True, {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}, "SLURM_NTASKS_PER_NODE")],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_by_name(monkeypatch, several, environment, name):
    only(monkeypatch, environment)
    with pytest.raises(ConfigError, match=f"^{name} "):
        r.settle(several)


def test_a_run_on_one_device_is_nobody_s_second_rank(monkeypatch):
    """`srun -n 8` may start eight runs of one rank, each with a number."""
    monkeypatch.setattr(r, "_single", False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert list(r.share(2)) == [0, 1] == r.balanced([5.0, 1.0]) and not r.is_rank_zero()
    check_strategy(SingleDeviceStrategy())
    assert r.is_rank_zero() and r.rank() == 0
    check_strategy(DDPStrategy())
    assert not r.is_rank_zero()


def test_one_rank_exchanges_with_itself():
    alone, x = object(), torch.ones(2)
    assert r.gather(alone) == [alone] and r.broadcast(alone) is alone and r.all_reduce_max(4) == 4
    r.all_reduce_sum([x])
    assert x.tolist() == [1.0, 1.0] and list(r.share(3)) == [0, 1, 2] == r.balanced([1, 1, 1])


def test_two_ranks_share_gather_and_add_up(ranks: Ranks):
    both = ranks.run("tests.test_parallel:exchanged", environments=torchrun())
    assert [x["before"] for x in both] == [(0, 1, True, ""), (1, 1, False, "rank 1: ")]
    assert [x["after"] for x in both] == [(0, 2, True, ""), (1, 2, False, "rank 1: ")]
    assert [x["share"] for x in both] == [[0, 1], [2, 3, 4]] == [x["theirs"] for x in reversed(both)]
    assert [x["balanced"] for x in both] == [[1], [0, 2, 3]]
    assert [log.splitlines() for log in ranks.logs] == [["said by 0"], []]
    for x in both:
        near(x["sums"], [torch.tensor([3.0, 4.0]), torch.full((2, 1), 10.0)], 0.0)
        assert x["whole"].tolist() == [2**63 + 1 - 2**64]
        assert x["gathered"] == [{"rank": 0}, {"rank": 1}] and x["own"] and x["again"] == [None, None]
        assert list(map(len, x["ragged"])) == [1, 1001] and x["broadcast"] == ("from", 0) and x["most"] == 3


@pytest.mark.parametrize("what", ["all_reduce_sum", "gather", "broadcast", "all_reduce_max"])
def test_a_rank_that_has_ended_is_reported(ranks: Ranks, what):
    said, _ = ranks.run("tests.test_parallel:lost", what, environments=torchrun(), codes=(0, 7))
    assert said.startswith("another rank has ended") and "--ckpt_path last" in said


@pytest.mark.parametrize(
    "strategy, said",
    [(DDPStrategy(start_method="fork"), "DDPStrategy with start_method fork"), (FSDPStrategy(), "FSDPStrategy"),
     (ModelParallelStrategy(), "ModelParallelStrategy")],
)  # fmt: skip
def test_strategies_that_split_weights_or_copy_the_process_are_refused(strategy, said):
    """Before the model is loaded."""
    module = SkillSD(PolicySettings(model="nowhere"))
    module._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=f"^trainer.strategy is {said}: set it to ddp"):
        module.configure_model()


@pytest.mark.parametrize("strategy", [DDPStrategy(), SingleDeviceStrategy()])
def test_strategies_that_are_taken(strategy):
    check_strategy(strategy)


def test_a_strategy_that_copies_the_process_is_refused_before_it_does(tmp_path, capsys):
    flags = ["--trainer.strategy=ddp_spawn", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    assert cli.main(["fit", "-c", "sokoban", f"--trainer.default_root_dir={tmp_path}/run", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: trainer.strategy is DDPStrategy with start_method spawn") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def both(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`trained` on one rank and on two."""
    one, two = (str(tmp_path_factory.mktemp(x)) for x in ("one", "two"))
    return ranks.run("tests.test_parallel:trained", one)[0], ranks.run("tests.test_parallel:trained", two, environments=torchrun())


@pytest.mark.parametrize("name", VARIANTS)
def test_each_context_and_actor_trains_the_same_on_two_ranks(both, name):
    one, two = both
    for x in two:
        near(x[name], one[name])  # what is played together differs, so does rounding
    near(two[0][f"{name} bank"], one[f"{name} bank"])
    assert_equal([x["adapters"] for x in two[1][name]], [x["adapters"] for x in two[0][name]])
    assert any(x["grad"] is not None and x["grad"].any() for x in one[name])
    assert one[f"{name} bank"]["skills"] or name == "none"
    if name == "one_row":
        assert [x["grad"] is None for x in one[name]] == [True, False]
