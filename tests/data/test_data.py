"""The data module's settings, and the environments that it opens and closes."""

from __future__ import annotations

import threading
from typing import Any

import lightning as L
import pytest
from tests.sokoban import BOARD, ENV, KWARGS, TWO_TASKS, make_data, rules, write_jsonl
from tests.training import quiet_trainer

from skillsd.environment import TextEnv
from skillsd.errors import ConfigError
from skillsd.module import SkillSD
from skillsd.objective import Objective
from skillsd.rollout import RolloutSettings
from skillsd.skills import BankContext, GroundTruthContext, HindsightContext, NoContext, ShuffledContext, SiblingContext
from skillsd.skills.callback import SkillBankCallback


@pytest.mark.parametrize("actor", ["student_with_skill", "half_with_skill", "teacher"])
def test_an_actor_with_a_skill_needs_one_before_the_rollout(set_up_data, actor):
    message = rf"data\.actor is {actor}, which needs a skill before the rollout: .*BankContext"
    with pytest.raises(ConfigError, match=message):
        set_up_data(actor=actor).train_dataloader()
    for context in (NoContext(), HindsightContext(), SiblingContext(), GroundTruthContext()):
        with pytest.raises(ConfigError, match=message):
            set_up_data(SkillBankCallback(rules(), context), actor=actor)
        assert set_up_data(SkillBankCallback(rules(), context)).train_tasks
        assert set_up_data(SkillBankCallback(rules(), context), actor=actor, stage="validate").panel_tasks  # nobody acts with a skill there
    for context in (BankContext(), ShuffledContext()):
        assert set_up_data(SkillBankCallback(rules(), context), actor=actor).train_tasks


class NoTasks:
    """An environment whose splits are empty."""

    unwrapped = property(lambda self: self)

    def close(self) -> None:
        pass

    def tasks(self, split: str) -> list[dict[str, str]]:
        return []


def test_splits_are_checked(set_up_data, monkeypatch):
    with pytest.raises(ConfigError, match=r"data\.train_split: .*nosuch"):
        set_up_data(train_split="nosuch")
    with pytest.raises(ConfigError, match=r"data\.panel_split: .*nosuch"):
        set_up_data(panel_split="nosuch")
    with pytest.raises(ConfigError, match="train_split and panel_split share 5 tasks"):
        set_up_data(panel_split="train")
    with pytest.raises(ConfigError, match="nosuch"):
        set_up_data(env_kwargs={"nosuch": 1})
    monkeypatch.setattr("skillsd.data.make_env", lambda *_: TextEnv(NoTasks()))
    with pytest.raises(ConfigError, match=r"data\.panel_split: the split test has no tasks"):
        set_up_data()


def test_overrides_are_by_environment(set_up_data):
    assert set_up_data(env_overrides={ENV: {"max_turns": 7}}).env_kwargs == KWARGS | {"max_turns": 7}
    others = {"another:x/Y-v0": {"nosuch": 1}, "skillsd_sokoban:skillsd/Sokoban-v1": {"max_turns": 9}}
    assert set_up_data(env_overrides=others).env_kwargs == make_data(env_overrides=others | {ENV: {}}).env_kwargs == KWARGS
    with pytest.raises(ConfigError, match=rf"data\.env_overrides\.max_turns: .* {{{ENV}: {{max_turns: \.\.\.}}}}"):
        make_data(env_overrides={ENV: {"boxes": 2}, "max_turns": 14})  # as it was written before
    with pytest.raises(ConfigError, match=r"data\.env_overrides\.skillsd_sokoban:.* is 14: give a dictionary"):
        make_data(env_overrides={ENV: 14})


def test_bad_sizes_are_refused(set_up_data):
    with pytest.raises(ConfigError, match=r"data\.group_size is 1: GRPO needs at least 2"):
        set_up_data(group_size=1)
    data = set_up_data(group_size=1, objective=Objective(policy_weight=0.0, distillation_weight=1.0))
    assert [len(g.trajectories) for g in next(iter(data.train_dataloader()))] == [1, 1]
    assert set_up_data(group_size=1, stage="validate").panel_tasks
    for key in ("group_size", "batch_tasks", "panel_attempts"):
        with pytest.raises(ConfigError, match=rf"data\.{key} is 0"):
            make_data(**{key: 0})
    with pytest.raises(ConfigError, match=r"data\.panel_temperature"):
        make_data(panel_temperature=-1.0)


def times_closed(envs: list[Any]) -> list[int]:
    return [env.unwrapped.closed for env in envs]


def test_environments_made_to_look_are_closed(set_up_data, tmp_path, opened_envs):
    """Those that list tasks and those that check boards, also where they refuse."""
    set_up_data()
    assert times_closed(opened_envs) == [1, 1, 1]  # two that list the tasks, one that is tried
    with pytest.raises(ConfigError, match="nosuch"):
        set_up_data(panel_split="nosuch")
    assert times_closed(opened_envs) == [1] * 4
    lines = [g | {"board": BOARD} for g in TWO_TASKS]
    set_up_data(tasks_file=write_jsonl(tmp_path / "a.jsonl", *lines))
    with pytest.raises(ConfigError, match="task b"):
        set_up_data(tasks_file=write_jsonl(tmp_path / "b.jsonl", lines[0], lines[1] | {"board": "#"}))
    assert times_closed(opened_envs) == [1] * 6


class StopWith(L.Callback):
    """Ends training with an error."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def on_train_batch_end(self, *_: Any) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("out of luck")])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_closes_its_environments(make_policy, tmp_path, opened_envs, error, workers):
    policy = make_policy()
    module = SkillSD(policy.settings)
    module.policy = policy
    data, others = make_data(rollout=RolloutSettings(max_turn_tokens=1, env_workers=workers)), set(threading.enumerate())

    if error is None:
        quiet_trainer(default_root_dir=tmp_path).fit(module, datamodule=data)
    else:
        with pytest.raises(RuntimeError, match="out of luck"):
            quiet_trainer(StopWith(error), default_root_dir=tmp_path).fit(module, datamodule=data)
    assert len(opened_envs) == 3 + 4 and times_closed(opened_envs) == [1] * 7  # two list the tasks, one is tried, four are played in
    assert not [t for t in set(threading.enumerate()) - others if t.name.startswith("environment")]
    val = quiet_trainer(limit_val_batches=1.0, default_root_dir=tmp_path)
    val.validate(module, datamodule=data, verbose=False)  # the collector is made anew, and closed
    assert len(opened_envs) == 7 + 2 + 3 and times_closed(opened_envs) == [1] * 12
    data.teardown("validate")  # nothing is left to do
    assert times_closed(opened_envs) == [1] * 12


def test_answers_to_whole_conversations(set_up_data):
    """What a summariser in need of a voice gets: the base's answer, by a key of its own; "" where nothing fits."""
    data = set_up_data()
    ask = [[{"role": "user", "content": "up down"}], [{"role": "user", "content": "up " * 2000}], [{"role": "user", "content": "left"}]]
    texts = data.generate(ask, 5, [("a", 0), ("b", 0), ("c", 0)])
    assert texts[1] == "" and texts[0] and texts == data.generate(ask, 5, [("a", 0), ("b", 0), ("c", 0)])
    assert data.generate(ask[:1], 5, [("a", 0)]) == texts[:1] != data.generate(ask[:1], 5, [("other", 0)])
    assert data.generate(ask[:1], 5, [("a", 0)], adapter="student") != texts[:1]
