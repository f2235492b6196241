"""The learner's forward over packed rows, and its kernels' gradients, against autograd on the plain forward."""

import logging
from contextlib import nullcontext

import pytest
import torch
from tests.conftest import WIDE
from tests.tolerance import ROUNDING

from skillsd.kernels import reference
from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence, micro_batches
from skillsd.policy.logprobs import selected_logprobs
from skillsd.policy.packed import pack
from skillsd.policy.training_kernels import TrainingKernels, blocks

pytest.importorskip("triton")

from skillsd.kernels import training

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
CLOSE = dict(atol=3e-2, rtol=3e-2) if GPU else dict(atol=ROUNDING, rtol=1e-4)
SETTINGS = dict(dtype="bfloat16" if GPU else "float32", device=DEVICE, shape=WIDE)


def normal(*shape, seed=0, scale=1.0, grad=True):
    x = (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, DTYPE)
    return x.requires_grad_(grad)


def rows_of(sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = []
    for p, n in sizes:
        ids = torch.randint(5, 60, (p + n,), generator=g).tolist()
        made.append(TokenSequence(ids[:p], ids[p:], (torch.rand(n, generator=g) < 0.7).tolist()))
    return made


RAGGED = [(3, 9), (7, 1), (1, 4), (5, 12)]


def assert_same_gradients(ours, theirs, given):
    """`ours` and `theirs` map clones of `given` to tensors: values and gradients along a random direction agree."""
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in given]
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        sum((y.float() * normal(*y.shape, seed=9, grad=False).float()).sum() for y in out).backward()
        results.append([*out, *(x.grad for x in leaves if x.requires_grad)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and b.abs().max() > 0.1
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("shape", [(7, 48), (2, 3, 5, 128), (1, 3000)])
def test_rms_norm(shape):
    w = normal(shape[-1], seed=1, grad=False)
    assert_same_gradients(lambda x: training.RmsNorm.apply(x, w, 1e-6), lambda x: reference.rms_norm(x, w, 1e-6), [normal(*shape)])


def test_silu_mul():
    assert_same_gradients(training.SiluMul.apply, reference.silu_mul, [normal(3, 700, scale=3), normal(3, 700, seed=1)])


def test_rotate():
    angle = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(0)).mul(6).repeat(1, 1, 2)
    cos, sin = angle.cos().to(DEVICE, DTYPE), angle.sin().to(DEVICE, DTYPE)
    given = [normal(2, 3, 4, 16), normal(2, 3, 2, 16, seed=1)]

    def turned(function):
        return lambda q, k: function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    assert_same_gradients(turned(training.Rotate.apply), turned(reference.rotate), given)
    strided = normal(2, 3, 16, 4, seed=3, grad=False).transpose(2, 3)  # a gradient whose last dimension is not contiguous
    turn = turned(training.Rotate.apply), turned(reference.rotate)
    a, b = (torch.autograd.grad(f(*given)[0], given[0], strided.transpose(1, 2))[0] for f in turn)
    torch.testing.assert_close(a, b, **CLOSE)
    q, k = turned(training.Rotate.apply)(*given)
    assert q.transpose(1, 2).is_contiguous() and k.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("chunk", [4, 100])
def test_log_probs_of_the_head(chunk):
    weight, targets = normal(700, 24, seed=1, scale=0.3, grad=False), torch.arange(0, 660, 60, device=DEVICE)
    hidden = normal(11, 24)

    def ours(h):
        return training.HeadLogprobs.apply(h, weight, targets, 0.7, chunk)

    def plain(h):
        return selected_logprobs(lambda x: x @ weight.T, h, targets, 0.7, chunk)

    assert_same_gradients(lambda h: ours(h)[0], lambda h: plain(h)[0], [hidden])
    torch.testing.assert_close(ours(hidden)[1], plain(hidden)[1], **CLOSE)
    assert not ours(hidden)[1].requires_grad
    with torch.no_grad():
        torch.testing.assert_close(ours(hidden)[0], plain(hidden)[0], **CLOSE)
    none = training.HeadLogprobs.apply(hidden[:0], weight, targets[:0], 0.7, chunk)
    assert none[0].shape == none[1].shape == (0,)


def test_infinite_logits_are_no_nan():
    logits = torch.full((1, 300), -torch.inf, device=DEVICE)
    logits[0, 290:] = torch.arange(10.0, device=DEVICE)
    logp, entropy = training.choose(logits.clone(), torch.tensor([295], device=DEVICE), 1.0, False)
    p = torch.distributions.Categorical(logits=torch.arange(10.0))
    torch.testing.assert_close(logp.cpu(), p.log_prob(torch.tensor([5])))
    torch.testing.assert_close(entropy.cpu(), p.entropy()[None])


@pytest.mark.parametrize("window", [None, 3])
def test_rows_do_not_see_each_other(window):
    cu_seqlens = torch.tensor([0, 5, 6, 17], dtype=torch.int32, device=DEVICE)
    q, k, v = normal(17, 4, 16), normal(17, 2, 16, seed=1), normal(17, 2, 16, seed=2)
    got = blocks(q, k, v, cu_seqlens, 11, 0.3, window)
    got[:5].float().sum().backward()
    for t in (q, k, v):
        assert not t.grad[5:].any() and t.grad[:5].any()
    where = torch.tensor([[0, 11, 0, 0, 0]], device=DEVICE)
    alone = [t[6:].detach().transpose(0, 1)[None] for t in (q, k, v)]
    torch.testing.assert_close(got[6:][None], reference.attend(*alone, where, window, 0.3), **CLOSE)


def test_packing():
    rows = rows_of(RAGGED)
    p = pack(rows, False, 0, torch.device(DEVICE))
    assert p.ids.tolist() == [[x for r in rows for x in [*r.prompt_ids, *r.token_ids][:-1]]]
    assert p.position_ids.tolist() == [[x for r in rows for x in range(len(r) - 1)]]
    assert p.cu_seqlens.tolist() == [0, 11, 18, 22, 38] and p.cu_seqlens.dtype == torch.int32 and p.max_seqlen == 16
    assert p.targets.tolist() == [x for r in rows for x, a in zip(r.token_ids, r.action_mask, strict=True) if a]
    follows = [*p.ids[0].tolist(), 0]  # a target follows its place, unless it is its row's last token
    inside = [i for i, place in enumerate(p.logits_indices.tolist()) if place + 1 not in p.cu_seqlens.tolist()]
    assert [follows[p.logits_indices[i] + 1] for i in inside] == [p.targets[i] for i in inside] and len(inside) > 10
    padded = pack(rows, True, 0, torch.device(DEVICE))
    assert padded.ids.shape == (4, 16) and padded.cu_seqlens is None and torch.equal(padded.scatter_indices, p.scatter_indices)
    assert torch.equal(padded.ids.flatten()[padded.logits_indices], p.ids[0][p.logits_indices])
    assert pack(rows_of([(3, 4), (5, 2)]), False, 0, torch.device(DEVICE)).cu_seqlens is None, "rows of one length need no cu_seqlens"


def test_micro_batches_without_padding():
    assert micro_batches([5, 3, 9, 2], 10, padded=False) == [[3, 1, 0], [2]]
    assert micro_batches([5, 3, 9, 2], 10) == [[3, 1], [0], [2]]
    assert micro_batches([50, 3], 10, padded=False) == [[1], [0]]


@pytest.fixture
def both(make_policy, monkeypatch):
    """Two policies with equal weights: with what stands in for the learner's modules, on any machine, and without."""

    def make(*args, **kwargs):
        monkeypatch.setattr("skillsd.policy.training_kernels.why_not", lambda device, dtype: "")
        ours = make_policy(*args, **kwargs)
        assert isinstance(ours.training_kernels, TrainingKernels)
        return ours, make_policy(*args, kernels=False, **kwargs)

    return make


SLOW = [pytest.param(a, "nf4", marks=pytest.mark.slow) for a in ("llama", "qwen2")]


@pytest.mark.parametrize(("architecture", "quantise"), [("qwen3", "nf4"), ("qwen3", "none"), ("mistral", "nf4"), ("gemma2", "nf4"), *SLOW])
def test_scores_and_gradients(both, architecture, quantise):
    """Ragged rows, checkpointed: windows (mistral), a soft cap and no packing (gemma2), biases (qwen2), norms of heads (qwen3)."""
    rows = rows_of(RAGGED)
    results = []
    policies = both(architecture, quantise=quantise, gradient_checkpointing=True, **SETTINGS)
    assert policies[0].packs == (architecture != "gemma2") and not policies[1].packs
    for policy in policies:
        with torch.no_grad():
            teacher = policy.score("teacher", rows, 0.8)
        scores = policy.score("student", rows, 0.8)
        (scores.logp * torch.linspace(-1, 1, scores.logp.numel(), device=DEVICE).view(scores.logp.shape)).sum().backward()
        results.append([*scores, teacher.logp, *(p.grad for p in policy.student_parameters())])
    close = dict(atol=0.15, rtol=0.1) if GPU else dict(atol=5e-5, rtol=1e-3)
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **close)
    assert any(g.abs().max() > 0.1 for g in results[0][4:])
    mask = torch.zeros_like(results[0][0], dtype=torch.bool)
    for b, r in enumerate(rows):
        mask[b, : len(r.action_mask)] = torch.tensor(r.action_mask)
    assert not results[0][0][~mask].any()


@pytest.mark.parametrize("once", [False, True])
def test_two_backwards_of_one_checkpointed_forward(both, once):
    """Each term's gradient norm is measured that way. `once`: the kernels are put in place for all of a backward."""
    policies = both("qwen3", quantise="nf4", gradient_checkpointing=True, **SETTINGS)
    found = []
    for policy in policies:
        logp, params = policy.score("student", rows_of(RAGGED)).logp, policy.student_parameters()
        with policy.recomputing() if once else nullcontext():
            of_two_rows = torch.autograd.grad(logp[:2].sum(), params, retain_graph=True)
        with policy.recomputing() if once else nullcontext():
            logp.sum().backward()
        assert policy.training_kernels is None or not policy.training_kernels.active
        found.append([*of_two_rows, *(p.grad for p in params)])
    close = dict(atol=0.3, rtol=0.1) if GPU else dict(atol=5e-5, rtol=1e-3)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **close)


def test_a_forward_of_somebody_else_is_recomputed_as_it_was(both):
    ours, _ = both("qwen3", gradient_checkpointing=True, **SETTINGS)
    ids = torch.arange(5, 25, device=DEVICE)[None]
    ours.backbone(input_ids=ids, use_cache=False).last_hidden_state.float().sum().backward()
    assert all(p.grad is not None for p in ours.student_parameters())


def test_dropout_stays_on_after_modules_were_tried(both):
    ours, _ = both("llama", lora={"dropout": 0.5}, **SETTINGS)
    on = [m.training for m in ours.base.modules() if isinstance(m, torch.nn.Dropout)]
    TrainingKernels(ours.base)
    assert [m.training for m in ours.base.modules() if isinstance(m, torch.nn.Dropout)] == on and any(on)


def test_kernels_are_what_learns(both, monkeypatch):
    ours, plain = both("qwen3", quantise="nf4", gradient_checkpointing=True, **SETTINGS)
    rows, used = rows_of(RAGGED), []
    for name in ("RmsNorm", "SiluMul", "Rotate", "HeadLogprobs"):
        function = getattr(training, name)
        monkeypatch.setattr(function, "backward", staticmethod(lambda *a, f=function.backward, n=name: (used.append(n), f(*a))[1]))
    plain.score("student", rows).logp.sum().backward()
    assert not used
    ours.score("student", rows).logp.sum().backward()
    # 2 layers of 4 norms and a last one
    assert {n: used.count(n) for n in set(used)} == {"RmsNorm": 9, "SiluMul": 2, "Rotate": 2, "HeadLogprobs": 1}
    assert not any("forward" in m.__dict__ for m in ours.base.modules()), "nothing stays"
    assert ours.base.config._attn_implementation == "sdpa"


def test_dropout_and_an_adapted_head_go_peft_s_way(both):
    rows = rows_of(RAGGED)
    ours, plain = both("llama", lora={"dropout": 0.5, "targets": ["q_proj", "lm_head"]}, **SETTINGS)
    assert ours.head.weight() is None
    for adapter in ("student", "teacher"):
        with torch.no_grad():
            torch.testing.assert_close(ours.score(adapter, rows).logp, plain.score(adapter, rows).logp, **CLOSE)
    values = []
    for policy in (ours, ours, plain):
        torch.manual_seed(3 if len(values) != 1 else 4)
        values.append(policy.score("student", rows).logp)
    assert not torch.allclose(values[0], values[1]), "dropout is on"


def test_a_bare_base_keeps_its_own_modules(tiny_model, monkeypatch):
    """All its weights are trained: norms' and the head's need gradients too."""
    monkeypatch.setattr("skillsd.policy.training_kernels.why_not", lambda device, dtype: "")
    assert Policy(PolicySettings(model=tiny_model("qwen3")), adapters=False).training_kernels is None


def test_a_reason_is_logged(make_policy, caplog):
    with caplog.at_level(logging.INFO, "skillsd"):
        make_policy(kernels=False, lora=LoraSettings().__dict__ | {"r": 2})
    assert "policy.kernels: it is set to false" in caplog.text
