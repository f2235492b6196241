"""4-bit NormalFloat through bitsandbytes, on a CPU."""

import bitsandbytes
import pytest
import torch

from skillsd.engines.engine import Request
from skillsd.engines.in_process import InProcessEngine
from skillsd.policy import TokenSequence

ROW = [TokenSequence([5, 6, 7, 8], [9, 10, 11, 12, 13], [True, True, False, True, True])]


@pytest.fixture
def policy(make_policy):
    return make_policy("qwen3", quantise="nf4")


def gradient(policy):
    logp = policy.score("student", ROW).logp
    return torch.autograd.grad(logp.sum(), policy.student_parameters())


def test_the_base_is_quantised(policy):
    linear = [m for m in policy.base.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linear) == 2 * 7 and {m.weight.quant_type for m in linear} == {"nf4"}
    assert policy.base.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in policy.adapter("student").values())


def test_a_rollout_does_not_spoil_gradients(policy):
    """bitsandbytes may re-pack weights in an eval-mode forward, after which gradients are wrong without a word."""
    guarded = [m for m in policy.base.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert guarded and not any(m.support_avx512bf16_for_cpu for m in guarded)
    before = gradient(policy)
    InProcessEngine(policy).open(1.0).turn([Request(0, [5, 6, 7], 0, 0, 5)])
    with torch.no_grad():
        policy.score("student", ROW)
        policy.base(input_ids=torch.arange(5, 20)[None])
    assert max(g.abs().max() for g in before) > 0
    for a, b in zip(gradient(policy), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_recorded_log_probs_in_bfloat16(make_policy, quantise):
    """One token at a time and all at once round differently in bf16 (8 bits): within 0.15 nats a token, 0.02 on average."""
    policy = make_policy(quantise=quantise, dtype="bfloat16")
    prompts = [[5 + (7 * i + j) % 50 for j in range(3 + i)] for i in range(16)]
    out = InProcessEngine(policy).open(1.0).turn([Request(i, p, i, 0, 24) for i, p in enumerate(prompts)])
    rows = [TokenSequence(p, c.token_ids, [True] * len(c.token_ids)) for p, c in zip(prompts, out, strict=True)]
    with torch.no_grad():
        scored = policy.score("student", rows).logp
    gaps = torch.cat([(torch.tensor(c.logprobs) - s[: len(c.logprobs)]).abs() for c, s in zip(out, scored, strict=True)])
    assert gaps.max() < 0.15 and gaps.mean() < 0.02
