"""Which skill or attempt each privileged context shows to a teacher."""

from dataclasses import replace

import pytest

from skillsd.skills import (
    BankContext,
    GroundTruthContext,
    HindsightContext,
    NoContext,
    PrivilegedContext,
    ShuffledContext,
    SiblingContext,
    SkillBank,
)

TASKS = [f"t{i}" for i in range(10)]


@pytest.fixture
def bank(make_skill):
    bank = SkillBank()
    bank.insert([make_skill(task_id, task_id, reward) for task_id in TASKS[:7] for reward in (0.0, 1.0)], 0)
    return bank


def lenders(bank, seed, epoch, tasks=TASKS):
    skills = {task_id: ShuffledContext()(bank, task_id, tasks, seed, epoch) for task_id in tasks}
    return {task_id: skill.task_id if skill else None for task_id, skill in skills.items()}


def test_the_bank_s_context_shows_the_task_s_own_skill_or_none(bank):
    assert all(isinstance(context, PrivilegedContext) for context in (BankContext(), NoContext(), ShuffledContext()))
    assert BankContext()(bank, "t3", TASKS, 0, 0) == bank.retrieve("t3")
    assert BankContext()(bank, "t8", TASKS, 0, 0) is None
    assert NoContext()(bank, "t3", TASKS, 0, 0) is None


def test_by_default_unused_skills_come_first():
    assert vars(BankContext()) == vars(ShuffledContext()) == {"c": 2**0.5, "unused_first": True}


def test_unused_skills_come_first_or_count_as_used_once(bank):
    used = bank.retrieve("t3")
    bank.record_use(used.skill_id, 0, reward=1.0, gap=0.0)
    assert BankContext(c=0.0)(bank, "t3", TASKS, 0, 0).source_reward == 0.0  # the one that nobody has tried
    assert BankContext(c=0.0, unused_first=False)(bank, "t3", TASKS, 0, 0).skill_id == used.skill_id
    assert BankContext(c=9.0, unused_first=False)(bank, "t3", TASKS, 0, 0) == bank.retrieve("t3", 9.0, False)


@pytest.mark.parametrize("epoch", range(5))
def test_shuffled_is_a_derangement_of_the_tasks_with_skills(bank, epoch):
    who = lenders(bank, 1, epoch)
    assert all(who[task_id] is None for task_id in TASKS[7:])
    assert sorted(who[task_id] for task_id in TASKS[:7]) == TASKS[:7]
    assert all(who[task_id] != task_id for task_id in TASKS)


def test_shuffled_depends_on_seed_and_epoch_not_on_order(bank):
    assert lenders(bank, 1, 0) == lenders(bank, 1, 0, TASKS[::-1])
    assert lenders(bank, 1, 0) != lenders(bank, 1, 1)
    assert lenders(bank, 1, 0) != lenders(bank, 2, 0)


def test_a_task_alone_in_the_bank_has_no_other_s_skill(make_skill):
    bank = SkillBank()
    bank.insert([make_skill("a", "t1")], 0)
    assert lenders(bank, 0, 0, ["t1", "t2"]) == {"t1": None, "t2": None}
    with pytest.raises(ValueError, match="t9"):
        ShuffledContext()(bank, "t9", ["t1"], 0, 0)


# -- those that choose after the rollout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [HindsightContext, SiblingContext, GroundTruthContext])
def test_contexts_of_attempts_choose_nothing_before_the_rollout(bank, kind):
    context = kind()
    assert isinstance(context, PrivilegedContext) and context(bank, "t3", TASKS, 0, 0) is None
    assert context.needs_skills == (kind is HindsightContext)


def test_hindsight_shows_each_attempt_its_own_skill(make_trajectory, make_skill):
    group = [make_trajectory(member=m) for m in range(3)]
    skills = [make_skill("a"), None, make_skill("c")]
    assert list(HindsightContext().choose(group, skills)) == skills


def attempts(make_trajectory, marks):
    """`3 1+ 2+`: turns of each member, + where it solved the task."""
    return [
        replace(make_trajectory(member=m, pairs=[(f"s{m}", f"a{i}") for i in range(int(x[0]))]), success=x.endswith("+"))
        for m, x in enumerate(marks.split())
    ]


@pytest.mark.parametrize(
    ("marks", "shown"),
    [
        ("3 1 2", "---"),  # nobody solved it
        ("3 2+ 1", "1-1"),  # who solved it alone is shown nothing
        ("3+ 2+ 4+", "101"),  # the shortest, and to itself the next one
        ("2+ 2+ 2+ 3+", "1000"),  # of equals the first
        ("3+ 1 2+", "220"),  # shorter failures do not count
        ("1+", "-"),
        ("4+ 4+", "10"),
    ],
)
def test_a_sibling_is_the_shortest_success_of_another(make_trajectory, marks, shown):
    group = attempts(make_trajectory, marks)
    chosen = SiblingContext().choose(group, [None] * len(group))
    assert [None if x is None else group.index(x) for x in chosen] == [None if x == "-" else int(x) for x in shown]
    for order in (group[::-1], [*group[1:], group[0]]):  # by member, not by place
        again = SiblingContext().choose(order, [None] * len(group))
        assert {t.member: x for t, x in zip(order, again, strict=True)} == {t.member: x for t, x in zip(group, chosen, strict=True)}


def test_ground_truth_is_the_same_for_all_and_asked_for_once(make_trajectory, make_skill):
    context, asked = GroundTruthContext(), []
    with pytest.raises(AssertionError):
        context.choose([make_trajectory()], [None])
    known = {"t1": make_skill("plan"), "t2": None}

    def solve(task_id):
        asked.append(task_id)
        return known[task_id]

    context.bind(solve)
    for _ in range(2):
        for task_id, skill in known.items():
            group = [make_trajectory(task_id, member) for member in range(3)]
            assert list(context.choose(group, [make_skill("own")] * 3)) == [skill] * 3
    assert asked == ["t1", "t2"]  # also what is not known


@pytest.mark.parametrize("kind", [BankContext, ShuffledContext])
@pytest.mark.parametrize("settings", [{"c": 0.25, "unused_first": True}, {"c": 0.5, "unused_first": False}])
def test_the_settings_of_the_choice_reach_the_bank(bank, kind, settings, monkeypatch):
    asked = []
    monkeypatch.setattr(bank, "retrieve", lambda task_id, *given: asked.append(given))
    kind(**settings)(bank, "t3", TASKS, 0, 0)
    assert asked == [tuple(settings.values())]


def test_a_task_without_a_lender_asks_the_bank_for_nothing(make_skill, monkeypatch):
    bank = SkillBank()
    bank.insert([make_skill("a", "t1")], 0)
    monkeypatch.setattr(bank, "retrieve", lambda *given: pytest.fail("nobody lends"))
    assert ShuffledContext()(bank, "t1", ["t1", "t2"], 0, 0) is None
