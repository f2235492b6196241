"""The model on paper: what it says of one rank is what was measured, and of more ranks what can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from benchmarks.scaling_paper import Links, Work, expected_maximum, longest, predict, straggler

WORK = Work(
    rollout_s=5.0, update_s=8.0, tokens=1000, rows=64, spread=0.0, longest=math.inf, bytes_per_token=10, pickle_s=1e-4, unpickle_s=2e-4,
    gradient_bytes=100, leader_s=0.5, step_s=0.25, fixed_s=1.0,
)  # fmt: skip
LINKS = Links(gather=1e4, reduce=50)


def test_one_rank_is_the_sum_of_what_was_measured():
    p = predict(replace(WORK, spread=0.5, noise=0.1), LINKS, 1)
    assert p.seconds == 5 + 8 + 0.5 + 0.25 + 1
    assert (p.gather, p.reduce) == (0, 0)
    assert p.rates() == {"rollout": 200, "learner": pytest.approx(1000 / 8.25), "iteration": pytest.approx(1000 / 14.75)}


def test_four_ranks_by_hand():
    p = predict(WORK, LINKS, 4)
    assert p.gather == pytest.approx(0.1 + 4 * 0.2 + 3 * 10_000 / 1e4)
    assert p.reduce == pytest.approx(2 * 3 / 4 * 100 / 50)
    assert (p.rollout, p.update, p.leader, p.step, p.fixed, p.tokens) == (5, 8, 2, 0.25, 1, 4000)


@pytest.mark.parametrize("n", [1, 2, 8, 64, 4096])
def test_expected_maximum(n):
    drawn = np.random.default_rng(0).standard_normal((4000, n) if n <= 64 else (1000, n)).max(1)
    assert expected_maximum(n) == pytest.approx(drawn.mean(), abs=5 * drawn.std() / math.sqrt(len(drawn)))
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi))


def test_a_limit_of_turns_ends_the_wait_for_the_longest():
    free = replace(WORK, spread=0.5)
    assert straggler(free, 1) == 1 < straggler(free, 2) < straggler(free, 64)
    assert longest(64, 0.5, 1.5) == 1.5 and straggler(replace(free, longest=1.5), 64) == 1
    assert straggler(replace(WORK, noise=0.1), 2) == pytest.approx(1 + 0.1 / math.sqrt(math.pi))
