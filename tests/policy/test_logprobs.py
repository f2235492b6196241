"""Log-probs in chunks against log_softmax of the model's own logits."""

import pytest
import torch
from tests.tolerance import ROUNDING, close

from skillsd.policy.logprobs import Head, compare, selected_logprobs


def reference(policy, ids, temperature):
    """log_softmax of `model.forward`, and the entropy of it."""
    logp = (policy.base(input_ids=ids[:, :-1]).logits.float() / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, ids[:, 1:, None]).squeeze(-1).flatten(), entropy.flatten()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "mistral"])
def test_equals_the_models_own(make_policy, architecture, temperature):
    """Values, entropies and gradients, for any chunk size; gemma2 caps its logits."""
    policy = make_policy(architecture)
    params = policy.student_parameters()
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    weight = torch.randn(24, generator=torch.Generator().manual_seed(1))
    want, want_entropy = reference(policy, ids, temperature)
    want_grad = torch.autograd.grad((weight * want).sum(), params)
    for chunk in (1, 5, 24, 1000):
        hidden = policy.backbone(input_ids=ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        got, entropy = selected_logprobs(policy.head, hidden, ids[:, 1:].flatten(), temperature, chunk)
        close(got, want)
        close(entropy, want_entropy)
        assert not entropy.requires_grad
        for a, b in zip(torch.autograd.grad((weight * got).sum(), params), want_grad, strict=True):
            torch.testing.assert_close(a, b, atol=ROUNDING, rtol=1e-4)


def test_the_head_never_sees_more_than_a_chunk(make_policy):
    """Neither forward nor when the backward pass recomputes it."""
    policy = make_policy()
    seen = []

    def head(hidden):
        seen.append(len(hidden))
        return policy.head(hidden)

    hidden = torch.randn(50, 32, requires_grad=True)
    logp, _ = selected_logprobs(head, hidden, torch.arange(50), chunk=8)
    assert seen == [8] * 6 + [2]
    logp.sum().backward()
    assert max(seen) == 8 and sum(seen) == 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_comparing_in_chunks(dtype, temperature):
    """Values and gradients of the whole, one chunk at a time: student and teacher forward, and both again backward."""
    torch.manual_seed(0)
    linear, seen = torch.nn.Linear(8, 20, dtype=dtype), []
    student, teacher = torch.randn(2, 23, 8, dtype=dtype, requires_grad=True).unbind()
    weight = torch.randn(23, dtype=dtype)

    def head(hidden):
        seen.append(len(hidden))
        return linear(hidden)

    def forward_kl(s, t):
        return (t.exp() * (t - s)).sum(-1)

    s, t = (linear(x).div(temperature).log_softmax(-1) for x in (student, teacher.detach()))
    want = forward_kl(s, t.detach())
    want_grad = torch.autograd.grad((weight * want).sum(), student)[0]
    for chunk in (1, 5, 23, 100):
        seen.clear()
        got = compare(head, student, teacher, forward_kl, temperature, chunk)
        sizes = [min(chunk, 23 - i) for i in range(0, 23, chunk)]
        assert seen == [n for n in sizes for _ in range(2)]
        grads = torch.autograd.grad((weight * got).sum(), [student, teacher], allow_unused=True)
        assert max(seen) == sizes[0] and sum(seen) == 23 * (4 if chunk < 23 else 2)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads[0], want_grad)
        assert grads[1] is None and got.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(compare(head, student, teacher, forward_kl, temperature, 5), want)
    assert compare(head, student[:0], teacher[:0], forward_kl).shape == (0,)


def test_nothing_to_score(make_policy):
    logp, entropy = selected_logprobs(make_policy().head, torch.empty(0, 32, requires_grad=True), torch.empty(0, dtype=torch.int64))
    assert logp.shape == entropy.shape == (0,) and logp.requires_grad and not entropy.requires_grad


def test_an_adapter_on_the_head_counts(make_policy):
    policy = make_policy("llama", lora={"targets": ["q_proj", "lm_head"]})
    ids = torch.randint(5, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    hidden = policy.backbone(input_ids=ids).last_hidden_state
    torch.testing.assert_close(policy.head(hidden), policy.base(input_ids=ids).logits)
    with policy.acting(None):
        assert not torch.allclose(policy.head(hidden), Head(policy.base)(hidden) + 1)
        plain = policy.head(hidden)
    assert not torch.allclose(policy.head(hidden), plain)
