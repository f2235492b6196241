"""UCB scores by hand, and which skill they select."""

import itertools
import math
from dataclasses import replace

import pytest

from skillsd.skills import select, ucb_score
from skillsd.skills.retrieval import scores


@pytest.mark.parametrize(
    ("mean", "n", "total", "c", "score"),
    [
        (0.5, 1, 1, math.sqrt(2), 0.5),  # ln 1 = 0
        (0.5, 2, 8, math.sqrt(2), 0.5 + 1.4420268),  # sqrt(2 * 2.0794415 / 2) = sqrt(2.0794415)
        (0.0, 4, 10, 1.0, 0.7587136),  # sqrt(2.3025851 / 4)
        (0.25, 3, 9, 0.0, 0.25),
    ],
)
def test_a_score_is_the_one_worked_out_by_hand(mean, n, total, c, score):
    assert ucb_score(mean, n, total, c) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(("n", "total"), [(0, 3), (4, 3)])
def test_score_refuses_impossible_counts(n, total):
    with pytest.raises(ValueError, match="n_uses"):
        ucb_score(0.0, n, total)


def test_no_skills_select_none():
    assert select([]) is None


def test_unused_first_by_reward_then_newest_then_id(make_skill):
    skills = [
        make_skill("used", reward=1.0, skill_id=1, uses=1, mean_reward=9.0),
        make_skill("low", reward=0.1, iteration=9, skill_id=2),
        make_skill("old", reward=0.5, iteration=1, skill_id=3),
        make_skill("new", reward=0.5, iteration=2, skill_id=4),
        make_skill("new, later id", reward=0.5, iteration=2, skill_id=5),
    ]
    order = []
    while skills:
        order.append(select(skills).skill_id)
        skills = [skill for skill in skills if skill.skill_id != order[-1]]
    assert order == [4, 5, 3, 2, 1]


def test_all_used_takes_the_highest_bound(make_skill):
    # N = 11: 0.9 + 1.414 * sqrt(2.398 / 10) = 1.593;  0.2 + 1.414 * sqrt(2.398 / 1) = 2.390
    often = make_skill("often", skill_id=1, uses=10, mean_reward=0.9)
    once = make_skill("once", skill_id=2, uses=1, mean_reward=0.2)
    assert select([often, once]) is once
    assert select([often, once], c=0.1) is often


def test_ties_do_not_depend_on_the_order(make_skill):
    skills = [make_skill(str(i), iteration=i // 2, skill_id=i, uses=2, mean_reward=0.5) for i in (1, 2, 3)]
    assert {select(order).skill_id for order in itertools.permutations(skills)} == {2}
    fresh = [replace(skill, uses=0) for skill in skills]
    assert {select(order).skill_id for order in itertools.permutations(fresh)} == {2}


def test_an_unused_skill_may_count_as_used_once(make_skill):
    """N = 4 + 1 + 1: the failed one is not forced on the teacher; with enough exploration it gets its turn."""
    good = make_skill("good", reward=1.0, skill_id=1, uses=4, mean_reward=1.0)
    failed = make_skill("failed", reward=0.0, skill_id=2, uses=0)
    fair = make_skill("fair", reward=0.5, skill_id=3, uses=0, mean_reward=0.5)
    assert select([good, failed, fair]) is fair  # the paper's rule
    assert select([good, failed, fair], c=0.0, unused_first=False) is good
    # ln 6 = 1.792: good 1 + c * 0.669, fair 0.5 + c * 1.339, failed c * 1.339: fair from c = 0.747 on
    assert select([good, failed, fair], c=0.74, unused_first=False) is good
    assert select([good, failed, fair], c=0.76, unused_first=False) is fair


def test_scores_are_ucb_and_infinite_for_an_unused_skill(make_skill):
    skills = [
        make_skill("often", skill_id=1, uses=3, mean_reward=0.5),
        make_skill("once", skill_id=2, uses=1, mean_reward=0.0),
        make_skill("never", skill_id=3, mean_reward=0.25),
    ]
    assert scores(skills, 1.0) == [ucb_score(0.5, 3, 4, 1.0), ucb_score(0.0, 1, 4, 1.0), math.inf]
    assert scores(skills, 1.0, False) == [ucb_score(0.5, 3, 5, 1.0), ucb_score(0.0, 1, 5, 1.0), ucb_score(0.25, 1, 5, 1.0)]
    assert scores([]) == []
