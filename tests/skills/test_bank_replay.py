"""The bank against plain dictionaries that are replayed from the start: every answer, to the bit, whatever was cut, reopened or failed."""

import random

import pytest
from tests.skills.replay import ReplayedBank

from skillsd.skills import SkillBank

TASKS = ("t1", "t2", "t3")


def answers(bank, n):
    """All that can be asked of a bank with `n` skills, in words that tell 0.0 from -0.0."""
    return repr(
        (
            bank.position, len(bank), {k: float(v) for k, v in bank.stats().items()}, bank.tasks(), [bank.get(i) for i in range(1, n + 1)],
            [(bank.skills(t), bank.retrieve(t)) for t in (*TASKS, "nowhere")],
        )
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(16))
def test_as_if_replayed(tmp_path, make_skill, seed):
    rng = random.Random(seed)
    booking, path = rng.choice(["source", "next_visit", "gap"]), tmp_path / "bank.sqlite"
    settings = {"capacity": rng.choice([1, 2, 5, None]), "drop": rng.choice(["worst", "oldest"]), "booking": booking}
    told, bank, iteration, cuts = ReplayedBank(**settings), SkillBank(path, **settings), 0, 0
    for _ in range(150):
        chance = rng.random()
        n = len(told.skills_)
        if chance < 0.5:
            new = [
                make_skill(rng.choice("abcdefgh"), rng.choice(TASKS), rng.choice([-0.0, 0.1, rng.random()]), iteration)
                for _ in range(rng.randrange(5))
            ]
            assert bank.insert(new, iteration) == told.insert(new, iteration)
        elif chance < 0.8 and n:
            use = {"reward": rng.uniform(0, 1), "gap": rng.gauss(0, 1)}
            skill_id = rng.randint(1, n)  # live or dropped
            bank.record_use(skill_id, iteration, **use)
            told.record_use(skill_id, iteration, **use)
        elif chance < 0.85:
            back = max(0, iteration - rng.randrange(6))
            before = bank.position
            told.cut(back)
            assert bank.cut(back, expect=told.position) == before - told.position
            iteration, cuts = max(told.iteration, back), cuts + 1
        elif chance < 0.9:
            bank.close()
            bank = SkillBank(path, **settings)
        elif chance < 0.95:
            with pytest.raises(UnicodeEncodeError):
                bank.insert([make_skill("new"), make_skill("a", TASKS[0]), make_skill("b", "\ud800")], iteration)
        iteration += rng.random() < 0.5
        assert answers(bank, len(told.skills_)) == answers(told, len(told.skills_))
    with SkillBank(path, read_only=True) as view:
        assert answers(view, len(told.skills_)) == answers(told, len(told.skills_))
    bank.close()
    assert cuts
    with SkillBank(path, **settings) as bank:
        bank.cut(0, expect=0)
        assert answers(bank, 0) == answers(ReplayedBank(**settings), 0)
