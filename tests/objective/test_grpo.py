"""GRPO's clipped loss and its advantages, by hand."""

from __future__ import annotations

import itertools
import math
import random
from statistics import mean, stdev

import pytest
import torch

from skillsd.objective import (
    clipped_policy_loss,
    float32_rewards,
    group_advantages,
)


def scalar_loss(logp: float, old: float, advantage: float) -> tuple[float, bool]:
    """-min(r A, clip(r, 0.8, 1.28) A), case by case."""
    r = math.exp(logp - old)
    if advantage > 0:
        return (-1.28 * advantage, True) if r > 1.28 else (-r * advantage, False)
    return (-0.8 * advantage, True) if r < 0.8 else (-r * advantage, False)


def test_clipped_loss_by_hand():
    rng = random.Random(1)
    cases = [(rng.uniform(-3, 0), rng.uniform(-3, 0), rng.uniform(-2, 2)) for _ in range(400)]
    seen = {(a > 0, (lp - old > math.log(1.28)), (lp - old < math.log(0.8))) for lp, old, a in cases}
    assert len(seen) == 6  # both signs with the ratio above, below and within the bounds
    logp, old, adv = torch.tensor(cases, dtype=torch.float64).T
    logp = logp.clone().requires_grad_()
    loss, clipped = clipped_policy_loss(logp, old, adv)
    want = [scalar_loss(*c) for c in cases]
    torch.testing.assert_close(loss, torch.tensor([w for w, _ in want], dtype=torch.float64))
    assert clipped.tolist() == [c for _, c in want]
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    free = [0.0 if c else -math.exp(lp - o) * a for (lp, o, a), (_, c) in zip(cases, want, strict=True)]
    torch.testing.assert_close(grad, torch.tensor(free, dtype=torch.float64))


def test_group_advantages_by_hand():
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(5, 4, generator=g, dtype=torch.float64)
    want = [[(r - mean(row)) / (stdev(row) + 1e-8) for r in row] for row in rewards.tolist()]
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 0.7])
def test_equal_rewards_have_no_advantage(reward):
    assert group_advantages(torch.full((2, 7), reward)).eq(0).all()


@pytest.mark.parametrize("size", range(2, 9))
def test_usual_rewards_are_float32_as_they_are(size):
    """Their advantages are those of the recorded runs to the bit."""
    for values in ((0.0, 1.0), (0.0, 1 / 3, 2 / 3, 1.0), (-3.0, 0.1, 7.5)):
        rewards = list(itertools.islice(itertools.product(values, repeat=size), 5000))
        want = group_advantages(torch.tensor(rewards))
        assert group_advantages(float32_rewards(torch.tensor(rewards, dtype=torch.float64))).equal(want)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e8, -1e12])
@pytest.mark.parametrize("step", [1.0, 0.1])
def test_rewards_far_from_zero_keep_their_differences(offset, step):
    rewards = torch.tensor([[offset, offset + step, offset, offset], [offset] * 4], dtype=torch.float64)
    got, want = group_advantages(float32_rewards(rewards)), group_advantages(torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0] * 4]))
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-6)  # of 0.1 float64 keeps three digits beside 1e12
    assert got[1].eq(0).all()


def test_rewards_that_differ_by_rounding_are_equal():
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3], [1e16, 1e16 + 2, 1e16]], dtype=torch.float64)
    assert (rewards[:, :1] != rewards).any(-1).all() and group_advantages(float32_rewards(rewards)).eq(0).all()
    huge = torch.tensor([[1e37, -1e37, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(float32_rewards(huge)), torch.tensor([[1.0, -1.0, 0.0]]))


def test_which_rewards_are_measured_from_the_smallest():
    """Those of more than 1,024 times their spread; equal are those that differ by 2^-48 of their size or less. Each group by itself."""
    as_they_are = [[100.0, 101.0], [2000.0, 2002.0], [1023.0, 1024.0], [0.0, -3.0]]
    from_the_smallest = [[1024.0, 1025.0], [-2000.0, -2001.0], [1.0 - 2**-47, 1.0], [1.0 - 2**-48, 1.0], [2.5, 2.5]]
    want = [*as_they_are, [0.0, 1.0], [1.0, 0.0], [0.0, 2**-47], [0.0, 0.0], [0.0, 0.0]]
    found = float32_rewards(torch.tensor([*as_they_are, *from_the_smallest], dtype=torch.float64))
    assert found.tolist() == want and found.dtype == torch.float32


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match=r"data\.group_size"):
        group_advantages(torch.ones(3, 1))
