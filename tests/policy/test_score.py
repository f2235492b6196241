"""`Policy.score` and micro-batches: one mask, one gradient."""

import random

import pytest
import torch
from tests.tolerance import ROUNDING, close

from skillsd.errors import ConfigError
from skillsd.objective import Objective
from skillsd.policy import TokenSequence, micro_batches


def sequences(n=5, seed=0):
    """Ragged sequences with alternating action and environment spans."""
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        tokens, mask = [], []
        for turn in range(rng.randint(1, 4)):
            for action in (True, False) if turn else (True,):
                k = rng.randint(1, 4)
                tokens += [rng.randrange(5, 60) for _ in range(k)]
                mask += [action] * k
        out.append(TokenSequence([rng.randrange(5, 60) for _ in range(rng.randint(1, 9))], tokens, mask))
    return out


def test_each_row_is_scored_as_if_alone(make_policy):
    policy, rows = make_policy(), sequences()
    together, entropy, _ = policy.score("student", rows)
    assert together.dtype == torch.float32 and together.shape == entropy.shape
    for row, s in zip(together, rows, strict=True):
        ids = torch.tensor([[*s.prompt_ids, *s.token_ids]])
        logp = policy.base(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
        want = logp[len(s.prompt_ids) - 1 :] * torch.tensor(s.action_mask)
        close(row[: len(want)], want)


def test_only_actions_are_scored(make_policy):
    """Environment positions are exactly 0 and send no gradient, whatever the loss asks of them; actions see earlier tokens."""
    policy, rows = make_policy(), sequences()
    mask = torch.zeros(len(rows), max(len(s.token_ids) for s in rows), dtype=torch.bool)
    for i, s in enumerate(rows):
        mask[i, : len(s.action_mask)] = torch.tensor(s.action_mask)
    logp, entropy, _ = policy.score("student", rows)
    assert logp[~mask].eq(0).all() and entropy[~mask].eq(0).all() and logp[mask].lt(0).all()

    params = policy.student_parameters()
    scrambled = torch.randn(logp.shape) * ~mask  # what a wrong loss would ask of environment tokens
    for g in torch.autograd.grad((scrambled * logp).sum(), params):
        assert g.eq(0).all()

    i = next(i for i, s in enumerate(rows) if len(set(s.action_mask)) == 2)
    s, first = rows[i], rows[i].action_mask.index(False)
    changed = [*s.token_ids]
    changed[first] = 60 + changed[first] % 3
    other = policy.score("student", [TokenSequence(s.prompt_ids, changed, s.action_mask)])[0][0]
    same = logp[i, : len(changed)]
    torch.testing.assert_close(other[:first], same[:first])
    later = torch.tensor(s.action_mask)
    later[:first] = False
    assert (other[later] != same[later]).all()


def test_a_trajectory_without_actions(make_policy):
    policy = make_policy()
    logp, entropy, _ = policy.score("student", [TokenSequence([5, 6], [], []), TokenSequence([5], [7, 8], [False, False])])
    assert logp.shape == (2, 2) and logp.eq(0).all() and entropy.eq(0).all()
    logp.sum().backward()
    assert policy.score("teacher", [TokenSequence([5, 6], [], [])])[0].shape == (1, 0)


def test_hidden_states_predict_the_actions_row_by_row(make_policy):
    """In the order of the mask; the student's carry the gradient."""
    policy, rows = make_policy(), sequences()
    logp, _, hidden = policy.score("student", rows)
    mask = torch.zeros(logp.shape, dtype=torch.bool)
    for i, s in enumerate(rows):
        mask[i, : len(s.action_mask)] = torch.tensor(s.action_mask)
    actions = torch.tensor([t for s in rows for t, a in zip(s.token_ids, s.action_mask, strict=True) if a])
    assert hidden.shape == (len(actions), 32)
    again = policy.head(hidden).log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
    close(again, logp[mask])
    for x, y in zip(*(torch.autograd.grad(x.sum(), policy.student_parameters(), retain_graph=True) for x in (again, logp)), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    assert not policy.score("teacher", rows).hidden.requires_grad


def test_whole_distributions_are_compared(make_policy):
    """Against log_softmax of the model's own logits; the same gradient for any chunk."""
    rows = sequences()

    def reverse_kl(student, teacher):
        return (student.exp() * (student - teacher)).sum(-1)

    values, grads = [], []
    for chunk in (3, 1000):
        policy = make_policy("gemma2", head_chunk=chunk)
        student, teacher = policy.score("student", rows, 0.7).hidden, policy.score("teacher", rows, 0.7).hidden
        values.append(policy.compare(student, teacher, reverse_kl, 0.7))
        grads.append(torch.autograd.grad(values[-1].sum(), policy.student_parameters(), retain_graph=True))
    want = reverse_kl((policy.head(student) / 0.7).log_softmax(-1), (policy.head(teacher) / 0.7).log_softmax(-1))
    assert values[0].dtype == torch.float32 and want.min() > 0
    torch.testing.assert_close(values[0], want)
    torch.testing.assert_close(values[1], want)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=ROUNDING, rtol=1e-4)


def test_a_head_with_adapters_is_not_compared(make_policy):
    policy = make_policy("llama", lora={"targets": ["q_proj", "lm_head"]})
    hidden = policy.score("student", sequences(1)).hidden
    with pytest.raises(ConfigError, match=r"policy\.lora\.targets includes the language-model head"):
        policy.compare(hidden, hidden.detach(), lambda s, t: (s - t).sum(-1))


def test_the_teacher_scores_without_gradient(make_policy):
    policy, rows = make_policy(), sequences(2)
    assert policy.score("student", rows)[0].requires_grad
    assert not policy.score("teacher", rows)[0].requires_grad
    with torch.no_grad():
        student = policy.score("student", rows)[0]
    assert not student.requires_grad
    assert not torch.allclose(student, policy.score("teacher", rows)[0])


def test_micro_batches_cover_and_fit():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(0, 300) for _ in range(rng.randint(0, 40))]
        budget = rng.choice([1, 100, 500, 4000])
        batches = micro_batches(lengths, budget)
        assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
        for b in batches:
            assert len(b) == 1 or max(lengths[i] for i in b) * len(b) <= budget
    assert micro_batches([4, 1, 4, 2], 8) == micro_batches([4, 1, 4, 2], 8) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batched_gradient_is_the_one_batch_gradient(make_policy, checkpointing):
    policy, rows = make_policy(gradient_checkpointing=checkpointing, head_chunk=7), sequences(7)
    objective, params = Objective(distillation_weight=0.1), policy.student_parameters()
    n = sum(sum(s.action_mask) for s in rows)
    g = torch.Generator().manual_seed(0)
    advantage = torch.randn(len(rows), generator=g)

    def gradient(batches):
        for p in params:
            p.grad = None
        for index in batches:
            part = [rows[i] for i in index]
            logp = policy.score("student", part).logp
            teacher = policy.score("teacher", part).logp
            mask = torch.zeros(logp.shape, dtype=torch.bool)
            for i, s in enumerate(part):
                mask[i, : len(s.action_mask)] = torch.tensor(s.action_mask)
            objective.total(objective.terms(logp, logp.detach() - 0.05, teacher, mask, advantage[index]), n).backward()
        return [p.grad for p in params]

    want = gradient([list(range(len(rows)))])
    assert max(w.abs().max() for w in want) > 1e-2
    for a, b in zip(gradient(micro_batches([len(s) for s in rows], 40)), want, strict=True):
        assert (a - b).norm() <= ROUNDING * max(w.norm() for w in want)


def test_checkpointing_recomputes_the_student_only(make_policy):
    """Twice the layers for the student's backward, once for the teacher and the rollout; the same gradient as without."""
    rows, calls, grads = sequences(3), [], {}
    for on in (False, True):
        policy = make_policy(gradient_checkpointing=on)
        calls.clear()
        for layer in policy.backbone.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        policy.score("teacher", rows)
        assert len(calls) == 2
        logp = policy.score("student", rows).logp
        policy.score("teacher", rows)  # between forward and backward, as in training
        assert len(calls) == 6
        grads[on] = torch.autograd.grad(logp.sum(), policy.student_parameters())
        assert len(calls) == (8 if on else 6)
    for a, b in zip(grads[True], grads[False], strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_acts_in_training_only(make_policy):
    policy, rows = make_policy(lora={"dropout": 0.5}), sequences(3)
    with torch.no_grad():
        quiet = [policy.score("student", rows)[0] for _ in range(2)] + [make_policy().score("student", rows)[0]]
    assert torch.equal(quiet[0], quiet[1]) and torch.equal(quiet[0], quiet[2])
    assert torch.equal(policy.score("teacher", rows)[0], policy.score("teacher", rows)[0])
    assert not torch.equal(policy.score("student", rows)[0], policy.score("student", rows)[0])


def test_a_trainer_cannot_switch_the_mode(make_policy):
    policy = make_policy(lora={"dropout": 0.5})
    for switch in (policy.train, policy.eval):
        switch()
        assert not policy.base.training
        with torch.no_grad():
            assert torch.equal(policy.score("student", sequences(1))[0], policy.score("student", sequences(1))[0])
