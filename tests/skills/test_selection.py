"""Which skill a task's teacher gets, by itself: no Lightning, no model."""

from __future__ import annotations

from typing import Any

import pytest

from skillsd.errors import ConfigError
from skillsd.skills import BankContext, RulesSummariser, SkillBank
from skillsd.skills.selection import SkillSelection
from skillsd.skills.summarisers import Finished
from skillsd.trajectory import Task, TrajectoryGroup


def make(context: Any = None, summariser: Any = None) -> SkillSelection:
    return SkillSelection(summariser, context, {}, None, "{golden_workflow}", None, "epoch")


@pytest.mark.parametrize("key", ["summariser", "context"])
def test_an_object_of_another_kind_is_named_by_its_key(key):
    with pytest.raises(ConfigError, match=rf"^skills\.{key}: object lacks"):
        make(**{key: object()})


def test_a_summariser_is_tried_once():
    class Tried(RulesSummariser):
        tries = 0

        def check_ready(self) -> None:
            self.tries += 1

    summariser = Tried()
    selection = make(summariser=summariser)
    for _ in range(2):
        selection.check_summariser()
    assert summariser.tries == 1


def test_skills_are_chosen_for_an_iteration_s_tasks(make_skill):
    """After the context was asked about every task, with all that it may depend on; only at an epoch's start again."""
    asked: list[tuple[Any, ...]] = []

    class Asked(BankContext):
        def __call__(self, bank: SkillBank, task_id: str, all_task_ids: Any, seed: int, epoch: int) -> Any:
            asked.append((bank, task_id, all_task_ids, seed, epoch))
            return super().__call__(bank, task_id, all_task_ids, seed, epoch)

    selection, every = make(Asked()), ["t1", "t2", "t3"]
    selection.bank = bank = SkillBank()
    bank.insert([make_skill("a", "t1"), make_skill("b", "t2")], 0)
    assert selection.choose(["t2", "t3"], every, seed=5, epoch=7, epoch_start=True) == [(2, "b."), (None, "")]
    assert asked == [(bank, task_id, every, 5, 7) for task_id in every]
    asked.clear()
    assert selection.choose(["t1"], every, seed=5, epoch=7, epoch_start=False) == [(1, "a.")]
    assert [task_id for _, task_id, *_ in asked] == ["t3"]


def test_a_selection_begins_with_nothing_chosen(make_skill):
    """Also where its first iteration is not an epoch's: a run that goes on."""
    selection = make()
    selection.bank = SkillBank()
    selection.bank.insert([make_skill("a")], 0)
    assert selection.choose(["t1"], ["t1"], seed=0, epoch=0, epoch_start=False) == [(1, "a.")]


def test_all_summaries_of_a_process_are_counted(make_skill, make_trajectory, monkeypatch):
    selection = make()
    selection.bank = SkillBank()
    task = Task("t1")
    for iteration, texts in enumerate(("ab", "c", "")):
        finished = Finished(iteration, [make_skill(text) for text in texts], 1)
        monkeypatch.setattr(selection.checked, "collect", lambda finished=finished: [finished])
        group = TrajectoryGroup(task, (make_trajectory(iteration=iteration),), ((1,),), ((1,),), None)
        assert selection.finish([group], [0.0], last=False)["skills/failed"] == iteration + 1
    assert (selection.made, selection.failed, len(selection.bank)) == (3, 3, 3)
