"""Training that cannot learn is said, once and with a cure; training that can is left in peace."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from skillsd.callbacks.diagnostics import (
    FEW_ACTIONS,
    FEW_SUMMARIES,
    PATIENCE,
    Counts,
    Diagnostics,
    cannot_read,
    cannot_read_skills,
    close_rewards,
    flat_rewards,
    no_gradient,
    no_second_visit,
    no_skill_made,
    not_understood,
    unknown_token,
)
from skillsd.module import SkillSD
from skillsd.objective import Objective
from skillsd.policy import PolicySettings
from skillsd.trajectory import Task, Trajectory, TrajectoryGroup, Turn

UNK = 9


def group(*rewards: float, valid: bool | None = True, prompt: tuple[int, ...] = (1, 2, 3, 4)) -> TrajectoryGroup:
    """A member a reward, each of one turn with two sampled tokens and one that the environment said."""
    rows = tuple(
        Trajectory(
            0, "t", k, 0, "", prompt, (5, 6, 7), (True, True, False), (-1.0, -1.0, 0.0), (Turn("o", "a", r, valid),), r, r, r == 1, "done"
        )
        for k, r in enumerate(rewards)
    )
    return TrajectoryGroup(Task("t"), rows, (prompt,) * len(rows), (prompt,) * len(rows))


def metrics(flat: float = 0.0, norm: float = 1.0, weight: float = 1.0, skills: float = 0.0) -> dict[str, float]:
    return {"reward/zero_variance": flat, "grad_norm/total": norm, "teacher/weight": weight, "teacher/skill_share": skills}


def after(n: int, groups: list[TrajectoryGroup], numbers: dict[str, float], policy_weight: float = 1.0) -> Counts:
    counts = Counts(policy_weight)
    for _ in range(n):
        counts.add(groups, numbers, UNK)
    return counts


def test_rewards_that_never_differ():
    unsolved, solved = [group(0.0, 0.0)] * 2, [group(1.0, 1.0)] * 2
    assert flat_rewards(after(PATIENCE - 1, unsolved, metrics(1.0))) == ""
    assert "easier" in flat_rewards(after(PATIENCE, unsolved, metrics(1.0)))
    assert "harder" in flat_rewards(after(PATIENCE, solved, metrics(1.0)))
    assert flat_rewards(after(PATIENCE, unsolved, metrics(1.0), 0.0)) == ""  # no reward's term in the loss
    assert flat_rewards(after(PATIENCE, [group(0.0, 1.0), group(0.0, 0.0)], metrics(0.5))) == ""
    counts = after(PATIENCE - 1, unsolved, metrics(1.0))
    assert flat_rewards(counts, over=True)  # a short run says it at its end
    counts.add([group(0.0, 1.0)], metrics(0.0), UNK)
    counts.add(unsolved, metrics(1.0), UNK)
    assert counts.flat_iterations == 1 and flat_rewards(counts, over=True) == ""


def test_rewards_without_differences_are_diagnosed():
    for rewards in ((0.1 + 0.2, 0.3), (1e16, 1e16 + 2, 1e16), (1e-12, 2e-12)):
        counts = after(1, [group(*rewards), group(1.0, 0.0)], metrics())
        assert repr(max(rewards)) in close_rewards(counts) and close_rewards(replace(counts, policy_weight=0.0)) == ""
    for rewards in ((0.0, 1.0), (1e8, 1e8 + 0.1, 1e8, 1e8), (1.0,) * 4, (0.0, 1e30)):
        assert close_rewards(after(1, [group(*rewards)], metrics())) == ""


def test_a_gradient_of_zero():
    differ, flat = [group(0.0, 1.0)], [group(0.0, 0.0)]
    assert no_gradient(after(PATIENCE - 1, differ, metrics(norm=0.0))) == ""
    assert no_gradient(after(PATIENCE, differ, metrics(norm=0.0)))
    assert no_gradient(after(PATIENCE, flat, metrics(1.0, norm=0.0, skills=0.5)))
    assert no_gradient(after(PATIENCE, flat, metrics(1.0, norm=0.0))) == ""  # flat rewards and no skill yet: that is said otherwise
    assert no_gradient(after(PATIENCE, differ, metrics(norm=0.0), policy_weight=0.0)) == ""  # distillation alone, before the first skill
    assert no_gradient(after(PATIENCE, differ, metrics(norm=1e-30))) == ""
    assert no_gradient(after(2, differ, metrics(norm=0.0)), over=True)


def test_actions_that_are_never_understood():
    none, some, silent = group(0.0, 0.0, valid=False), group(0.0, 0.0), group(0.0, 0.0, valid=None)
    enough = FEW_ACTIONS // 2
    assert not_understood(after(1, [none] * (enough - 1), metrics())) == ""
    assert not_understood(after(1, [none] * enough, metrics()))
    assert not_understood(after(1, [none] * (enough - 1), metrics()), over=True)
    assert not_understood(after(9, [none] * enough + [some], metrics()), over=True) == ""
    assert not_understood(after(9, [silent] * enough, metrics()), over=True) == ""  # the environment does not say


def test_prompts_that_the_model_cannot_read():
    assert cannot_read(after(1, [group(0.0, 1.0)] * 50, metrics())) == ""
    few = [group(0.0, prompt=(UNK, 2, 3)), *[group(0.0)] * 200]
    assert cannot_read(after(1, few, metrics())) == ""
    assert "80%" in cannot_read(after(1, [group(0.0, prompt=(UNK, UNK, UNK, UNK))], metrics()))
    row = group(0.0).trajectories[0]  # what is sampled is not read, what the environment says is
    said = replace(row, token_ids=(UNK,) * 6, action_mask=(True, True, False, False, False, False), logprobs=(0.0,) * 6)
    counts = after(1, [replace(group(0.0), trajectories=(said,))], metrics())
    assert (counts.unknown_tokens, counts.prompt_tokens) == (4, 8)


def test_skills_that_the_model_cannot_read():
    """Nano knows some sixty words; the default texts of skills have others."""
    plain, shown = group(0.0, 1.0), metrics(skills=1.0)
    skill = (UNK, 2, UNK, 3, UNK)
    skilled = replace(plain, teacher_prompts=((*skill, 1, 2, 3, 4),) * 2)
    assert "60%" in cannot_read_skills(after(1, [skilled], shown)) and cannot_read(after(1, [skilled], shown)) == ""
    readable = replace(plain, teacher_prompts=((5, 6, 1, 2, 3, 4),) * 2)
    silent = [([plain], shown), ([readable], shown), ([skilled], metrics()), ([skilled], metrics(weight=0.0, skills=1.0))]
    assert all(cannot_read_skills(after(1, groups, numbers)) == "" for groups, numbers in silent)


def test_the_end_of_a_run_that_was_resumed_is_not_all_of_it():
    counts = Counts(iterations=40)
    counts.add([group(0.0, 0.0)], metrics(1.0), UNK)
    assert flat_rewards(counts, over=True) == "" != flat_rewards(after(1, [group(0.0, 0.0)], metrics(1.0)), over=True)


def test_the_unknown_token_is_one_of_its_own():
    def tokenizer(unk: int | None) -> Any:
        return SimpleNamespace(unk_token_id=unk, eos_token_id=0, bos_token_id=None, pad_token_id=1)

    assert [unknown_token(tokenizer(x), (2,)) for x in (None, 0, 1, 2, 3)] == [None, None, None, None, 3]


def test_a_summariser_that_makes_nothing():
    assert no_skill_made(Counts(failed_summaries=FEW_SUMMARIES - 1)) == "" == no_skill_made(Counts(failed_summaries=99, skills=1))
    assert "no base_url" in no_skill_made(Counts(failed_summaries=FEW_SUMMARIES, summary_error="no base_url"))


def test_a_run_in_which_no_task_is_played_twice():
    assert no_second_visit(30, 30, 0) and no_second_visit(2, 30, 0)
    assert no_second_visit(31, 30, 0) == "" == no_second_visit(30, 30, 4) == no_second_visit(float("inf"), 30, 0)


def test_each_is_said_once_a_start(caplog: pytest.LogCaptureFixture):
    """By the callback; a run that is resumed begins to look anew."""
    module = SkillSD(PolicySettings(model="nano"), Objective())
    module.policy = SimpleNamespace(
        tokenizer=SimpleNamespace(unk_token_id=UNK, eos_token_id=0, bos_token_id=0, pad_token_id=0), stop_ids=()
    )  # type: ignore[assignment]
    outputs = {"metrics": metrics(1.0)}
    trainer: Any = SimpleNamespace(callbacks=[], global_step=0)
    callback = Diagnostics()
    bad = [group(0.0, 0.0, valid=False, prompt=(UNK,) * 9)] * FEW_ACTIONS
    with caplog.at_level(logging.WARNING):
        for start in (1, 2):
            callback.on_train_start(trainer, module)
            for i in range(2 * PATIENCE):
                callback.on_train_batch_end(trainer, module, outputs, bad, i)
            callback.on_train_end(trainer, module)
            assert len(caplog.records) == 3 * start  # unknown tokens, actions, rewards
