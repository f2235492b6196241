import random
import struct

import pytest

from skillsd.skills import Skill, SkillBank, ledger


def texts(bank, task_id="t1"):
    return [skill.golden_workflow[:-1] for skill in bank.skills(task_id)]


def state(bank):
    """Everything that a bank can be asked."""
    ids = range(1, bank._ledger.tally.skills + 1)
    return (
        bank.position,
        bank.stats(),
        [bank.get(i) for i in ids],
        {t: bank.skills(t) for t in bank.tasks()},
        bank._ledger.tally.iteration,
    )


def test_insert_gives_ids_in_order_and_get_returns_them(make_skill):
    bank = SkillBank()
    assert bank.insert([make_skill("a", reward=0.25), make_skill("b", task_id="t2")], 0) == [1, 2]
    assert bank.insert([make_skill("c")], 1) == [3]
    assert bank.get(1) == make_skill("a", reward=0.25, skill_id=1, mean_reward=0.25)
    assert texts(bank) == ["a", "c"] and bank.tasks() == ["t1", "t2"] and len(bank) == 3
    assert bank.retrieve("t1").skill_id == 1 and bank.retrieve("nowhere") is None
    with pytest.raises(KeyError):
        bank.get(4)


def test_duplicates_are_merged_per_task(make_skill):
    bank = SkillBank()
    assert bank.insert([make_skill("a", reward=0.1), make_skill("a", reward=0.9), make_skill("a", task_id="t2")], 0) == [1, 1, 2]
    skill = bank.get(1)
    assert (skill.sources, skill.source_reward, skill.mean_reward, skill.uses) == (2, 0.1, 0.1, 0)
    assert bank.stats() == {"size": 2, "tasks": 2, "mean_uses": 0, "merged": 1, "dropped": 0}


@pytest.mark.parametrize(
    ("drop", "kept"),
    [("oldest", ["c", "d"]), ("worst", ["a", "d"])],  # b (0.2) falls to c (0.3), then c falls to d (0.3, newer)
)
def test_capacity(make_skill, drop, kept):
    bank = SkillBank(capacity=2, drop=drop)
    new = [make_skill(text, reward=reward) for text, reward in (("a", 0.5), ("b", 0.2), ("c", 0.3), ("d", 0.3))]
    assert bank.insert(new, 0) == [1, 2, 3, 4]
    assert texts(bank) == kept
    assert bank.stats()["dropped"] == 2 and bank.get(2).golden_workflow == "b."


def test_worst_may_be_the_newcomer_and_other_tasks_are_untouched(make_skill):
    bank = SkillBank(capacity=1, drop="worst")
    bank.insert([make_skill("a", reward=0.5), make_skill("x", task_id="t2"), make_skill("b", reward=0.4)], 0)
    assert texts(bank) == ["a"] and texts(bank, "t2") == ["x"]
    # What was dropped is new again.
    assert bank.insert([make_skill("b", reward=0.6)], 1) == [4] and texts(bank) == ["b"]


def test_booking(make_skill):
    means = {}
    for booking in ("source", "next_visit", "gap"):
        bank = SkillBank(booking=booking)
        bank.insert([make_skill("a", reward=0.5)], 0)
        means[booking] = [bank.get(1).mean_reward]
        for reward, gap in ((1.0, -0.25), (0.25, 0.75)):
            bank.record_use(1, 1, reward=reward, gap=gap)
            means[booking].append(bank.get(1).mean_reward)
        assert bank.get(1).uses == 2
    assert means == {"source": [0.5, 0.5, 0.5], "next_visit": [0.5, 1.0, 0.625], "gap": [0.0, -0.25, 0.25]}


def test_use_of_a_dropped_skill_is_booked(make_skill):
    bank = SkillBank(capacity=1, drop="oldest")
    bank.insert([make_skill("a"), make_skill("b")], 0)
    bank.record_use(1, 1)
    assert bank.get(1).uses == 1 and bank.stats()["mean_uses"] == 0


@pytest.mark.parametrize("settings", [{"capacity": 0}, {"drop": "best"}, {"booking": "none"}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SkillBank(**settings)


def test_bad_calls_change_nothing(make_skill):
    bank = SkillBank(booking="gap")
    bank.insert([make_skill("a")], 5)
    before = state(bank)
    for error, told, call in (
        (ValueError, "source_reward must be finite", lambda: bank.insert([make_skill("b"), make_skill("c", reward=float("nan"))], 5)),
        (ValueError, "needs a task_id", lambda: bank.insert([make_skill("b"), Skill("a", "b", "c")], 5)),
        (ValueError, r"iteration 4 lies before the bank's last event \(5\)", lambda: bank.insert([make_skill("b")], 4)),
        (KeyError, "no skill 2", lambda: bank.record_use(2, 5, gap=0.0)),
        (ValueError, "booking 'gap' needs gap=", lambda: bank.record_use(1, 5, reward=0.0)),
        (ValueError, "gap must be finite", lambda: bank.record_use(1, 5, gap=float("inf"))),
        (ValueError, "iteration 4 lies before", lambda: bank.record_use(1, 4, gap=1.0)),
        (ValueError, "does not belong", lambda: bank.cut(3, expect=1)),
        (UnicodeEncodeError, "surrogates", lambda: bank.insert([make_skill("b"), make_skill("c", task_id="\ud800")], 5)),
    ):
        with pytest.raises(error, match=told):
            call()
        assert state(bank) == before
    with pytest.raises(ValueError, match="booking 'next_visit' needs reward="):
        next_visit = SkillBank(booking="next_visit")
        next_visit.record_use(*next_visit.insert([make_skill("a")], 0), 0, gap=1.0)


def test_settings_by_default():
    bank = SkillBank()
    assert (bank.capacity, bank.drop, bank.booking, bank.path) == (8, "worst", "source", None)
    bank.sync()  # nothing to flush


def test_a_negative_zero_is_a_zero(tmp_path, make_skill):
    """SQLite stores it so; a check of the sign would find another row than was written."""
    path = tmp_path / "bank.sqlite"
    with SkillBank(path, booking="gap") as bank:
        bank.insert([make_skill("a", reward=-0.0)], 0)
        bank.record_use(1, 1, gap=-0.0)
    with SkillBank(path, booking="gap") as bank:
        assert str(bank.get(1).mean_reward) == str(bank.get(1).source_reward) == "0.0"
        assert bank.cut(1) == 1 and bank.get(1).uses == 0


def test_cut_brings_back_what_was_dropped(make_skill):
    bank = SkillBank(capacity=1, drop="oldest")
    bank.insert([make_skill("a")], 0)
    position = bank.position
    bank.insert([make_skill("b")], 1)
    assert texts(bank) == ["b"]
    assert bank.cut(1, expect=position) == 2
    assert texts(bank) == ["a"] and bank.insert([make_skill("c")], 1) == [2]
    assert bank.cut(2) == 0


def play(bank, make_skill, seed, start, stop):
    """Random inserts and uses; those of an iteration depend on (seed, iteration) and on the bank's state alone."""
    for iteration in range(start, stop):
        rng = random.Random(f"{seed} {iteration}")
        for task_id in rng.sample(["t1", "t2", "t3"], 2):
            skill = bank.retrieve(task_id)
            if skill is not None:
                bank.record_use(skill.skill_id, iteration, reward=rng.random(), gap=rng.gauss(0, 1))
            new = [make_skill(rng.choice("abcdefgh"), task_id, rng.random(), iteration) for _ in range(rng.randrange(4))]
            bank.insert(new, iteration)


@pytest.mark.parametrize("seed", range(12))
def test_cut_equals_replay_also_across_reopening(tmp_path, make_skill, seed):
    rng = random.Random(seed)
    settings = {
        "capacity": rng.choice([1, 2, 3, None]),
        "drop": rng.choice(["worst", "oldest"]),
        "booking": rng.choice(["source", "next_visit", "gap"]),
    }
    path, cut, end = tmp_path / "bank.sqlite", rng.randrange(0, 20), 20
    whole, short = SkillBank(**settings), SkillBank(**settings)
    play(whole, make_skill, seed, 0, end)
    play(short, make_skill, seed, 0, cut)
    with SkillBank(path, **settings) as bank:
        play(bank, make_skill, seed, 0, end)
        assert state(bank) == state(whole)
    with SkillBank(path, **settings) as bank:
        assert state(bank) == state(whole)
        bank.cut(cut, expect=short.position)
        assert state(bank) == state(short)
    with SkillBank(path, **settings) as bank:
        assert state(bank) == state(short)
        play(bank, make_skill, seed, cut, end)
        assert state(bank) == state(whole)


def rows(bank):
    """All that the file holds."""
    return {table: sorted(bank._ledger._db.execute(f"SELECT * FROM {table}")) for table in ("skill", "event", "state", "task", "tally")}


def test_one_call_sees_what_it_did(make_skill):
    bank = SkillBank(capacity=1, drop="oldest")
    # b drops a, so the second a is new and drops b; the third is its duplicate.
    assert bank.insert([make_skill(text) for text in "abaa"], 0) == [1, 2, 3, 3]
    assert [skill.skill_id for skill in bank.skills("t1")] == [3] and bank.get(3).sources == 2
    assert bank.stats() == {"size": 1, "tasks": 1, "mean_uses": 0, "merged": 1, "dropped": 2} and bank.position == 6
    bank = SkillBank(capacity=1, drop="worst")
    # b is dropped at once, and once more; a is merged into meanwhile.
    assert bank.insert([make_skill(text, reward=reward) for text, reward in (("a", 0.5), ("b", 0.1), ("a", 0.9), ("b", 0.1))], 0) == [
        1,
        2,
        1,
        3,
    ]
    assert texts(bank) == ["a"] and bank.get(1).sources == 2 and bank.get(2).sources == bank.get(3).sources == 1


@pytest.mark.parametrize("hot_rows", [0, 3, 32])
@pytest.mark.parametrize("waiting", [1, 5, 1024])
@pytest.mark.parametrize("capacity", [1, 4, None])
def test_many_in_one_call_are_as_many_calls(tmp_path, make_skill, monkeypatch, capacity, waiting, hot_rows):
    """To the last row of the file, and so is what a cut leaves, whether rows wait for each other and how many a task has."""
    rng, settings = random.Random(capacity), {"capacity": capacity, "booking": "next_visit"}
    one, many = SkillBank(tmp_path / "one.sqlite", **settings), SkillBank(tmp_path / "many.sqlite", **settings)
    kept = []
    for iteration in range(8):
        new = [make_skill(rng.choice("abcdefgh"), rng.choice(["t1", "t2"]), rng.random(), iteration) for _ in range(20)]
        used, reward = rng.randint(1, one._ledger.tally.skills) if iteration else None, rng.random()
        for bank in (one, many):
            if used is not None:
                bank.record_use(used, iteration, reward=reward)
        ids = [one.insert([skill], iteration)[0] for skill in new]
        with monkeypatch.context() as patched:
            patched.setattr(ledger, "_MOST_WAITING", waiting)
            patched.setattr(ledger, "_HOT_ROWS", hot_rows)
            assert many.insert(new, iteration) == ids
        assert rows(many) == rows(one) and state(many) == state(one)
        kept.append(rows(one))
    assert one.stats()["merged"] > 9 and (capacity is None or one.stats()["dropped"] > 9)
    monkeypatch.setattr(ledger, "_MOST_WAITING", waiting)
    for iteration in (5, 2):
        many.cut(iteration)
        assert rows(many) == kept[iteration - 1]


@pytest.mark.parametrize("waiting", [1, 3, 1024])
def test_an_error_in_the_middle_of_a_call_leaves_no_trace(make_skill, monkeypatch, waiting):
    monkeypatch.setattr(ledger, "_MOST_WAITING", waiting)
    bank = SkillBank(capacity=2)
    bank.insert([make_skill(text, task_id, 0.5) for text in "abc" for task_id in ("t1", "t2")], 0)
    before, held = rows(bank), state(bank)
    new = [make_skill(text, task_id, 0.9, 1) for text in "adea" for task_id in ("t1", "t3", "t2")]
    for late in (make_skill("f", "\ud800"), make_skill("f", iteration=2**63)):  # SQLite refuses the task, the row the number
        with pytest.raises((UnicodeEncodeError, struct.error)):
            bank.insert([*new, late], 1)
        assert (rows(bank), state(bank)) == (before, held)
    with pytest.raises(RuntimeError), bank._ledger.transaction():
        bank._ledger.append("use", 1, bank._ledger.live("t1")[0])
        bank._ledger.settle()
        assert {skill.uses for skill in bank.skills("t1")} == {0, 1}
        raise RuntimeError
    assert (rows(bank), state(bank)) == (before, held)
    other = SkillBank(capacity=2)
    other.insert([make_skill(text, task_id, 0.5) for text in "abc" for task_id in ("t1", "t2")], 0)
    assert bank.insert(new, 1) == other.insert(new, 1) and rows(bank) == rows(other)


def test_what_was_read_last_of_a_few_tasks_is_kept(make_skill, monkeypatch):
    monkeypatch.setattr(ledger, "_HOT_TASKS", 3)
    bank, asked = SkillBank(capacity=None), []
    bank.insert([make_skill(f"{k}", f"t{i}") for i, n in enumerate([1, 1, 32, 1, 33]) for k in range(n)], 0)
    bank._ledger._db.set_trace_callback(asked.append)

    def reads(task_id):
        asked.clear()
        bank.retrieve(task_id)
        return sum("FROM state" in statement for statement in asked)

    assert [reads(t) for t in ("t0", "t0", "t1", "t2", "t2", "t0")] == [1, 0, 1, 1, 0, 0]
    assert [reads(t) for t in ("t3", "t3", "t0")] == [1, 0, 1]  # a fourth: all are forgotten
    assert reads("t4") == reads("t4") == 1  # it has too many
    bank.record_use(1, 0)
    assert reads("t0") == 1
    with pytest.raises(ValueError, match="skill 99 was never inserted"):
        bank._ledger.state(99)


def test_what_waits_can_be_undone(make_skill):
    """Within a transaction: nothing of it is in the file yet."""
    ledger = SkillBank()._ledger
    with ledger.transaction():
        ledger.append("insert", 0, make_skill("a"))
        ledger.undo()
        ledger.append("insert", 0, make_skill("b"))
    assert ledger.tally.seq == 1 and ledger.skill(1).golden_workflow == "b."


def test_an_event_that_is_none(make_skill):
    ledger = SkillBank()._ledger
    with pytest.raises(ValueError, match="unknown kind 'use'"), ledger.transaction():
        ledger.append("use", 0, make_skill("a"))
    assert ledger.tally.seq == 0


def test_the_log(make_skill):
    """Also within a transaction, and never with a hole at its end."""
    bank = SkillBank()
    assert list(bank.events()) == []
    with bank._ledger.transaction():
        bank._ledger.append("insert", 0, make_skill("a"))
        assert [(e.seq, e.kind) for e in bank.events()] == [(1, "insert")]
    bank._ledger._db.execute("DELETE FROM event")
    with pytest.raises(ValueError, match="rows of its table 'event' are missing"):
        list(bank.events())
