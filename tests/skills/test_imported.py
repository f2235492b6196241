"""What a bank holds before its run begins."""

import pytest

from skillsd.skills import SkillBank
from skillsd.skills.imported import counted, cut_to_imported, earlier, in_use
from skillsd.skills.tables import BEFORE


def held(path):
    with SkillBank(path, read_only=True) as bank:
        return [skill for task in bank.tasks() for skill in bank.skills(task)], bank.position


@pytest.mark.parametrize("value_estimate", ["source", "gap"])
def test_a_fresh_start_finds_what_was_imported(tmp_path, make_skill, value_estimate):
    path = tmp_path / "bank.sqlite"
    assert counted(path) == (0, 0) and cut_to_imported(path) == 0 and not path.exists()
    with SkillBank(path, capacity=2, value_estimate=value_estimate) as bank:
        bank.insert([make_skill("a", reward=0.1), make_skill("a"), make_skill("b", reward=0.2), make_skill("c", reward=0.3)], BEFORE)
        bank.insert([make_skill("d")], BEFORE)  # more may follow
        before, position = [bank.skills("t1"), bank.stats()], bank.position
        assert bank.imported == position == 7  # an insert more than skills, a merge, two drops
    assert counted(path) == (7, 0)
    with SkillBank(path, capacity=1, value_estimate=value_estimate) as bank:
        bank.record_use(bank.skills("t1")[0].skill_id, 0, reward=1.0, gap=1.0)
        bank.insert([make_skill("e", reward=0.9), make_skill("x", task_id="t2")], 0)
        assert len(bank.skills("t1")) == 1
        with pytest.raises(ValueError, match=r"iteration -1 lies before the bank's last event \(0\)"):
            bank.insert([make_skill("f")], BEFORE)
    assert counted(path)[0] == 7 and counted(path)[1] > 3
    assert cut_to_imported(path) == 7 and counted(path) == (7, 0)
    with SkillBank(path, capacity=2, value_estimate=value_estimate) as bank:
        assert [bank.skills("t1"), bank.stats()] == before and bank.cut(0, expect=7) == 0
        with pytest.raises(ValueError, match="iteration -2 lies before"):
            bank.insert([make_skill("f")], BEFORE - 1)
        assert bank.cut(BEFORE) == 7 and bank.position == len(bank) == 0
        assert bank.insert([make_skill("f")], BEFORE) == [1]


def test_a_run_without_imports_is_left_alone(tmp_path, make_skill):
    path = tmp_path / "bank.sqlite"
    with SkillBank(path) as bank:
        bank.insert([make_skill("a")], 0)
    assert counted(path) == (0, 1) and cut_to_imported(path) == 0 and counted(path) == (0, 1)


def test_what_is_imported_is_older_than_a_run(make_skill):
    def iterations(*given):
        return [skill.source_iteration for skill in earlier(make_skill(iteration=i) for i in given)]

    assert iterations(4, 0, 7) == [-4, -8, -1]
    assert iterations(-1, -3) == [-1, -3]  # imported into the bank that they come from
    assert iterations(0, -2) == [-1, -3] and iterations() == []
    with SkillBank() as bank:
        bank.insert(earlier([make_skill("old", iteration=3), make_skill("late", iteration=9)]), BEFORE)
        assert bank.retrieve("t1").success_analysis == "late!"
        bank.insert([make_skill("own", iteration=0)], 0)
        assert bank.retrieve("t1").success_analysis == "own!"


def test_a_bank_is_in_use_while_somebody_else_has_it_open(tmp_path, make_skill):
    path = tmp_path / "bank.sqlite"
    assert not in_use(path) and not path.exists()
    with SkillBank(path) as bank:
        bank.insert([make_skill("a")], 0)
        assert in_use(path)
    assert not in_use(path)
