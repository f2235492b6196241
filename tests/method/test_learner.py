"""One update in micro-batches: the same sum, also when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from tests.method.groups import make_groups
from tests.training import flat, same_update
from torch import Tensor

from skillsd.errors import ConfigError
from skillsd.policy import Policy, Scores, TokenSequence


def test_micro_batches_change_nothing(make_policy, step):
    policy = make_policy()
    groups = make_groups(policy)
    whole = step(policy, groups)
    for tokens in (1, 40, 90):
        parts = step(policy, groups, micro_batch_tokens=tokens)
        same_update(parts, whole)


@pytest.mark.parametrize(("view", "where"), [("student", "forward"), ("student", "backward"), ("teacher", "forward")])
def test_out_of_memory_halves_the_micro_batch(make_policy, step, monkeypatch, caplog, view, where):
    """Repeated from the start: what the failed attempt had added up, gradients included, is gone."""
    policy = make_policy()
    groups = make_groups(policy)
    whole = step(policy, groups)
    longest = max(len(p) + len(t.token_ids) for g in groups for t, p in zip(g.trajectories, g.teacher_prompts, strict=True))
    sizes: list[int] = []  # padded sizes of the forwards that went well
    score = type(policy)._score

    def limited(self: Policy, sequences: Sequence[TokenSequence], temperature: float) -> Scores:
        padded = len(sequences) * max(map(len, sequences))
        if torch.is_grad_enabled() != (view == "student"):
            return score(self, sequences, temperature)
        if not sizes or padded <= longest:  # the very first goes well, and leaves its gradient
            sizes.append(padded)
            return score(self, sequences, temperature)
        if where == "forward":
            raise torch.OutOfMemoryError("no room")
        out = score(self, sequences, temperature)

        def fail(gradient: Tensor) -> None:
            raise torch.OutOfMemoryError("no room")

        out.logp.register_hook(fail)
        return out

    monkeypatch.setattr(type(policy), "_score", limited)
    steps = step(policy, groups, micro_batch_tokens=3 * longest)
    same_update(steps, whole)
    used = [int(m["memory/micro_batch_tokens"]) for m in steps.metrics]
    assert used[0] < 3 * longest and sizes[0] > longest >= max(sizes[1:])
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert said and said[-1].endswith(f"micro_batch_tokens {used[0]}")


def test_a_row_that_does_not_fit_alone_is_refused(make_policy, step, monkeypatch):
    policy = make_policy()
    groups = make_groups(policy)

    def full(self: Policy, sequences: Sequence[TokenSequence], temperature: float) -> Scores:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(type(policy), "_score", full)
    with pytest.raises(ConfigError, match=r"a trajectory of \d+ tokens alone.*gradient_checkpointing.*head_chunk.*max_trajectory_tokens"):
        step(policy, groups)


def test_norms_are_measured_as_often_as_asked(make_policy, step):
    policy = make_policy()
    batch = make_groups(policy)
    for every, measured in ((0, []), (2, [0, 2]), (1, [0, 1, 2])):
        steps = step(policy, *[batch] * 3, grad_norm_every=every)
        assert [i for i, m in enumerate(steps.metrics) if not math.isnan(m["grad_norm/distillation"])] == measured
        for g in steps.grads:
            assert flat(g).equal(flat(steps.grads[0]))
