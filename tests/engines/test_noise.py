"""The counter-based noise and the draw made from it."""

import math

import pytest
import torch

from skillsd.engines.noise import _inverse_cdf, sample, stream_key, uniforms

M = (1 << 64) - 1


def splitmix64(key: int, position: int) -> float:
    """The same in Python integers."""
    x = (key + (position + 1) * 0x9E3779B97F4A7C15) & M
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53


def test_golden_values():
    # The first outputs of splitmix64 seeded with 0 are 0xe220a8397b1dcdaf, 0x6e789e6aa1b965f4.
    got = uniforms(torch.tensor([0, 0]), torch.tensor([0, 1])).tolist()
    assert got == [(0xE220A8397B1DCDAF >> 11) * 2.0**-53, (0x6E789E6AA1B965F4 >> 11) * 2.0**-53]
    assert stream_key(0, "rollout", 3, "train-0001", 2) == -9131897898973660641
    assert stream_key(1, 11) != stream_key(11, 1)


def test_equals_python_splitmix64():
    keys = [0, 1, -1, 2**63 - 1, -(2**63), *(stream_key(i) for i in range(200))]
    for position in (0, 1, 17, 20480):
        got = uniforms(torch.tensor(keys), torch.full((len(keys),), position)).tolist()
        assert got == [splitmix64(k & M, position) for k in keys]


def test_uniform_and_independent():
    n = 100_000
    by_position = uniforms(torch.full((n,), stream_key("a")), torch.arange(n))
    by_key = uniforms(torch.tensor([stream_key(i) for i in range(n)]), torch.zeros(n, dtype=torch.int64))
    for u in (by_position, by_key):
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n)
        assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
        steps = torch.arange(1, n + 1, dtype=torch.float64) / n
        assert (u.sort().values - steps).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, p = 0.001
        for lag in (1, 2, 3):
            pair = torch.stack([u[:-lag], u[lag:]])
            assert abs(torch.corrcoef(pair)[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    n, logits = 200_000, torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, -30.0, 0.3])
    u = uniforms(torch.full((n,), stream_key("chi")), torch.arange(n))
    ids, logp = sample(logits.expand(n, -1), u, temperature)
    p = (logits / temperature).softmax(-1).double()
    expected, seen = p * n, torch.bincount(ids, minlength=7)
    likely = expected > 5
    chi2 = ((seen - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi2 < 22.5  # p = 0.001 with at most 6 degrees of freedom
    torch.testing.assert_close(logp, p.log().float()[ids])


def test_greedy_is_argmax():
    logits = torch.randn(50, 31, generator=torch.Generator().manual_seed(0))
    ids, logp = sample(logits, torch.rand(50).double(), 0.0)
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logp, logits.log_softmax(-1).max(-1).values)


@pytest.mark.parametrize("vocabulary", [64, 9000])
def test_never_an_id_of_probability_zero(vocabulary):
    top = 1 - 2.0**-53  # the largest number that `uniforms` returns
    for seed in range(200):
        logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * 5
        dead = torch.rand(vocabulary, generator=torch.Generator().manual_seed(seed + 1)) < 0.5
        dead[0] = dead[-1] = True
        dead[2000:3500] = True
        logits[:, dead] = -torch.inf
        for u in (0.0, 0.5, top):
            ids, logp = sample(logits, torch.tensor([u], dtype=torch.float64), 1.0)
            assert not dead[ids[0]] and logp.isfinite().all()


def test_two_levels_draw_what_one_does():
    """The vocabulary is large; on the boundary between two tokens rounding may decide otherwise, which nobody meets by chance."""
    g = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(1000, 9001, generator=g) * 4, -1)
    u = torch.rand(1000, 1, generator=g, dtype=torch.float64)
    cdf = p.double().cumsum(-1)
    assert torch.equal(_inverse_cdf(p, u), torch.searchsorted(cdf, u * cdf[:, -1:], right=True).squeeze(-1))


@pytest.mark.parametrize("vocabulary", [64, 9000])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_distribution_have_a_log_prob_that_shows_it(vocabulary, temperature, bad):
    """And disturb no other row."""
    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0))
    u = torch.tensor([0.1, 0.0, 1 - 2.0**-53, 0.9], dtype=torch.float64)
    want = sample(logits, u, temperature)
    logits[1] = bad
    logits[2, vocabulary // 2 if bad != -torch.inf else slice(None)] = bad
    ids, logp = sample(logits, u, temperature)
    assert logp.isfinite().tolist() == [True, False, False, True] and ((ids >= 0) & (ids < vocabulary)).all()
    for got, was in zip((ids, logp), want, strict=True):
        assert torch.equal(got[[0, 3]], was[[0, 3]])
