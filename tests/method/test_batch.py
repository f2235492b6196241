"""Which rows of an iteration count: groups without a signal, trajectories without tokens, failed episodes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from tests.method.by_hand import gradient, paper_losses
from tests.method.groups import make_groups, with_failed, without_members
from tests.tolerance import ROUNDING, close
from tests.training import flat, same_gradient

from skillsd.batch import return_gap
from skillsd.metrics import METRICS
from skillsd.objective import Objective
from skillsd.optimizer import OptimizerSettings
from skillsd.trajectory import Trajectory


def test_groups_of_equal_rewards_have_no_policy_gradient(make_policy, step):
    policy = make_policy()
    groups = make_groups(policy, rewards=((0.1, 0.1, 0.1), (1.0, 1.0, 1.0)), skills=(None, None))
    grpo = step(policy, groups, objective=Objective(distillation_weight=0.0))
    assert flat(grpo.grads[0]).eq(0).all() and grpo.metrics[0]["reward/zero_variance"] == 1.0
    distilled = step(policy, groups)
    assert distilled.metrics[0]["grad_norm/policy"] < ROUNDING < distilled.metrics[0]["grad_norm/distillation"]
    mixed = step(policy, [groups[0], make_groups(policy)[1]])
    assert mixed.metrics[0]["reward/zero_variance"] == 0.5


@pytest.mark.parametrize("policy_weight", [1.0, 0.0])
def test_filtered_groups_are_in_no_loss_and_no_count(make_policy, step, policy_weight):
    """Their rows are in no loss, not in N, and no forward is made for them; the rewards that are logged are everybody's."""
    policy = make_policy()
    groups = make_groups(policy, ((0.1, 0.1, 0.1), (1.0, 0.0, 0.5), (1.0, 1.0, 1.0)), (3, 8, None))
    weights: dict[str, Any] = {"policy_weight": policy_weight, "distillation_weight": 0.5}
    alone = step(policy, [groups[1]], objective=Objective(**weights))
    every = step(policy, groups, objective=Objective(**weights))
    for tokens in (1, 60, 4096):
        kept = step(policy, groups, objective=Objective(**weights, group_filter="zero_variance"), micro_batch_tokens=tokens)
        same_gradient(kept.grads[0], alone.grads[0])
        assert {s.token_ids for s in (*kept.teacher_inputs[0], *kept.student_inputs[0])} == {t.token_ids for t in groups[1].trajectories}
        assert kept.group_gaps[0][[0, 2]].eq(0).all()
        close(kept.group_gaps[0][1], alone.group_gaps[0][0])
        m, a, e = kept.metrics[0], alone.metrics[0], every.metrics[0]
        for key in METRICS:
            if math.isnan(a[key]) or key.startswith(("time/", "memory/")):
                continue
            overall = key.startswith(("reward/", "rollout/")) or key == "teacher/skill_share"
            close(m[key], e[key] if overall else a[key], where=key)
    assert (flat(every.grads[0]) - flat(alone.grads[0])).norm() > 1e-3

    before = [p.clone() for p in policy.student_parameters()]
    filtered = Objective(**weights, group_filter="zero_variance")
    none = step(policy, groups[::2], objective=filtered, optimizer=OptimizerSettings(lr=1.0))
    assert (
        flat(policy.student_parameters()).equal(flat(before))
        and none.teacher_inputs == none.student_inputs == [[]]
        and none.group_gaps[0].eq(0).all()
    )
    assert none.metrics[0]["loss/total"] == none.metrics[0]["learner/tokens"] == 0 < none.metrics[0]["rollout/action_tokens"]


def test_trajectories_without_tokens_count_in_the_baseline_only(make_policy, step):
    """A prompt that did not fit leaves an episode without a turn: it counts in the baseline, not in N."""
    policy = make_policy()
    first, second = make_groups(policy)

    def empty(t: Trajectory) -> Trajectory:
        return replace(t, token_ids=(), action_mask=(), logprobs=(), turns=(), finish_reason="length")

    some = replace(first, trajectories=(first.trajectories[0], *map(empty, first.trajectories[1:])))
    grpo, sdl = paper_losses(policy, [some, second])
    want = gradient(policy, grpo + 0.5 * sdl)
    mixed = step(policy, [some, second], micro_batch_tokens=1)
    same_gradient(mixed.grads[0], want)
    assert mixed.metrics[0]["rollout/finish_length"] == pytest.approx(2 / 6)

    lost = replace(second.trajectories[1], finish_reason="failed", failure="killed")
    one = step(policy, [some, replace(second, trajectories=(second.trajectories[0], lost, second.trajectories[2]))])
    assert one.metrics[0]["rollout/failed"] == pytest.approx(1 / 6) and mixed.metrics[0]["rollout/failed"] == 0

    before = [p.clone() for p in policy.student_parameters()]
    none = [replace(g, trajectories=tuple(map(empty, g.trajectories))) for g in (first, second)]
    nothing = step(policy, none, optimizer=OptimizerSettings(lr=1.0))
    assert flat(policy.student_parameters()).equal(flat(before)) and nothing.group_gaps[0].eq(0).all()
    m = nothing.metrics[0]
    assert m["loss/total"] == m["grad_norm/total"] == m["grad_norm/policy"] == m["rollout/action_tokens"] == 0
    assert set(m) == set(METRICS) and not any(math.isinf(v) for v in m.values())


def test_failed_episodes_are_in_no_statistic(make_policy, step):
    """The update and what is logged are those of a batch without them; of a group with one left the advantage is 0."""
    policy = make_policy()
    first, second = make_groups(policy, ((1.0, 0.0, 0.5, 0.25), (0.0, 1.0, 1.0)))
    lost = step(policy, [with_failed(first, 0, 3), second], micro_batch_tokens=60)
    clean = step(policy, [without_members(first, 0, 3), second])
    same_gradient(lost.grads[0], clean.grads[0])
    close(lost.group_gaps[0], clean.group_gaps[0])
    assert {s.token_ids for s in (*lost.teacher_inputs[0], *lost.student_inputs[0])}.isdisjoint(
        first.trajectories[k].token_ids for k in (0, 3)
    )
    m, want = lost.metrics[0], clean.metrics[0]
    for key in METRICS:
        if not math.isnan(want[key]) and not key.startswith(("time/", "memory/", "rollout/")):
            close(m[key], want[key], where=key)
    assert m["rollout/failed"] == pytest.approx(2 / 7) and m["rollout/failed_raised"] == 2 and m["rollout/failed_hung"] == 0
    assert m["rollout/env_steps"] == 7  # they were played

    grpo = Objective(distillation_weight=0.0)
    single = step(policy, [with_failed(first, 0, 1, 3)], objective=grpo)
    assert flat(single.grads[0]).eq(0).all() and single.metrics[0]["reward/mean"] == 0.5

    before = [p.clone() for p in policy.student_parameters()]
    none = step(
        policy,
        [with_failed(first, 0, 1, 2, 3), with_failed(second, 0, 1, 2, kind="hung")],
        optimizer=OptimizerSettings(lr=1.0, weight_decay=0.5),
    )
    assert flat(policy.student_parameters()).equal(flat(before)) and none.teacher_inputs == none.student_inputs == [[]]
    assert none.metrics[0]["rollout/failed"] == 1 and none.metrics[0]["rollout/failed_hung"] == 3


def test_returns_are_compared_without_failed_episodes(make_policy):
    """UCOB's gap between the two views."""
    policy = make_policy()
    (g,) = make_groups(policy, ((1.0, 0.0, 0.5, 0.25),), (3,))
    acted = [g.student_prompts[0]] * 2 + [g.teacher_prompts[0]] * 2
    g = replace(g, trajectories=tuple(replace(t, prompt_ids=p) for t, p in zip(g.trajectories, acted, strict=True)))
    assert return_gap(g, 0) == pytest.approx(0.375 - 0.5)
    assert return_gap(with_failed(g, 1, 2), 0) == pytest.approx(0.25 - 1.0)
    assert math.isnan(return_gap(with_failed(g, 2, 3), 0))


def test_a_group_of_one_is_refused_where_rewards_are_compared(make_policy, step):
    """Without a policy loss there is nothing to compare with; with it the error names the key."""
    policy = make_policy()
    groups = make_groups(policy, rewards=((1.0,), (0.0,)))
    alone = step(policy, groups, objective=Objective(policy_weight=0.0, distillation_weight=0.5))
    assert alone.metrics[0]["grad_norm/distillation"] > 0 and alone.metrics[0]["teacher/health"] == 0
    with pytest.raises(ValueError, match="group_size"):
        step(policy, groups)
