"""The record of an iteration's numbers: its rules, then its counts and times."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
from tests.method.groups import make_groups, with_own_prompts

from skillsd.metrics import METRICS, Metrics
from skillsd.objective import Objective
from skillsd.policy import Policy, Scores


def test_parts_add_up_to_a_sealed_record():
    record = Metrics({"loss/total": 1}, {"reward/mean": 0.5})
    record.add({"skills/bank": 3})
    assert list(record) == list(METRICS) and math.isnan(record["teacher/k3"])
    assert record.measured == {"loss/total": 1.0, "reward/mean": 0.5, "skills/bank": 3.0}
    assert record.seal() is record and record.seal()["skills/bank"] == 3.0


def test_a_number_has_one_owner_and_one_moment():
    record = Metrics({"loss/total": 1.0})
    with pytest.raises(ValueError, match="loss/total was added before"):
        record.add({"loss/total": 1.0})
    with pytest.raises(KeyError, match="loss/sum"):
        record.add({"loss/sum": 1.0})
    record.seal()
    with pytest.raises(ValueError, match="time/summary_s comes too late"):
        record.add({"time/summary_s": 1.0})
    assert record.measured == {"loss/total": 1.0}


def test_steps_and_tokens_are_counted(make_policy, step):
    """Turns that were played, tokens of all episodes with their prompts, and tokens that went through a forward of the learner."""
    policy = make_policy()
    first, second = with_own_prompts(make_groups(policy))
    turn = first.trajectories[0].turns[0]
    first = replace(first, trajectories=tuple(replace(t, turns=(turn,) * n) for t, n in zip(first.trajectories, (4, 1, 2), strict=True)))
    lost = replace(second.trajectories[0], token_ids=(), action_mask=(), logprobs=(), turns=(), finish_reason="length")
    second = replace(second, trajectories=(lost, *second.trajectories[1:]))
    second = replace(second, teacher_prompts=(*second.teacher_prompts[:2], (7,) * 400))
    policy.context_length = 300
    m = step(policy, [first, second]).metrics[0]
    rows = [t for g in (first, second) for t in g.trajectories]
    assert m["rollout/env_steps"] == 4 + 1 + 2 + 0 + 1 + 1 and m["rollout/turns"] == pytest.approx(9 / 6)
    assert m["rollout/tokens"] == sum(len(t.prompt_ids) + len(t.token_ids) for t in rows)
    assert m["rollout/action_tokens"] == sum(t.n_actions for t in rows)
    pairs = [(p, t) for g in (first, second) for p, t in zip(g.student_prompts, g.trajectories, strict=True)]
    student = sum(len(p) + len(t.token_ids) for p, t in pairs if t.n_actions)
    pairs = [(p, t) for g in (first, second) for p, t in zip(g.teacher_prompts, g.trajectories, strict=True)]
    teacher = sum(len(p) + len(t.token_ids) for p, t in pairs if t.n_actions and len(p) < 300)
    assert m["learner/tokens"] == student + teacher and m["teacher/dropped_rows"] == 1
    alone = step(policy, [first, second], objective=Objective(distillation_weight=0.0)).metrics[0]
    assert alone["learner/tokens"] == student and alone["rollout/tokens"] == m["rollout/tokens"]


def test_the_teacher_s_seconds_are_counted_by_themselves(make_policy, step, monkeypatch):
    policy, score = make_policy(), Policy.score
    groups, slow = make_groups(policy), {"teacher": 0.05, "student": 0.02}

    def slowly(self: Policy, adapter: str, *args: Any) -> Scores:
        time.sleep(slow[adapter])
        return score(self, adapter, *args)

    monkeypatch.setattr(Policy, "score", slowly)
    started = time.perf_counter()
    each = step(policy, groups, groups, groups, micro_batch_tokens=1).metrics  # a forward a row
    seconds = time.perf_counter() - started
    assert sum(m["time/teacher_s"] + m["time/update_s"] for m in each) < seconds  # of one iteration each, not of all so far
    for m in each:
        assert m["time/teacher_s"] >= 6 * 0.05 and m["time/update_s"] >= 6 * 0.02
        assert m["time/learner_tokens_per_s"] == pytest.approx(m["learner/tokens"] / (m["time/teacher_s"] + m["time/update_s"]), rel=1e-3)
        assert all(math.isnan(m[k]) for k in ("time/rollout_s", "time/summary_s"))  # others' business
    alone = step(policy, groups, groups, objective=Objective(distillation_weight=0.0)).metrics
    assert all(m["time/teacher_s"] < 0.05 < 100 * m["time/update_s"] for m in alone)
