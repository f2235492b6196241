"""The noise as vLLM's logits processor: rows that move in vLLM's batch, and the draws of the default engine."""

import math
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch

from skillsd.engines import vllm_noise
from skillsd.engines.noise import sample, uniforms
from skillsd.engines.vllm_noise import MIN_LOGPROB, Draw, Noise

Direction = Enum("Direction", "UNIDIRECTIONAL SWAP")


def params(key, temperature=1.0, position=None):
    """A request's, as vLLM hands on its vllm_xargs."""
    args = {"skillsd_key": str(key), "skillsd_position": 10 * key if position is None else position, "skillsd_temperature": temperature}
    return SimpleNamespace(extra_args=args)


def update(removed=(), added=(), moved=()):
    return SimpleNamespace(removed=removed, added=added, moved=moved)


def test_rows_of_a_batch_that_move():
    """Filled slots are not among the removed, a resumed row has another list, and tokens may not be known yet (-1)."""

    def sits():
        return {i: (d.key, d.position + len(d.sampled)) for i, d in noise.rows.items()}

    noise, sampled = Noise(), [[] for _ in range(6)]
    noise.update_state(update(added=[(i, params(i), None, sampled[i]) for i in range(3)]))
    sampled[0] += [7, -1]
    noise.update_state(None)
    assert sits() == {0: (0, 2), 1: (1, 10), 2: (2, 20)}
    noise.update_state(update(added=[(1, params(4), None, sampled[4])]))
    assert sits() == {0: (0, 2), 1: (4, 40), 2: (2, 20)}
    noise.update_state(update(moved=[(2, 0, Direction.UNIDIRECTIONAL)]))
    assert sits() == {0: (2, 20), 1: (4, 40)}
    noise.update_state(update(removed=[0], added=[(2, params(5, 0.0), None, [1, 2, 3])], moved=[(1, 0, Direction.SWAP)]))
    assert sits() == {0: (4, 40), 2: (5, 53)}
    noise.update_state(update(added=[(1, SimpleNamespace(extra_args=None), None, [])]))
    given = torch.randn(3, 11)
    out = noise.apply(given.clone())
    for i, temperature, key, position in ((0, 1.0, 4, 40), (2, 0.0, 5, 53)):
        ids, logp = sample(given[i : i + 1], uniforms(torch.tensor([key]), torch.tensor([position])), temperature)
        assert out[i].argmax() == ids and out[i].max() == logp and out[i].isfinite().sum() == 1
    assert torch.equal(out[1], given[1]), "somebody else's row"


def test_a_key_of_64_bits_and_a_log_prob_that_is_nan():
    """The key comes as text and keeps all its bits; nan, which JSON has not, is the smallest log-prob that a server reports."""
    key, noise, given = -(2**63) + 5, Noise(), torch.randn(1, 11)
    noise.update_state(update(added=[(0, params(key, 0.5, 3), None, [1, 2])]))
    ids, _ = sample(given, uniforms(torch.tensor([key]), torch.tensor([5])), 0.5)
    assert noise.rows[0].key == key and noise.apply(given.clone())[0].argmax() == ids
    broken = noise.apply(given * math.nan)
    assert broken.max() == MIN_LOGPROB and broken.isfinite().sum() == 1


def test_vllm_finds_the_processor_by_its_name(monkeypatch):
    """It is a class of vLLM's own kind where vLLM is; this file is read without it."""
    base, module = type("LogitsProcessor", (), {}), ModuleType("vllm.v1.sample.logits_processor")
    module.LogitsProcessor = base
    for name in ("vllm", "vllm.v1", "vllm.v1.sample"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    made = vllm_noise.NoiseProcessor
    assert issubclass(made, Noise) and issubclass(made, base)
    with pytest.raises(AttributeError, match="no attribute Nothing"):
        vllm_noise.Nothing  # noqa: B018


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_waits_for_nothing():
    """On a GPU nothing in it waits for what has been launched, and the draws are those of the CPU."""
    given, noise = torch.randn(5, 9000, generator=torch.Generator().manual_seed(0)), Noise()
    noise.rows = {i: Draw(i, 3, 0.5 * (i % 2), [1, 2]) for i in (0, 1, 3, 4)}
    here, there = noise.apply(given.clone()), given.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        noise.apply(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(there.cpu(), here)
