"""Contexts that choose after the rollout: hindsight, a sibling's attempt, the environment's solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.sokoban import BOARD, ENV, KWARGS, TEMPLATE, rules, write_jsonl
from tests.training import BeforeUpdate

from skillsd.callbacks import RunLog, TeacherSync
from skillsd.data import RolloutData
from skillsd.environment import make_env
from skillsd.errors import ConfigError
from skillsd.policy.nano import build_tokenizer
from skillsd.rollout import Chat, RolloutSettings
from skillsd.skills import GroundTruthContext, HindsightContext, RulesSummariser, SiblingContext, Skill, SkillBank
from skillsd.skills.callback import SkillBankCallback
from skillsd.skills.selection import TRANSCRIPT_TEMPLATE
from skillsd.skills.summarisers.transcript import conversation
from skillsd.trajectory import Task, Trajectory


class CountingSummariser(RulesSummariser):
    """Notes what it summarises; some of it fails."""

    def __init__(self, fails: Callable[[Trajectory], bool]) -> None:
        super().__init__(joiner=" ", solved_workflow="{workflow} {turns}", unsolved_workflow="{workflow} {turns}")
        self.fails, self.seen = fails, []

    def summarise(self, trajectories: Any) -> list[Skill | None]:
        self.seen += [(t.iteration, t.task_id, t.member) for t in trajectories]
        return [None if self.fails(t) else self.plain(t) for t in trajectories]

    def plain(self, t: Trajectory) -> Skill:
        return self.summarise_one(t.turns, t.success, t.completion).of(t)


class AsyncSummariser(CountingSummariser):
    """Ready when it is waited for, or `ready` says how many are."""

    asynchronous = True
    ready = 0

    def collect(self) -> list[Any]:
        finished, self._ready, self.ready = self._ready[: self.ready], self._ready[self.ready :], 0
        return finished

    def drain(self) -> None:
        self.ready = len(self._ready)


@pytest.mark.parametrize("kind", [CountingSummariser, AsyncSummariser])
def test_hindsight_shows_the_teacher_each_member_s_own_attempt(train, tmp_path, kind):
    """Each member's teacher sees this very attempt. Summarised once, before the update; in the bank once, after it."""
    summariser = kind(lambda t: (t.iteration + t.member) % 3 == 0)
    bank = SkillBankCallback(summariser, HindsightContext(), capacity=None, template=TEMPLATE)
    sizes = BeforeUpdate(lambda trainer, batch: (bank.selection.bank.position, len(summariser.seen)))
    log = train(TeacherSync(), bank, sizes, RunLog(), group_size=3).iterations
    chat, failed, inserted = Chat(build_tokenizer(), ()), 0, 0
    for (batch, m, asked), (position, seen) in zip(log, sizes.seen, strict=True):
        rows, want = [t for g in batch for t in g.trajectories], []
        assert (seen, position) == (inserted + failed + len(rows), inserted)  # made before the update, stored after it
        for g in batch:
            assert g.skill_id is None and {t.skill_id for t in g.trajectories} == {None} and not g.sampled_by_teacher
            for t, student, teacher in zip(g.trajectories, g.student_prompts, g.teacher_prompts, strict=True):
                text = "" if summariser.fails(t) else summariser.plain(t).render(TEMPLATE)
                assert teacher == tuple(chat.prompt_ids("", t.turns[0].observation, text))
                assert student == t.prompt_ids == tuple(chat.prompt_ids("", t.turns[0].observation))
                want += [(teacher, t.token_ids)] if text else []
        assert 0 < len(want) < len(rows) and sorted((s.prompt_ids, s.token_ids) for s in asked) == sorted(want)
        assert m["teacher/skill_share"] == len(want) / len(rows)
        inserted, failed = inserted + len(want), failed + len(rows) - len(want)
        assert m["skills/failed"] == failed and m["time/summary_s"] > 0
    assert sorted(summariser.seen) == sorted((t.iteration, t.task_id, t.member) for b, *_ in log for g in b for t in g.trajectories)
    lines = [Trajectory.from_json(x) for x in (tmp_path / "trajectories.jsonl").read_text().splitlines()]
    good = [t for t in lines if not summariser.fails(t)]
    with SkillBank(tmp_path / "bank.sqlite", read_only=True) as stored:
        kept = [s for name in stored.tasks() for s in stored.skills(name)]
        assert sum(s.sources for s in kept) == len(good) == inserted and all(s.uses == 0 for s in kept)
        assert {(s.task_id, s.texts) for s in kept} == {(t.task_id, summariser.plain(t).texts) for t in good}


def test_episodes_without_a_turn_have_no_hindsight(train):
    """A prompt that does not fit leaves nothing to look back at."""
    summariser = CountingSummariser(lambda t: False)
    bank = SkillBankCallback(summariser, HindsightContext(), template=TEMPLATE)
    log = train(TeacherSync(), bank, epochs=1, rollout=RolloutSettings(max_turn_tokens=1, max_prompt_tokens=1)).iterations
    assert summariser.seen == [] and all(asked == [] and m["skills/bank"] == m["skills/failed"] == 0 for _, m, asked in log)
    assert all(g.teacher_prompts == g.student_prompts == tuple(t.prompt_ids for t in g.trajectories) for batch, *_ in log for g in batch)


def alter_episodes(data: RolloutData, change: Callable[[Trajectory], Trajectory]) -> None:
    """Let the episodes come out otherwise."""
    collect = data.collector.collect
    data.collector.collect = lambda rows, **settings: [change(t) for t in collect(rows, **settings)]  # type: ignore[method-assign]


@pytest.mark.parametrize("template", ["solved : {actions}\n", None])
def test_a_sibling_s_solution_is_shown_to_the_others_teacher(set_up_data, template):
    """Its attempt, or its answers alone, are in front of the others' teacher prompts; where nobody else solved it there is nothing."""
    bank = SkillBankCallback(rules(), SiblingContext(), template=TEMPLATE, transcript_template=template)
    bank.selection.bank = SkillBank()
    data = set_up_data(bank, batch_tasks=5, group_size=4)
    data.train_dataloader()
    solved = {"train-0000": {}, "train-0001": {2: 3}, "train-0002": {0: 2, 3: 1}, "train-0003": {1: 2, 2: 2, 3: 2}, "train-0004": {0: 3}}

    def change(t: Trajectory) -> Trajectory:
        turns = tuple(replace(t.turns[0], action=f"move {t.member} {i}") for i in range(solved[t.task_id].get(t.member, 1)))
        return replace(t, turns=turns, success=t.member in solved[t.task_id])

    alter_episodes(data, change)
    (groups,) = data.train_dataloader()
    shown_members = {"train-0000": "----", "train-0001": "22-2", "train-0002": "3330", "train-0003": "1211", "train-0004": "-000"}
    for g in groups:
        for t, teacher in zip(g.trajectories, g.teacher_prompts, strict=True):
            other = shown_members[g.task.task_id][t.member]
            text = ""
            if other != "-":
                shown = g.trajectories[int(other)]
                actions = " ".join(f"move {other} {i}" for i in range(len(shown.turns)))
                text = f"solved : {actions}\n" if template else TRANSCRIPT_TEMPLATE.format(transcript=conversation(shown))
                assert all(x in text for x in actions.split())
            assert teacher == tuple(data.collector.chat.prompt_ids("", t.turns[0].observation, text))
            assert g.has_teacher_context(t.member) == bool(text) and g.student_prompts[t.member] == t.prompt_ids
    assert len(bank.selection.bank) == 0  # it is filled as ever, at the iteration's end


def test_the_environment_s_solution_is_asked_for_once_a_task(train, monkeypatch):
    """One plan a task, whatever the members did, asked for once; the bank is filled with what they did, not with the plan."""
    asked: list[str] = []
    solve = RolloutData.solution

    def count(self: RolloutData, task_id: str, summariser: Any) -> Skill | None:
        asked.append(task_id)
        return solve(self, task_id, summariser)

    monkeypatch.setattr(RolloutData, "solution", count)
    env = make_env(ENV, KWARGS | {"max_turns": 9})
    plans = {}
    for name in (f"train-{i:04d}" for i in range(5)):
        env.reset(Task(name))
        plans[name] = env.solution()
    assert all(plans.values()) and len({tuple(x) for x in plans.values()}) > 2
    summariser = CountingSummariser(lambda t: False)
    bank = SkillBankCallback(summariser, GroundTruthContext(), template="{golden_workflow}|\n")
    log = train(TeacherSync(), bank, env_kwargs=KWARGS | {"max_turns": 9}).iterations
    chat = Chat(build_tokenizer(), ())
    for g in (g for batch, *_ in log for g in batch):
        text = f"{' '.join(plans[g.task.task_id])} {len(plans[g.task.task_id])}|\n"
        assert g.teacher_prompts == (tuple(chat.prompt_ids("", g.trajectories[0].turns[0].observation, text)),) * 2
        assert g.student_prompts == tuple(t.prompt_ids for t in g.trajectories) != g.teacher_prompts and g.skill_id is None
    assert sorted(asked) == sorted(plans)
    played = [(t.iteration, t.task_id, t.member) for batch, *_ in log for g in batch for t in g.trajectories]
    assert sorted(summariser.seen) == sorted([*played, *((0, name, 0) for name in plans)])
    assert log[-1][1]["skills/bank"] > 0 and all(len(a) == 2 * len(b) for b, _, a in log)


def test_a_task_without_a_solution_has_no_teacher_context(set_up_data, tmp_path):
    """The others keep theirs."""
    boards = {"stuck": "#####\n#XP_#\n#__O#\n#___#\n#####", "open": BOARD}
    lines = [{"task_id": name, "split": "train", "board": b} for name, b in boards.items()]
    lines.append({"task_id": "held-out", "split": "test", "board": BOARD})
    bank = SkillBankCallback(rules(), GroundTruthContext(), template="{golden_workflow}|\n")
    bank.selection.bank = SkillBank()
    data = set_up_data(bank, tasks_file=write_jsonl(tmp_path / "tasks.jsonl", *lines))
    (groups,) = data.train_dataloader()
    has_context = {g.task.task_id: {g.has_teacher_context(m) for m in (0, 1)} for g in groups}
    assert has_context == {"stuck": {False}, "open": {True}}


def test_an_environment_without_solutions_is_refused(set_up_data, monkeypatch):
    bank = SkillBankCallback(rules(), GroundTruthContext())
    bank.selection.bank = SkillBank()
    data = set_up_data(bank)
    stream = data.train_dataloader()
    monkeypatch.delattr("skillsd_sokoban.env.SokobanEnv.solution")
    with pytest.raises(ConfigError, match=r"skills\.context: .*Sokoban-v0 offers no solution\(\): choose another context"):
        next(iter(stream))
