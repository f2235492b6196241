"""Which skill a task's teacher gets, by itself: no Lightning, no model."""

from __future__ import annotations

from typing import Any

import pytest

from skillsd.errors import ConfigError
from skillsd.skills import BankContext, HindsightContext, NoContext, RulesSummariser, SkillBank
from skillsd.skills.selection import SkillSelection


def make(context: Any = None, summariser: Any = None, value_estimate: str = "source") -> SkillSelection:
    return SkillSelection(summariser, context, {"value_estimate": value_estimate}, None, "{golden_workflow}", None, "epoch")


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


@pytest.mark.parametrize(
    ("actor", "context", "value_estimate", "key"),
    [
        ("student", NoContext(), "gap", None),
        ("student", HindsightContext(), "gap", None),
        ("student_with_skill", BankContext(), "source", None),
        ("student_with_skill", BankContext(), "next_visit", None),
        ("student_with_skill", BankContext(), "gap", "skills.value_estimate"),
        ("half_with_skill", BankContext(), "source", None),
        ("half_with_skill", BankContext(), "next_visit", "skills.value_estimate"),
        ("half_with_skill", BankContext(), "gap", "skills.value_estimate"),
        ("teacher", BankContext(), "gap", None),
        ("teacher", NoContext(), "source", "data.actor"),
        ("half_with_skill", HindsightContext(), "source", "data.actor"),
    ],
)
def test_which_actor_may_see_a_skill(actor, context, value_estimate, key):
    selection = make(context, value_estimate=value_estimate)
    if key is None:
        selection.check_actor(actor)
        return
    with pytest.raises(ConfigError, match=f"^{key} is "):
        selection.check_actor(actor)


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


def test_a_bank_that_is_not_the_checkpoint_s_is_refused(tmp_path, make_skill):
    with SkillBank(tmp_path / "bank.sqlite") as bank:
        bank.insert([make_skill("a")], 0)
    with pytest.raises(ConfigError, match=r"^skills: .*checkpoint"):
        make().open(tmp_path / "bank.sqlite", {"iteration": 1, "position": 2, "prompts": {}, "failed": 0})


def test_an_open_bank_stays_open(tmp_path):
    selection = make()
    selection.open(tmp_path / "bank.sqlite", None)
    bank = selection.bank
    selection.open(tmp_path / "other.sqlite", None)
    assert selection.bank is bank and not (tmp_path / "other.sqlite").exists()
    selection.close()


@pytest.mark.parametrize(("failed", "made", "held", "warns"), [(1, 0, 0, True), (0, 0, 0, False), (1, 1, 0, False), (1, 0, 1, False)])
def test_the_end_says_that_no_skill_was_made(make_skill, caplog, failed, made, held, warns):
    selection = make()
    selection.bank = SkillBank()
    selection.bank.insert([make_skill("a")] * held, 0)
    selection.failed, selection.made = failed, made
    selection.warn_if_useless()
    assert bool(caplog.messages) == warns
