"""The training stream: its order, its batches, its position and its failed episodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from skillsd.errors import ConfigError
from skillsd.rollout import Episode
from skillsd.trajectory import Trajectory


def test_an_epoch_is_a_permutation(set_up_data):
    data = set_up_data()
    stream = data.train_dataloader()
    names = [t.task_id for t in data.train_tasks]
    assert names == [f"train-{i:04d}" for i in range(5)]
    orders = [tuple(t.task_id for t in stream.order(epoch)) for epoch in range(6)]
    assert all(sorted(o) == names for o in orders) and len(set(orders)) > 4
    data.seed = 1
    assert tuple(t.task_id for t in stream.order(0)) != orders[0]
    # Golden: another order is another run. It hangs on no generator and no version.
    assert [o[0][-1] + o[1][-1] + o[2][-1] + o[3][-1] + o[4][-1] for o in orders[:3]] == FIRST_ORDERS


FIRST_ORDERS = ["14302", "14230", "40312"]


def test_the_last_partial_batch_is_kept(set_up_data):
    stream = set_up_data(batch_tasks=2).train_dataloader()
    assert len(stream) == 3
    batches = list(stream)
    assert [len(b) for b in batches] == [2, 2, 1]
    assert [g.task.task_id for b in batches for g in b] == [t.task_id for t in stream.order(0)]
    for i, batch in enumerate(batches):
        for g in batch:
            assert [(t.member, t.task_id, t.iteration, t.skill_id) for t in g.trajectories] == [
                (m, g.task.task_id, i, None) for m in (0, 1)
            ]
            prompt = g.trajectories[0].prompt_ids
            assert g.teacher_prompts == g.student_prompts == (prompt, prompt) and g.trajectories[1].prompt_ids == prompt
            assert g.skill_id is None and g.temperature == 1.0 and not g.sampled_by_teacher and not g.has_teacher_context(0)
    assert stream.state_dict() == {"position": 3}
    assert [g.task.task_id for b in stream for g in b] == [t.task_id for t in stream.order(1)]


def test_a_stream_goes_on_where_it_stood(set_up_data):
    """Trajectories are a function of (seed, iteration) alone."""
    whole = [b for stream in [set_up_data().train_dataloader()] for _ in range(2) for b in stream]
    data, other = set_up_data(), set_up_data()
    other.train_dataloader()
    data.load_state_dict(other.state_dict() | {"position": 4})
    assert list(data.train_dataloader()) == whole[4:]
    assert data.state_dict()["position"] == 6
    with pytest.raises(ConfigError, match=r"data\.seed was 0 and is 1"):
        set_up_data(seed=1).load_state_dict(other.state_dict())
    with pytest.raises(ConfigError, match="ckpt_path"):
        set_up_data().load_state_dict({"position": 4})
    assert list(set_up_data(seed=1).train_dataloader()) != whole[:3]


def test_rollout_seconds_leave_out_what_is_done_between_two(set_up_data):
    """Each iteration counts its own; what happens between two of them is not counted."""
    data = set_up_data(batch_tasks=2)
    collect, seconds = data.collector.collect, []

    def slowly(rows: list[Episode], **settings: Any) -> list[Trajectory]:
        time.sleep(0.1)
        return collect(rows, **settings)

    data.collector.collect = slowly
    started = time.perf_counter()
    for groups in data.train_dataloader():
        seconds.append(max(g.rollout_s for g in groups))
        time.sleep(0.1)
    assert len(seconds) == 3 and all(s >= 0.1 for s in seconds) and sum(seconds) < time.perf_counter() - started - 0.3


def test_failed_episodes_are_reported_once_an_iteration(set_up_data, caplog):
    stream = set_up_data(batch_tasks=2, group_size=3).train_dataloader()
    collector = stream.data.collector
    collect, lost = collector.collect, {(0, 1): "out of memory", (0, 4): "killed", (2, 0): "killed"}

    def fail(rows: list[Episode], iteration: int, **settings: Any) -> list[Trajectory]:
        played = collect(rows, iteration=iteration, **settings)
        return [
            replace(t, finish_reason="failed", failure=lost[iteration, i], reward=0.0) if (iteration, i) in lost else t
            for i, t in enumerate(played)
        ]

    collector.collect = fail
    batches = list(stream)
    assert [r.getMessage() for r in caplog.records if r.name == "skillsd.rollout.failures"] == [
        "iteration 0: 2 of 6 episodes failed: out of memory", "iteration 2: 1 of 3 episodes failed: killed",
    ]  # fmt: skip
    assert [t.failure for g in batches[0] for t in g.trajectories] == ["", "out of memory", "", "", "killed", ""]  # they stay there


def test_prompts_come_from_a_member_that_was_played(set_up_data):
    """The first one may have failed in its reset, where there is neither a prompt nor an observation."""
    stream = set_up_data(batch_tasks=1, group_size=3).train_dataloader()
    (want,) = next(iter(stream))
    stream.position = 0
    collect = stream.data.collector.collect
    empty: dict[str, Any] = {"instruction": "", "prompt_ids": (), "token_ids": (), "action_mask": (), "logprobs": (), "turns": ()}

    def lose(n: int) -> Callable[..., list[Trajectory]]:
        def play(rows: list[Episode], **settings: Any) -> list[Trajectory]:
            played = collect(rows, **settings)
            return [replace(t, **empty, finish_reason="failed", failure="raised: x") if t.member < n else t for t in played]

        return play

    stream.data.rollout.max_failed = 1.0
    for n in (1, 2, 3):
        stream.position, stream.data.collector.collect = 0, lose(n)
        (group,) = next(iter(stream))
        assert group.trajectories[n:] == want.trajectories[n:] == group.counted
        assert n == 3 or (group.student_prompts, group.teacher_prompts) == (want.student_prompts, want.teacher_prompts)


def test_too_many_failed_episodes(set_up_data):
    """The share is of one iteration's episodes; the message counts by kind."""
    stream = set_up_data(batch_tasks=2, group_size=2).train_dataloader()
    data = stream.data
    data.trainer.checkpoint_callback, data.trainer.default_root_dir = None, "/nowhere"
    collect, kinds = data.collector.collect, ["hung: no answer", "raised: OSError: gone", "raised: again"]

    def fail(rows: list[Episode], **settings: Any) -> list[Trajectory]:
        played = collect(rows, **settings)
        return [replace(t, finish_reason="failed", failure=k) for t, k in zip(played, kinds, strict=False)] + played[len(kinds) :]

    data.collector.collect = fail
    data.rollout.max_failed = 0.75
    next(iter(stream))
    data.rollout.max_failed, stream.position = 0.5, 0
    with pytest.raises(ConfigError) as raised:
        next(iter(stream))
    first = stream.order(0)[0].task_id
    assert str(raised.value) == (
        f"data.rollout.max_failed is 0.5, and in iteration 0 3 of 4 episodes failed (1 hung, first on task {first}: hung: no answer; "
        f"2 raised, first on task {first}: raised: OSError: gone). There is no checkpoint yet: mend the environment and resume, "
        "or set a larger share."
    )
    kinds[:] = ["model: a sampled token's log-prob is not finite"] * 3  # no environment's fault
    stream.position = 0
    with pytest.raises(ConfigError, match=r"rollout\.max_failed.*policy\.model") as raised:
        next(iter(stream))
    assert "environment" not in str(raised.value)
