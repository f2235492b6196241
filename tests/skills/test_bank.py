"""What a bank answers: ids, merges, evictions, value estimates, cuts. tests/properties/test_bank.py plays all of it in any order."""

import random
import sqlite3
from contextlib import closing

import pytest

from skillsd.skills import Skill, SkillBank


def texts(bank, task_id="t1"):
    return [skill.golden_workflow[:-1] for skill in bank.skills(task_id)]


def answers(bank):
    """Everything that a bank can be asked."""
    events = list(bank.events())
    ids = [event.skill_id for event in events if event.kind == "insert"]
    return bank.position, bank.stats(), [bank.get(i) for i in ids], {t: bank.skills(t) for t in bank.tasks()}, events


def stored(path):
    """All that the file holds."""
    with closing(sqlite3.connect(path)) as db:
        return {table: sorted(db.execute(f"SELECT * FROM {table}"), key=repr) for table in ("head", "event", "skill", "state")}


def test_insert_gives_ids_in_order_and_get_returns_them(make_skill):
    bank = SkillBank()
    assert bank.insert([make_skill("a", reward=0.25), make_skill("b", task_id="t2")], 0) == [1, 2]
    assert bank.insert([make_skill("c")], 1) == [3]
    assert bank.get(1) == make_skill("a", reward=0.25, skill_id=1, mean_reward=0.25)
    assert texts(bank) == ["a", "c"] and bank.tasks() == ["t1", "t2"] and len(bank) == 3
    assert bank.retrieve("t1").skill_id == 1 and bank.retrieve("nowhere") is None
    for missing in (0, 4):
        with pytest.raises(KeyError):
            bank.get(missing)


def test_duplicates_are_merged_per_task(make_skill):
    bank = SkillBank()
    assert bank.insert([make_skill("a", reward=0.1), make_skill("a", reward=0.9), make_skill("a", task_id="t2")], 0) == [1, 1, 2]
    skill = bank.get(1)
    assert (skill.sources, skill.source_reward, skill.mean_reward, skill.uses) == (2, 0.1, 0.1, 0)
    assert bank.stats() == {"size": 2, "tasks": 2, "mean_uses": 0, "merged": 1, "evicted": 0}


def test_texts_that_run_into_each_other_are_no_duplicates():
    bank = SkillBank()
    assert bank.insert([Skill("ab", "c", "d", "t1"), Skill("a", "bc", "d", "t1"), Skill("a", "b", "cd", "t1")], 0) == [1, 2, 3]


@pytest.mark.parametrize(
    ("eviction", "kept"),
    [("oldest", ["c", "d"]), ("worst", ["a", "d"])],  # b (0.2) falls to c (0.3), then c falls to d (0.3, newer)
)
def test_capacity(make_skill, eviction, kept):
    bank = SkillBank(capacity=2, eviction=eviction)
    new = [make_skill(text, reward=reward) for text, reward in (("a", 0.5), ("b", 0.2), ("c", 0.3), ("d", 0.3))]
    assert bank.insert(new, 0) == [1, 2, 3, 4]
    assert texts(bank) == kept
    assert bank.stats()["evicted"] == 2 and bank.get(2).golden_workflow == "b."
    assert [event.kind for event in bank.events()] == ["insert"] * 3 + ["evict", "insert", "evict"]


def test_worst_may_be_the_newcomer_and_other_tasks_are_untouched(make_skill):
    bank = SkillBank(capacity=1, eviction="worst")
    bank.insert([make_skill("a", reward=0.5), make_skill("x", task_id="t2"), make_skill("b", reward=0.4)], 0)
    assert texts(bank) == ["a"] and texts(bank, "t2") == ["x"]
    # What was evicted is new again.
    assert bank.insert([make_skill("b", reward=0.6)], 1) == [4] and texts(bank) == ["b"]


def test_a_smaller_capacity_is_reached_at_the_next_insert(tmp_path, make_skill):
    with SkillBank(tmp_path / "bank.sqlite") as bank:
        bank.insert([make_skill(text, reward=i / 8) for i, text in enumerate("abcd")], 0)
    with SkillBank(tmp_path / "bank.sqlite", capacity=1) as bank:
        bank.insert([make_skill("d")], 1)  # a duplicate
        assert texts(bank) == ["d"] and bank.stats()["evicted"] == 3


def test_one_call_sees_what_it_did(make_skill):
    bank = SkillBank(capacity=1, eviction="oldest")
    # b evicts a, so the second a is new and evicts b; the third is its duplicate.
    assert bank.insert([make_skill(text) for text in "abaa"], 0) == [1, 2, 3, 3]
    assert [skill.skill_id for skill in bank.skills("t1")] == [3] and bank.get(3).sources == 2
    assert bank.stats() == {"size": 1, "tasks": 1, "mean_uses": 0, "merged": 1, "evicted": 2} and bank.position == 6


def test_value_estimates(make_skill):
    means = {}
    for value_estimate in ("source", "next_visit", "gap"):
        bank = SkillBank(value_estimate=value_estimate)
        bank.insert([make_skill("a", reward=0.5)], 0)
        means[value_estimate] = [bank.get(1).mean_reward]
        for reward, gap in ((1.0, -0.25), (0.25, 0.75)):
            bank.record_use(1, 1, reward=reward, gap=gap)
            means[value_estimate].append(bank.get(1).mean_reward)
        assert bank.get(1).uses == 2 and bank.stats()["mean_uses"] == 2
    *_, used = bank.events()
    assert (used.kind, used.reward, used.gap, used.total_before) == ("use", 0.25, 0.75, -0.25)
    assert means == {"source": [0.5, 0.5, 0.5], "next_visit": [0.5, 1.0, 0.625], "gap": [0.0, -0.25, 0.25]}


def test_an_evicted_skill_may_be_used_and_counts_no_longer(make_skill):
    bank = SkillBank(capacity=1, eviction="oldest")
    bank.insert([make_skill("a")], 0)
    bank.record_use(1, 0)
    assert bank.stats()["mean_uses"] == 1
    bank.insert([make_skill("b")], 1)
    bank.record_use(1, 1)
    assert bank.get(1).uses == 2 and bank.stats()["mean_uses"] == 0
    bank.cut(1)
    assert bank.get(1).uses == 1 and bank.stats()["mean_uses"] == 1


@pytest.mark.parametrize("settings", [{"capacity": 0}, {"eviction": "best"}, {"value_estimate": "none"}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SkillBank(**settings)


def test_settings_by_default():
    bank = SkillBank()
    assert (bank.capacity, bank.eviction, bank.value_estimate, bank.path) == (8, "worst", "source", None)
    bank.sync()  # nothing to flush


def test_bad_calls_change_nothing(make_skill):
    bank = SkillBank(value_estimate="gap")
    bank.insert([make_skill("a")], 5)
    bank.record_use(1, 5, gap=1e308)
    before = answers(bank)
    for error, named, call in (
        (ValueError, "source_reward", lambda: bank.insert([make_skill("b"), make_skill("c", reward=float("nan"))], 5)),
        (ValueError, "source_completion", lambda: bank.insert([Skill("a", "b", "c", "t1", source_completion=float("inf"))], 5)),
        (ValueError, "task_id", lambda: bank.insert([make_skill("b"), Skill("a", "b", "c")], 5)),
        (ValueError, "iteration 4", lambda: bank.insert([make_skill("b")], 4)),
        (KeyError, "2", lambda: bank.record_use(2, 5, gap=0.0)),
        (KeyError, "0", lambda: bank.record_use(0, 5, gap=0.0)),
        (ValueError, "gap", lambda: bank.record_use(1, 5, reward=0.0)),
        (ValueError, "gap", lambda: bank.record_use(1, 5, gap=float("inf"))),
        (ValueError, "reward", lambda: bank.record_use(1, 5, reward=float("nan"), gap=0.0)),  # though nobody needs it
        (ValueError, "skill 1", lambda: bank.record_use(1, 5, gap=1e308)),  # the sum is infinite
        (ValueError, "iteration 4", lambda: bank.record_use(1, 4, gap=1.0)),
        (ValueError, "checkpoint", lambda: bank.cut(3, expect=1)),
        (UnicodeEncodeError, "surrogates", lambda: bank.insert([make_skill("b"), make_skill("c", task_id="\ud800")], 5)),
        (OverflowError, "large", lambda: bank.insert([make_skill("b", "t2"), make_skill("c", iteration=2**63)], 5)),
    ):
        with pytest.raises(error, match=named):
            call()
        assert answers(bank) == before
    bank = SkillBank(value_estimate="next_visit")
    with pytest.raises(ValueError, match="reward"):
        bank.record_use(*bank.insert([make_skill("a")], 0), 0, gap=1.0)


def test_a_run_begins_with_iteration_0_and_imports_lie_before_it(make_skill):
    bank = SkillBank()
    with pytest.raises(ValueError, match="iteration -2"):
        bank.insert([make_skill("a")], -2)
    assert bank.insert([make_skill("a")], -1) == [1] and bank.imported == 1 and bank.cut(0) == 0


def test_a_negative_zero_is_a_zero(tmp_path, make_skill):
    """SQLite stores it so; a checksum of the sign would find another row than was written."""
    path = tmp_path / "bank.sqlite"
    with SkillBank(path, value_estimate="gap") as bank:
        bank.insert([make_skill("a", reward=-0.0)], 0)
        bank.record_use(1, 1, gap=-0.0)
    with SkillBank(path, value_estimate="gap") as bank:
        assert str(bank.get(1).mean_reward) == str(bank.get(1).source_reward) == "0.0"
        assert bank.cut(1) == 1 and bank.get(1).uses == 0


def test_cut_brings_back_what_was_evicted(make_skill):
    bank = SkillBank(capacity=1, eviction="oldest")
    bank.insert([make_skill("a")], 0)
    position = bank.position
    bank.insert([make_skill("b")], 1)
    assert texts(bank) == ["b"]
    assert bank.cut(1, expect=position) == 2
    assert texts(bank) == ["a"] and bank.insert([make_skill("c")], 1) == [2]
    assert bank.cut(2) == 0


@pytest.mark.parametrize("capacity", [1, 4, None])
def test_many_in_one_call_are_as_many_calls(tmp_path, make_skill, capacity):
    """To the last row of the file, and so is what a cut leaves."""
    rng, settings = random.Random(capacity), {"capacity": capacity, "value_estimate": "next_visit"}
    one, many = SkillBank(tmp_path / "one.sqlite", **settings), SkillBank(tmp_path / "many.sqlite", **settings)
    kept, n = [], 0
    for iteration in range(8):
        new = [make_skill(rng.choice("abcdefgh"), rng.choice(["t1", "t2"]), rng.random(), iteration) for _ in range(20)]
        used, reward = rng.randint(1, n) if n else None, rng.random()
        for bank in (one, many):
            if used is not None:
                bank.record_use(used, iteration, reward=reward)
        ids = [one.insert([skill], iteration)[0] for skill in new]
        assert many.insert(new, iteration) == ids
        n = max(n, *ids)
        assert stored(many.path) == stored(one.path) and answers(many) == answers(one)
        kept.append(stored(one.path))
    assert one.stats()["merged"] > 9 and (capacity is None or one.stats()["evicted"] > 9)
    for iteration in (5, 2):
        many.cut(iteration)
        assert stored(many.path) == kept[iteration - 1]
    many.cut(0)
    assert many.tasks() == [] and stored(many.path)["state"] == []


def test_an_error_in_the_middle_of_a_call_leaves_no_trace(tmp_path, make_skill):
    banks = [SkillBank(tmp_path / f"{i}.sqlite", capacity=2) for i in range(2)]
    for bank in banks:
        bank.insert([make_skill(text, task_id, 0.5) for text in "abc" for task_id in ("t1", "t2")], 0)
    before, held = stored(banks[0].path), answers(banks[0])
    new = [make_skill(text, task_id, 0.9, 1) for text in "adea" for task_id in ("t1", "t3", "t2")]
    with pytest.raises(UnicodeEncodeError):
        banks[0].insert([*new, make_skill("f", "\ud800")], 1)
    assert (stored(banks[0].path), answers(banks[0])) == (before, held)
    assert banks[0].insert(new, 1) == banks[1].insert(new, 1) and stored(banks[0].path) == stored(banks[1].path)


def test_who_was_overtaken_writes_nothing(tmp_path, make_skill):
    """Two writers: what the second has added is not undone by the first, which does not know of it."""
    with SkillBank(tmp_path / "bank.sqlite") as first, SkillBank(tmp_path / "bank.sqlite") as second:
        first.insert([make_skill("a")], 0)
    with SkillBank(tmp_path / "bank.sqlite") as first, SkillBank(tmp_path / "bank.sqlite") as second:
        second.record_use(1, 1)
        before = stored(tmp_path / "bank.sqlite")
        with pytest.raises(OSError, match="another process has written"):
            first.cut(0)
        assert stored(tmp_path / "bank.sqlite") == before


def test_a_task_s_row_that_is_gone_is_no_task_without_skills(tmp_path, make_skill):
    with SkillBank(tmp_path / "bank.sqlite") as bank:
        bank.insert([make_skill("a"), make_skill("b", task_id="t2")], 0)
        assert bank.tasks() == ["t1", "t2"]
        with closing(sqlite3.connect(tmp_path / "bank.sqlite")) as db:
            db.execute("DELETE FROM state WHERE task_id = 't1'")
            db.commit()
        with pytest.raises(ValueError, match="'state' is missing"):
            bank.skills("t1")
        assert texts(bank, "t2") == ["b"]


def test_rewards_are_finite_and_an_empty_bank_has_no_uses(make_skill):
    bank = SkillBank()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="source_reward"):
            bank.insert([make_skill("a"), make_skill("b", reward=bad)], 0)
    assert len(bank) == bank.position == 0 and bank.stats()["mean_uses"] == 0.0


def test_unused_skills_come_first_unless_it_is_said(make_skill):
    bank = SkillBank(value_estimate="next_visit")
    bank.insert([make_skill("a", reward=1.0), make_skill("b", reward=0.0)], 0)
    bank.record_use(1, 1, reward=1.0)
    bank.record_use(1, 2, reward=1.0)
    assert bank.retrieve("t1").skill_id == 2 and bank.retrieve("t1", c=0.0, unused_first=False).skill_id == 1


def test_rewards_of_uses_add_up_to_nothing_where_the_source_s_counts(make_skill):
    bank = SkillBank(value_estimate="source")
    bank.insert([make_skill("a")], 0)
    for _ in range(2):
        bank.record_use(1, 1, reward=1.0, gap=1.0)
    assert [event.total_before for event in bank.events()] == [None, 0.0, 0.0]
