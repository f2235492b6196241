import pytest

from skillsd.skills import BankContext, NoContext, PrivilegedContext, ShuffledContext, SkillBank

TASKS = [f"t{i}" for i in range(10)]


@pytest.fixture
def bank(make_skill):
    bank = SkillBank()
    bank.insert([make_skill(task_id, task_id, reward) for task_id in TASKS[:7] for reward in (0.0, 1.0)], 0)
    return bank


def lenders(bank, seed, epoch, tasks=TASKS):
    skills = {task_id: ShuffledContext()(bank, task_id, tasks, seed, epoch) for task_id in tasks}
    return {task_id: skill.task_id if skill else None for task_id, skill in skills.items()}


def test_own_and_none(bank):
    assert all(isinstance(context, PrivilegedContext) for context in (BankContext(), NoContext(), ShuffledContext()))
    assert BankContext()(bank, "t3", TASKS, 0, 0) == bank.retrieve("t3")
    assert BankContext()(bank, "t8", TASKS, 0, 0) is None
    assert NoContext()(bank, "t3", TASKS, 0, 0) is None


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


def test_shuffled_alone_has_none(make_skill):
    bank = SkillBank()
    bank.insert([make_skill("a", "t1")], 0)
    assert lenders(bank, 0, 0, ["t1", "t2"]) == {"t1": None, "t2": None}
    with pytest.raises(ValueError, match="t9"):
        ShuffledContext()(bank, "t9", ["t1"], 0, 0)
