"""A base that is split over two processes (gloo, on the CPU) against the whole one. Run by test_shard.py."""

import logging
import weakref

import pytest
import torch
import torch.distributed as dist
from tests.engines.test_engine import play
from tests.forked import on_ranks
from tests.policy.test_score import sequences
from tests.tolerance import ROUNDING, close
from torch.distributed.fsdp import fully_shard

from skillsd.engines.in_process import InProcessEngine
from skillsd.errors import ConfigError
from skillsd.policy import Footprint, Policy, PolicySettings
from skillsd.policy.shard import Shards
from skillsd.policy.training_kernels import TrainingKernels

ROWS = 2, 3  # of each rank


@pytest.fixture
def two_ranks(tmp_path):
    return lambda work: on_ranks(2, tmp_path / "ranks", work)


def batches(rank, size=2):
    rows = sequences(sum(ROWS))
    local_rows = rows[: ROWS[0]] if rank == 0 else rows[ROWS[0] :]
    return [local_rows[i : i + size] for i in range(0, len(local_rows), size)]


def learn(policy, parts):
    """AdamW's step on micro-batches, in rounds that all ranks agree on: log-probs, the gradient, that of the gap alone, and weights."""
    params, logps, separate = policy.student_parameters(), [], None
    for i in range(policy.agree(len(parts))):
        if i < len(parts):
            student, teacher = policy.score("student", parts[i]).logp, policy.score("teacher", parts[i]).logp
            logps.append(student.detach())
            gap, loss = (student - teacher).square().sum(), student.sum()
        else:
            gap = loss = policy.idle(grad=True)
            policy.idle()
        with policy.recomputing():
            grads = torch.autograd.grad(gap, params, retain_graph=True, allow_unused=True)
        separate = [a + g for a, g in zip(separate or [torch.zeros_like(p) for p in params], grads, strict=True)]
        with policy.recomputing():
            (gap + loss).backward()
    if policy.sharded:
        for t in (*(p.grad for p in params), *separate):
            dist.all_reduce(t)
    torch.optim.AdamW(params, 1e-2).step()
    return logps, [p.grad for p in params], separate, {k: x for k, x in policy.adapter_state().items() if x.is_floating_point()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_the_sharded_policy_is_that_of_the_whole(make_policy, two_ranks, checkpointing):
    """Log-probs, gradients and weights, with one micro-batch on one rank and two on the other."""
    plain = make_policy()
    want = learn(plain, [*batches(0), *batches(1)])

    def work(rank):
        sharded = make_policy(shard=True, gradient_checkpointing=checkpointing)
        n_local = sum(p.to_local().numel() for p in sharded.base.parameters() if hasattr(p, "to_local"))
        return n_local, Footprint(sharded), learn(sharded, batches(rank))

    by_rank = two_ranks(work)
    layers = sum(p.numel() for n, p in plain.base.get_decoder().layers.named_parameters() if "lora_" not in n)
    assert sum(n_local for n_local, *_ in by_rank) == layers
    assert sum(f.weights for _, f, _ in by_rank) == 2 * Footprint(plain).weights - 4 * layers
    assert by_rank[0][1].gathered == 3 * 4 * layers // 2 and not Footprint(plain).gathered
    logps = [x for _, _, (logps, *_) in by_rank for x in logps]
    for a, b in zip(logps, want[0], strict=True):
        close(a, b)
    for _, _, got in by_rank:
        for a, b in zip((*got[1], *got[2]), (*want[1], *want[2]), strict=True):
            assert (a - b).norm() <= ROUNDING * max(w.norm() for w in want[1])
        for k, v in got[3].items():
            close(v, want[3][k])


def test_the_base_never_lies_whole_on_the_device(make_policy, two_ranks, monkeypatch):
    """Nobody holds on to a layer's weights when it has been split."""
    make_policy()

    def watched(module, ignored_params, **kwargs):
        weights = [weakref.ref(p) for p in module.parameters() if p not in ignored_params and not hasattr(p, "to_local")]
        fully_shard(module, ignored_params=ignored_params, **kwargs)
        freed.append([p() is None for p in weights])

    freed = []
    monkeypatch.setattr("skillsd.policy.shard.fully_shard", watched)
    assert two_ranks(lambda rank: make_policy(shard=True) and freed) == [[[True] * 11, [True] * 11, []]] * 2


def test_ranks_that_play_shorter_wait_for_the_others(make_policy, two_ranks):
    """No row on one rank, and three of up to three turns on the other: the tokens are those of the whole base."""
    few = dict(rows=3, turns=3, limit=3)
    want = [play(make_policy(), adapter, **few) for adapter in ("student", None)]

    def work(rank):
        policy, played = make_policy(shard=True), []
        engine = InProcessEngine(policy)
        for i, adapter in enumerate(("student", None)):
            with policy.together(), policy.together():
                played.append(play(policy, adapter, engine=engine, **few) if rank == i else None)
        return played, engine.static, engine.fused

    for rank, (played, static, fused) in enumerate(two_ranks(work)):
        assert played[1 - rank] is None and not static and fused is None
        for (a, x), (b, y) in zip(played[rank], want[rank], strict=True):
            assert a == b
            close(x, y)


def test_an_error_leaves_the_others_alone(make_policy, two_ranks):
    """Out of memory in the middle of a forward is the end; other errors are not kept waiting."""

    def work(rank):
        policy = make_policy(shard=True)
        with pytest.raises(ConfigError, match=r"policy\.shard: out of memory") as raised, policy.together(), policy.acting("student"):
            raise torch.OutOfMemoryError("no")
        return str(raised.value), policy.agree(3 + rank)

    assert [n for _, n in two_ranks(work)] == [4, 4]


def test_checkpoints_and_adapters_go_both_ways(make_policy, two_ranks, tmp_path):
    whole = make_policy()
    state, row = whole.adapter_state(), sequences(1)

    def work(rank):
        policy = make_policy(randomise=False, shard=True)
        policy.load_adapter_state(state)
        policy.to("cpu")  # as Lightning does
        policy.ema(0.25)
        policy.save_adapter(tmp_path / f"of{rank}")
        return policy.adapter_state(), policy.score("teacher", row).logp

    (a, logp), (b, _) = two_ranks(work)
    other = make_policy(randomise=False)
    other.load_adapter_state(a)
    close(other.score("teacher", row).logp, logp)
    whole.ema(0.25)
    for k, v in whole.adapter_state().items():
        assert type(a[k]) is torch.Tensor and torch.equal(a[k], v) and torch.equal(b[k], v)


def test_the_learners_kernels_read_gathered_weights(make_policy, two_ranks, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("skillsd.policy.training_kernels.why_not", lambda device, dtype: "")
    want = learn(make_policy(gradient_checkpointing=True), batches(0))

    def work(rank):
        policy = make_policy(shard=True, gradient_checkpointing=True)
        assert isinstance(policy.training_kernels, TrainingKernels)
        return learn(policy, batches(0) if rank == 0 else [])

    got, idle = two_ranks(work)
    assert not idle[0]
    for a, b in zip((*got[0], *got[1], *got[2]), (*want[0], *want[1], *want[2]), strict=True):
        close(a, b)


def test_what_cannot_be_sharded_is_refused(make_policy, tiny_model, two_ranks, caplog):
    with pytest.raises(ConfigError, match=r"policy\.shard: a base in 4 bits"):
        PolicySettings(shard=True, quantise="nf4")
    with pytest.raises(ConfigError, match=r"policy\.shard: training all weights"):
        Policy(PolicySettings(model=tiny_model("qwen3"), shard=True), adapters=False)
    with caplog.at_level(logging.WARNING, "skillsd"):
        policy = make_policy(shard=True)
    assert "policy.shard: there is one rank" in caplog.text
    with policy.together():
        assert not policy.sharded and policy.agree(5) == 5
    policy.base._no_split_modules = None
    with pytest.raises(ConfigError, match=r"policy\.shard: Qwen3ForCausalLM names no decoder layers"):
        Shards(policy.base, policy.device)
