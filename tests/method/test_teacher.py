"""When the teacher is asked, for which rows, and what its gap says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.method.by_hand import gradient, paper_losses
from tests.method.groups import make_groups, scored
from tests.tolerance import ROUNDING, close
from tests.training import same_gradient

from skillsd.callbacks import TeacherSync
from skillsd.objective import Objective
from skillsd.optimizer import OptimizerSettings


def test_an_empty_skill_with_equal_weights_asks_no_teacher(make_policy, step):
    policy = make_policy()
    policy.sync()
    groups = make_groups(policy, skills=(None, 8))
    equal = step(policy, groups, same=True)
    assert [s.prompt_ids for s in equal.teacher_inputs[0]] == [*groups[1].teacher_prompts]
    assert equal.group_gaps[0][0] == 0 != equal.group_gaps[0][1]

    plain = make_groups(policy, skills=(None, None))
    none = step(policy, plain, same=True)
    assert none.teacher_inputs == [[]] and none.group_gaps[0].eq(0).all()
    assert none.metrics[0]["loss/distillation"] == none.metrics[0]["teacher/gap_mean"] == none.metrics[0]["grad_norm/distillation"] == 0
    # Scoring it all the same gives the same: the forward that is skipped is one that says nothing.
    scored = step(policy, plain, same=False)
    assert len(scored.teacher_inputs[0]) == 6 and scored.group_gaps[0].abs().max() < ROUNDING
    same_gradient(scored.grads[0], none.grads[0])

    unweighted = step(policy, groups, objective=Objective(distillation_weight=0.0))
    assert unweighted.teacher_inputs == [[]] and math.isnan(unweighted.metrics[0]["grad_norm/distillation"])


def test_members_without_teacher_context_ask_no_teacher(make_policy, step):
    """Within a group: who sees what the student sees needs none."""
    policy = make_policy()
    policy.sync()
    first, second = make_groups(policy)
    some = replace(first, teacher_prompts=(first.teacher_prompts[0], *first.student_prompts[1:]))
    assert [some.has_teacher_context(k) for k in range(3)] == [True, False, False]
    grpo, sdl = paper_losses(policy, [some, second])
    want = gradient(policy, grpo + 0.5 * sdl)
    steps = step(policy, [some, second], same=True)
    same_gradient(steps.grads[0], want)
    with_context = [first.trajectories[0], *second.trajectories]
    assert sorted(s.token_ids for s in steps.teacher_inputs[0]) == sorted(t.token_ids for t in with_context)
    m = steps.metrics[0]
    assert m["teacher/skill_share"] == pytest.approx(4 / 6)
    gaps = torch.cat([(scored(policy, "teacher", g.teacher_prompts[t.member], t) - scored(policy, "student", t.prompt_ids, t))
                      for g in (some, second) for t in g.trajectories if t in with_context])  # fmt: skip
    close(m["teacher/gap_mean"], float(gaps.sum()) / sum(t.n_actions for t in with_context))  # over those alone


@pytest.mark.parametrize(
    ("sync", "asked"),
    [
        (TeacherSync(), [0, 0, 0, 0]),
        (TeacherSync(every=2), [0, 6, 0, 6]),
        (TeacherSync("ema", rate=0.5), [0, 6, 6, 6]),
        (TeacherSync("ema", rate=1.0), [0, 0, 0, 0]),
        (TeacherSync("frozen"), [0, 6, 6, 6]),
    ],
    ids=["every", "k=2", "ema", "ema of rate 1", "frozen"],
)
def test_a_teacher_that_lags_is_asked_without_a_skill(make_policy, step, sync, asked):
    policy = make_policy()
    policy.sync()
    batches = [make_groups(policy, skills=(None, None), seed=i) for i in range(4)]
    steps = step(policy, *batches, same=True, callbacks=[sync], optimizer=OptimizerSettings(lr=1e-2))
    assert [len(x) for x in steps.teacher_inputs] == asked
    assert [bool(m["teacher/k3"] > 0) for m in steps.metrics] == [n > 0 for n in asked]


def test_a_teacher_prompt_too_long_is_dropped_whole(make_policy, step):
    policy = make_policy()
    groups = make_groups(policy)
    fits = [len(p) + len(t.token_ids) for g in groups for p, t in zip(g.teacher_prompts, g.trajectories, strict=True)]
    plain = max(len(t.prompt_ids) + len(t.token_ids) for g in groups for t in g.trajectories)
    policy.context_length = limit = sorted(fits)[3]
    assert plain <= limit < max(fits)  # the student's rows all fit
    steps = step(policy, groups, micro_batch_tokens=1)
    assert steps.metrics[0]["teacher/dropped_rows"] == sum(n > limit for n in fits) > 0
    assert len(steps.teacher_inputs[0]) == sum(n <= limit for n in fits)
    prompts = {p for g in groups for p in g.teacher_prompts}
    assert all(s.prompt_ids in prompts and len(s) <= limit for s in steps.teacher_inputs[0])

    policy.context_length = plain  # none fits: only GRPO is left
    alone = step(policy, groups)
    assert alone.metrics[0]["teacher/dropped_rows"] == sum(n > plain for n in fits)
    policy.context_length = 1
    none = step(policy, groups)
    assert none.teacher_inputs == [[]] and none.metrics[0]["teacher/dropped_rows"] == 6 and none.group_gaps[0].eq(0).all()
    same_gradient(none.grads[0], step(policy, groups, objective=Objective(distillation_weight=0.0)).grads[0])


def test_the_gap_of_a_group_is_aligned_with_its_outcome(make_policy, step):
    """What a use is worth to the bank: sum of A_i * (log tea - log stu) over the group's action tokens."""
    policy = make_policy()
    groups = make_groups(policy)
    steps, want = step(policy, groups), []
    for g in groups:
        rewards, total = torch.tensor([t.reward for t in g.trajectories]), 0.0
        for k, (t, a) in enumerate(zip(g.trajectories, ((rewards - rewards.mean()) / rewards.std()).tolist(), strict=True)):
            teacher, student = scored(policy, "teacher", g.teacher_prompts[k], t), scored(policy, "student", g.student_prompts[k], t)
            total += a * float((teacher - student).sum())
        want.append(total)
    close(steps.group_gaps[0].tolist(), want, times=4)
    n = sum(t.n_actions for g in groups for t in g.trajectories)
    close(steps.metrics[0]["teacher/health"], sum(want) / n)


def test_the_weight_moves_over_iterations(make_policy, step):
    """By the optimizer's steps; at weight 0 no teacher is asked."""
    policy = make_policy()
    batch = make_groups(policy)
    steps = step(policy, *[batch] * 5, objective=Objective(distillation_weight=0.6, weight_steps=3, weight_end=0.0))
    assert [m["teacher/weight"] for m in steps.metrics] == pytest.approx([0.6, 0.4, 0.2, 0.0, 0.0])
    assert [len(x) for x in steps.teacher_inputs] == [6, 6, 6, 0, 0]
    first = steps.metrics[0]["loss/distillation"]
    assert [m["loss/distillation"] / first for m in steps.metrics] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0], rel=1e-5)
    constant = step(policy, batch, batch, objective=Objective(distillation_weight=0.6))
    assert [m["teacher/weight"] for m in constant.metrics] == [0.6, 0.6]
    rising = step(policy, batch, batch, batch, objective=Objective(distillation_weight=0.0, weight_steps=2, weight_end=0.4))
    assert [m["teacher/weight"] for m in rising.metrics] == pytest.approx([0.0, 0.2, 0.4])
    assert [len(x) for x in rising.teacher_inputs] == [0, 6, 6]
