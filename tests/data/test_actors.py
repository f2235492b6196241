"""Who acts, and which prompts student and teacher are scored under."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.sokoban import KWARGS, TEMPLATE, bank_with, logprobs_under, max_difference, rules
from tests.training import BeforeUpdate

from skillsd.callbacks import RunLog, TeacherSync
from skillsd.rollout import Episode
from skillsd.skills import BankContext, SkillBank
from skillsd.skills.callback import SkillBankCallback
from skillsd.trajectory import Trajectory


@pytest.mark.parametrize("instruction", ["", "answer with one move ."])
def test_the_teacher_sees_the_skill_in_front(set_up_data, tmp_path, instruction):
    bank = bank_with(tmp_path, train_0003="up up left")
    data = set_up_data(bank, batch_tasks=5, env_kwargs=KWARGS | {"prompts": {"instruction": instruction}})
    (groups,) = data.train_dataloader()
    chat = data.collector.chat
    for g in groups:
        t = g.trajectories[0]
        if g.task.task_id != "train-0003":
            assert (g.skill_id, g.teacher_prompts) == (None, (t.prompt_ids,) * 2)
            continue
        assert g.skill_id == 1 and [t.skill_id for t in g.trajectories] == [1, 1]
        text = "skill solved none : up up left\n"
        first, second = map(list, g.teacher_prompts)
        assert first == second == chat.prompt_ids(instruction, t.turns[0].observation, text)
        skill, plain = chat.encode(text), list(t.prompt_ids)
        at = 1 if instruction else 0  # behind the mark of the system text
        assert first == plain[:at] + skill + plain[at:] and g.student_prompts == (t.prompt_ids,) * 2
        # The student has not seen it: the same tokens as without a bank.
        (same,) = data.collector.collect([Episode(g.task, 0)], seed=0, iteration=0)
        assert (same.prompt_ids, same.token_ids) == (t.prompt_ids, t.token_ids)


def test_a_teacher_without_its_skill_is_an_error(set_up_data, tmp_path, monkeypatch):
    bank = bank_with(tmp_path, **{f"train_000{i}": "up" for i in range(5)})
    data = set_up_data(bank)
    monkeypatch.setattr(BankContext, "__call__", lambda *_: None)
    with pytest.raises(RuntimeError, match="has 1 skills, and its teacher got none"):
        next(iter(data.train_dataloader()))


def test_after_one_epoch_every_teacher_row_carries_a_skill(train, tmp_path):
    """A real run: after the first epoch every teacher row carries a skill, and the record says which."""
    run = train(TeacherSync(), SkillBankCallback(rules(), template=TEMPLATE), RunLog())
    asked, rows = ([s for inputs in x for s in inputs] for x in (run.teacher_inputs, run.student_inputs))

    assert [m["teacher/skill_share"] for m in run.metrics] == [0, 0, 0, 1, 1, 1]
    assert all(m["skills/bank"] > 0 for m in run.metrics)
    lines = [Trajectory.from_json(x) for x in (tmp_path / "trajectories.jsonl").read_text().splitlines()]
    assert lines == [t for batch in run.batches for g in batch for t in g.trajectories] and len(lines) == 20
    assert all(t.skill_id is None for t in lines[:10])
    with SkillBank(tmp_path / "bank.sqlite", read_only=True) as stored:
        for t in lines[10:]:
            assert stored.get(t.skill_id).task_id == t.task_id and stored.get(t.skill_id).source_iteration < 3
        assert sum(s.uses for name in stored.tasks() for s in stored.skills(name)) <= 5
    # Student and teacher were asked for the same tokens, the teacher behind a longer prompt.
    conditioned = [
        (p, t.token_ids) for batch in run.batches[3:] for g in batch for p, t in zip(g.teacher_prompts, g.trajectories, strict=True)
    ]
    assert sorted((tuple(s.prompt_ids), s.token_ids) for s in asked) == sorted(conditioned)
    plain = {(t.prompt_ids, t.token_ids) for t in lines}
    assert {(s.prompt_ids, s.token_ids) for s in rows} == plain
    assert all(len(prompt) > max(len(p) for p, _ in plain) for prompt, _ in conditioned)


ACTORS: dict[str, tuple[str, Callable[[int, int], bool]]] = {
    "student": ("student", lambda member, size: False),
    "student_with_skill": ("student", lambda member, size: True),
    "half_with_skill": ("student", lambda member, size: member >= (size + 1) // 2),
    "teacher": ("teacher", lambda member, size: True),
}
"""Actor -> its adapter, and which members of a group act with the skill."""


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("actor", ACTORS)
def test_who_acts_and_what_everybody_sees(set_up_data, tmp_path, actor, size):
    adapter, acts_with_skill = ACTORS[actor]
    skills = {"train_0003": "up up left", "train_0001": "down"}
    data = set_up_data(bank_with(tmp_path, **skills), batch_tasks=5, group_size=size, actor=actor)
    (groups,) = data.train_dataloader()
    assert sum(g.skill_id is not None for g in groups) == 2
    for g in groups:
        first = g.trajectories[0].turns[0].observation
        workflow = skills.get(g.task.task_id.replace("-", "_"))
        plain, skilled = (
            tuple(data.collector.chat.prompt_ids("", first, x)) for x in ("", f"skill solved none : {workflow}\n" if workflow else "")
        )
        with_skill = [acts_with_skill(m, size) for m in range(size)]
        acted = tuple(skilled if x else plain for x in with_skill)
        assert [t.prompt_ids for t in g.trajectories] == list(acted) and g.sampled_by_teacher == (actor == "teacher")
        other = {
            "student": (plain,) * size,  # what the student is trained to say without, the teacher says with it
            "student_with_skill": (skilled,) * size,
            "half_with_skill": acted,
            "teacher": (plain,) * size,
        }
        assert g.student_prompts == other[actor]
        assert g.teacher_prompts == (
            tuple(plain if x else skilled for x in with_skill) if actor == "half_with_skill" else (skilled,) * size
        )
        no_context = actor == "student_with_skill" or workflow is None
        assert [g.has_teacher_context(m) for m in range(size)] == [not no_context] * size
        # On record is the log-prob of whoever sampled, behind the prompt that it saw: nobody else's.
        for t in g.trajectories:
            assert max_difference(t.logprobs, logprobs_under(data, adapter, t.prompt_ids, t)) < 1e-4
            assert (
                max_difference(t.logprobs, logprobs_under(data, "teacher" if adapter == "student" else "student", t.prompt_ids, t)) > 1e-3
            )
            if workflow is not None:
                assert max_difference(t.logprobs, logprobs_under(data, adapter, plain if t.prompt_ids == skilled else skilled, t)) > 1e-3
            if actor == "teacher":
                assert t.logprobs == pytest.approx(logprobs_under(data, "teacher", g.teacher_prompts[t.member], t), abs=1e-4)
    again = set_up_data(bank_with(tmp_path / "again", **skills), batch_tasks=5, group_size=size, actor=actor)
    assert next(iter(again.train_dataloader())) == groups


@pytest.mark.parametrize("sync", [TeacherSync(), TeacherSync(every=2), TeacherSync("ema", rate=0.3), TeacherSync("frozen")])
def test_a_teacher_that_rolls_out_is_current(train, sync):
    """What it sampled is on record as it is scored in the same iteration: it was synced before the rollout, not after."""

    def look(trainer: Any, batch: Any) -> tuple[float, float]:
        data, rows = trainer.datamodule, [(t, g.teacher_prompts[t.member]) for g in batch for t in g.trajectories]
        off = [max(max_difference(t.logprobs, logprobs_under(data, who, p, t)) for t, p in rows) for who in ("teacher", "student")]
        return off[0], off[1]

    seen = BeforeUpdate(look)
    shaped = KWARGS | {"distance_reward": 0.1, "invalid_penalty": 0.1}  # rewards that differ within each group
    log = train(sync, SkillBankCallback(rules(), template=TEMPLATE), seen, actor="teacher", env_kwargs=shaped, group_size=4).iterations
    teacher, student = zip(*seen.seen, strict=True)
    assert max(teacher) < 1e-4 and len(teacher) == 6
    lags = {"sync": [False, sync.every == 2] * 3, "ema": [False] + [True] * 5, "frozen": [False] + [True] * 5}
    assert [x > 1e-3 for x in student] == lags[sync.mode]
    for i, (batch, m, asked) in enumerate(log):
        rows = [(g.teacher_prompts[t.member], t.token_ids) for g in batch for t in g.trajectories]
        assert m["policy/clip_fraction"] == m["policy/logp_drift"] == 0  # GRPO is on-policy with today's student
        assert sorted((s.prompt_ids, s.token_ids) for s in asked) == (sorted(rows) if i >= 3 or lags[sync.mode][i] else [])
    assert [m["teacher/skill_share"] for _, m, _ in log] == [0, 0, 0, 1, 1, 1] and all(m["teacher/k3"] > 0 for _, m, _ in log[3:])
