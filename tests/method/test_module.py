"""SkillSD.training_step on groups made by hand: its gradient is that of the paper."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from tests.method.by_hand import gradient, paper_losses, rows_from_full_logits
from tests.method.groups import TEMPERATURE, make_groups, sampled_by_teacher, with_own_prompts
from tests.tolerance import close
from tests.training import flat, same_gradient, timeless

from skillsd.errors import ConfigError
from skillsd.module import SkillSD
from skillsd.optimizer import OptimizerSettings
from skillsd.policy import Policy, TokenSequence
from skillsd.trajectory import Trajectory


def test_the_gradient_is_that_of_the_paper(make_policy, step):
    """(Also each term's norm, with and without clipping, and the logged losses.)"""
    policy = make_policy()
    groups, params = make_groups(policy), policy.student_parameters()
    grpo, sdl = paper_losses(policy, groups)
    each = [torch.autograd.grad(x, params, retain_graph=True) for x in (grpo, 0.5 * sdl)]
    total = [a + b for a, b in zip(*each, strict=True)]
    free = step(policy, groups)
    same_gradient(free.grads[0], total)
    norms = {k: float(flat(g).norm()) for k, g in zip(("policy", "distillation", "total"), (*each, total), strict=True)}
    clipped = step(policy, groups, optimizer=OptimizerSettings(lr=0.0, gradient_clip_norm=1e-2))
    for m in (free.metrics[0], clipped.metrics[0]):
        for name, norm in norms.items():
            assert m[f"grad_norm/{name}"] == pytest.approx(norm, rel=1e-4)
        close(m["loss/policy"], grpo.item())
        close(m["loss/distillation"], 0.5 * sdl.item())  # as it enters the total
        close(m["loss/total"], (grpo + 0.5 * sdl).item())
        assert 0 < m["policy/clip_fraction"] < 1
    assert flat(clipped.grads[0]).norm() == pytest.approx(1e-2, rel=1e-3)


def test_each_member_has_prompts_of_its_own(make_policy, step):
    """Scored under what the group says, whatever was seen by whoever acted; the student under its own, the teacher under its own."""
    policy = make_policy()
    groups = with_own_prompts(make_groups(policy))
    grpo, sdl = paper_losses(policy, groups)
    want = gradient(policy, grpo + 0.5 * sdl)
    for tokens in (1, 60, 4096):
        steps = step(policy, groups, micro_batch_tokens=tokens)
        same_gradient(steps.grads[0], want)
        for asked, prompts in ((steps.student_inputs, "student_prompts"), (steps.teacher_inputs, "teacher_prompts")):
            pairs = [(p, t.token_ids) for g in groups for p, t in zip(getattr(g, prompts), g.trajectories, strict=True)]
            assert sorted((s.prompt_ids, s.token_ids) for s in asked[0]) == sorted(pairs)


def test_environment_tokens_are_no_targets(make_policy, step):
    """Whatever is recorded for them, and whatever token stands where no action follows, the gradient is the same to the bit."""
    policy = make_policy()
    groups, noise = make_groups(policy), random.Random(1)

    def scramble(t: Trajectory) -> Trajectory:
        last = max(i for i, m in enumerate(t.action_mask) if m)
        logp = [x if m else noise.choice([math.nan, -9.0, 5.0]) for x, m in zip(t.logprobs, t.action_mask, strict=True)]
        tail = [noise.randrange(5, 60) for _ in t.token_ids[last + 1 :]]
        assert tail
        return replace(t, logprobs=tuple(logp), token_ids=(*t.token_ids[: last + 1], *tail))

    scrambled = [replace(g, trajectories=tuple(map(scramble, g.trajectories))) for g in groups]
    rows = [t for g in groups for t in g.trajectories]
    with torch.no_grad():
        scored = policy.score("student", [TokenSequence(t.prompt_ids, t.token_ids, t.action_mask) for t in rows], TEMPERATURE).logp
    gaps = torch.cat(
        [(x[: len(t.logprobs)] - torch.tensor(t.logprobs))[torch.tensor(t.action_mask)] for x, t in zip(scored, rows, strict=True)]
    )
    a, b = step(policy, groups), step(policy, scrambled)
    assert torch.equal(flat(a.grads[0]), flat(b.grads[0])) and flat(a.grads[0]).norm() > 0
    assert timeless(a.metrics[0]) == timeless(b.metrics[0])
    assert a.metrics[0]["policy/logp_drift"] == pytest.approx(float(gaps.abs().mean()), rel=1e-3)
    assert a.metrics[0]["policy/logp_drift_max"] == pytest.approx(float(gaps.abs().max()), rel=1e-3)


def test_recorded_loss_and_gradient_norm(make_policy, step):
    """Numbers of a fixed configuration, so that no change goes unnoticed. The weights are a formula, not a generator's."""
    policy = make_policy(randomise=False)
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(policy.named_parameters())):
            wave = torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + i).float().reshape(p.shape)
            p.copy_(1 + 0.1 * wave if "norm" in name else 0.25 * wave)
    (m,) = step(policy, make_groups(policy)).metrics
    got = {k: m[k] for k in ("loss/policy", "loss/distillation", "loss/total", "grad_norm/total", "grad_norm/policy", "teacher/gap_mean")}
    close(got, RECORDED)


RECORDED = {
    "loss/policy": 0.0369425, "loss/distillation": 0.5 * 0.2500583, "loss/total": 0.1619716,
    "grad_norm/total": 0.7102308, "grad_norm/policy": 1.1881642, "teacher/gap_mean": -0.2999740,
}  # fmt: skip


def test_after_a_teacher_s_rollout_rho_is_student_over_teacher(make_policy, step):
    """GRPO's ratio is 1, since the old student is today's; rho is the student over the teacher, whose log-probs are on record."""
    policy = make_policy()
    groups = sampled_by_teacher(policy, make_groups(policy))
    rows = rows_from_full_logits(policy, groups)
    n = sum(len(r.picked) for r in rows)
    rewarded = -sum((r.advantage * r.logp(r.student)).sum() for r in rows) / n
    distilled = sum((r.ell.exp().detach() * r.ell.detach() * r.logp(r.student)).sum() for r in rows) / n  # Prop. 2
    want = gradient(policy, rewarded + 0.5 * distilled)
    steps = step(policy, groups)
    same_gradient(steps.grads[0], want)
    m = steps.metrics[0]
    assert m["policy/clip_fraction"] == m["policy/logp_drift"] == m["policy/logp_drift_max"] == 0
    assert max((r.rho.log() - r.ell).abs().max() for r in rows) < 1e-4  # rho = pi_stu / pi_tea
    close(m["loss/policy"], -sum(r.advantage * len(r.picked) for r in rows) / n)
    ell = torch.cat([r.ell for r in rows]).detach().double()
    close(m["loss/distillation"], float(0.5 * (1 - ell.exp() + ell * ell.exp()).mean()))
    # As if the student had sampled the same record, ratios are clipped.
    assert step(policy, [replace(g, sampled_by_teacher=False) for g in groups]).metrics[0]["policy/clip_fraction"] > 0


def test_the_record_of_a_teacher_s_rollout_is_used(make_policy, step):
    """rho's denominator is what was recorded at the rollout, not today's teacher; and each group is treated by its own actor."""
    policy = make_policy()
    own, by_teacher_groups = make_groups(policy), sampled_by_teacher(policy, with_own_prompts(make_groups(policy, seed=3)), spread=0.4)
    for groups in (by_teacher_groups, [own[0], by_teacher_groups[1]], [by_teacher_groups[0], own[1]]):
        grpo, sdl = paper_losses(policy, groups)
        want = gradient(policy, grpo + 0.5 * sdl)
        for tokens in (1, 90, 4096):
            same_gradient(step(policy, groups, micro_batch_tokens=tokens).grads[0], want)


def test_a_checkpoint_holds_both_adapters_only(make_policy, step, tmp_path):
    policy = make_policy()
    step(policy, make_groups(policy), optimizer=OptimizerSettings(lr=1e-3), save=tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    names = [f"{a}.{k}" for a in ("student", "teacher") for k in policy.adapter("student")]
    assert sorted(state) == sorted([*names, "teacher_is_student"]) and all("lora_" in k for k in names) and not state["teacher_is_student"]
    assert all(torch.equal(state[f"student.{k}"], p) for k, p in policy.adapter("student").items())
    assert all(torch.equal(state[f"teacher.{k}"], p) for k, p in policy.adapter("teacher").items())
    counters = {"skipped": 0, "skipped_in_a_row": 0}
    assert checkpoint["skillsd"] == {"base": policy.identity, **counters}

    def module(other: Policy) -> SkillSD:
        made = SkillSD(other.settings)
        made.policy = other
        return made

    fresh = make_policy(randomise=False)
    again = module(fresh)
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(state)
    assert all(torch.equal(state[k], v) for k, v in fresh.adapter_state().items())
    for other in (make_policy("llama"), make_policy(lora={"r": 2}), make_policy(lora={"alpha": 9})):
        with pytest.raises(ConfigError, match=r"ckpt_path: .*policy\.(model|lora)"):
            module(other).on_load_checkpoint(checkpoint)
    for lora in ({"r": 2}, {"targets": ["q_proj"]}):
        with pytest.raises(ConfigError, match=r"policy\.lora"):
            module(make_policy(lora=lora)).load_state_dict(state)
    with pytest.raises(ConfigError, match="checkpoint"):
        again.on_load_checkpoint({})  # of another program
