"""SkillSD.training_step on handmade groups: what enters the gradient, when the teacher is asked, what is logged and saved."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from skillsd.callbacks import TeacherSync
from skillsd.errors import ConfigError
from skillsd.module import METRICS, OptimizerSettings, SkillSD
from skillsd.objective import Objective
from skillsd.policy import Policy, TokenSequence
from skillsd.trajectory import Task, Trajectory, TrajectoryGroup, Turn

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]
TEMPERATURE = 0.7


def make_groups(
    policy: Policy,
    rewards: Sequence[Sequence[float]] = ((1.0, 0.0, 0.5), (0.0, 1.0, 1.0)),
    skills: Sequence[int | None] = (3, 8),
    spread: float = 0.3,
    seed: int = 0,
) -> list[TrajectoryGroup]:
    """Ragged groups; recorded log-probs are the student's, off by up to `spread`, so that some ratios are clipped."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(5, 60) for _ in range(n)]

    groups = []
    for number, (row, skill_id) in enumerate(zip(rewards, skills, strict=True)):
        prompt, played = ids(rng.randint(3, 8)), []
        for member, reward in enumerate(row):
            mask = [a for _ in range(rng.randint(1, 3)) for a in [True] * rng.randint(1, 3) + [False] * rng.randint(2, 4)]
            tokens = ids(len(mask))
            with torch.no_grad():
                logp = policy.score("student", [TokenSequence(prompt, tokens, mask)], TEMPERATURE)[0][0].tolist()
            logp = [x + rng.uniform(-spread, spread) if m else 0.0 for x, m in zip(logp, mask, strict=True)]
            t = Trajectory(
                0, f"t{number}", member, 0, "", tuple(prompt), tuple(tokens), tuple(mask), tuple(logp), (Turn("o", "a", reward),),
                reward, reward, reward == 1.0, "done", skill_id,
            )  # fmt: skip
            played.append(t)
        teacher = (*ids(7), *prompt) if skill_id is not None else tuple(prompt)
        groups.append(TrajectoryGroup(Task(f"t{number}"), tuple(played), teacher, skill_id, TEMPERATURE))
    return groups


class Stream:
    """Batches as they are."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@dataclass
class Steps(L.Callback):
    """Of every iteration: the gradient after the step, what was logged, and what the teacher was asked."""

    policy: Policy
    grads: list[list[Tensor]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    gaps: list[Tensor] = field(default_factory=list)
    asked: list[list[TokenSequence]] = field(default_factory=list)

    def on_train_batch_start(self, *_: Any) -> None:
        self.asked.append([])

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.policy.student_parameters()])
        self.metrics.append(dict(module.metrics))
        self.gaps.append(outputs["group_gap"])


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Steps]:
    """Train on batches through Lightning. Learning rate 0 unless told, so that the policy stays as it is."""

    def run(
        policy: Policy, *batches: Any, objective: Objective | None = None, optimizer: OptimizerSettings | None = None,
        same: bool = False, callbacks: Sequence[L.Callback] = (), save: Path | None = None, **settings: Any,
    ) -> Steps:  # fmt: skip
        module = SkillSD(
            policy.settings, objective or Objective(distillation_weight=0.5),
            optimizer or OptimizerSettings(lr=0.0, gradient_clip_norm=0.0), **({"grad_norm_every": 1} | settings),
        )  # fmt: skip
        module.policy, policy.teacher_is_student, steps = policy, same, Steps(policy)
        score = type(policy).score

        def spy(adapter: str, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
            if adapter == "teacher":
                steps.asked[-1].extend(sequences)
            return score(policy, adapter, sequences, temperature)

        monkeypatch.setattr(policy, "score", spy, raising=False)
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[*callbacks, steps],
        )  # fmt: skip
        trainer.fit(module, Stream(batches))
        monkeypatch.undo()
        if save is not None:
            trainer.save_checkpoint(save)
        return steps

    return run


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def close(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """Equal but for fp32 rounding, whose size depends on the threads: relative to the whole gradient's norm."""
    assert (flat(a) - flat(b)).norm() <= tolerance * flat(b).norm()


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith("time/") and not math.isnan(v)}


def by_hand(policy: Policy, groups: Sequence[TrajectoryGroup]) -> tuple[Tensor, Tensor]:
    """Both losses from Eq. 3-14, one trajectory at a time, on full logits."""

    def logp(prompt: Sequence[int], t: Trajectory) -> Tensor:
        ids = torch.tensor([[*prompt, *t.token_ids]])
        full = (policy.base(input_ids=ids).logits[0, :-1].float() / TEMPERATURE).log_softmax(-1)
        full = full[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(prompt) - 1 :]
        return full[torch.tensor(t.action_mask)]

    grpo, sdl, n = torch.zeros(()), torch.zeros(()), 0
    for g in groups:
        rewards = [t.reward for t in g.trajectories]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        for t in (t for t in g.trajectories if t.n_actions):
            advantage = (t.reward - mean) / (std + 1e-8)
            with policy.acting("teacher"):
                teacher = logp(g.teacher_prompt_ids, t)
            student = logp(t.prompt_ids, t)
            ratio = (student - torch.tensor(t.logprobs)[torch.tensor(t.action_mask)]).exp()
            ell = student - teacher
            grpo = grpo - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).sum()
            sdl = sdl + (ratio * ((-ell).exp() - 1 + ell)).sum()
            n += len(student)
    return grpo / n, sdl / n


# -- the gradient -----------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_paper(make_policy, step):
    """(Also each term's norm, with and without clipping, and the logged losses.)"""
    policy = make_policy()
    groups, params = make_groups(policy), policy.student_parameters()
    grpo, sdl = by_hand(policy, groups)
    each = [torch.autograd.grad(x, params, retain_graph=True) for x in (grpo, 0.5 * sdl)]
    total = [a + b for a, b in zip(*each, strict=True)]
    free = step(policy, groups)
    close(free.grads[0], total)
    norms = {k: float(flat(g).norm()) for k, g in zip(("policy", "distillation", "total"), (*each, total), strict=True)}
    clipped = step(policy, groups, optimizer=OptimizerSettings(lr=0.0, gradient_clip_norm=1e-2))
    for m in (free.metrics[0], clipped.metrics[0]):
        for name, norm in norms.items():
            assert m[f"grad_norm/{name}"] == pytest.approx(norm, rel=1e-4)
        assert m["loss/policy"] == pytest.approx(grpo.item(), abs=1e-5)
        assert m["loss/distillation"] == pytest.approx(sdl.item(), abs=1e-5)
        assert m["loss/total"] == pytest.approx((grpo + 0.5 * sdl).item(), abs=1e-5)
        assert 0 < m["policy/clip_fraction"] < 1
    assert flat(clipped.grads[0]).norm() == pytest.approx(1e-2, rel=1e-3)


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
    a, b = step(policy, groups), step(policy, scrambled)
    assert torch.equal(flat(a.grads[0]), flat(b.grads[0])) and flat(a.grads[0]).norm() > 0
    assert timeless(a.metrics[0]) == timeless(b.metrics[0])


def test_micro_batches_change_nothing(make_policy, step):
    policy = make_policy()
    groups = make_groups(policy)
    whole = step(policy, groups)
    for tokens in (1, 40, 90):
        parts = step(policy, groups, micro_batch_tokens=tokens)
        close(parts.grads[0], whole.grads[0])
        assert timeless(parts.metrics[0]) == pytest.approx(timeless(whole.metrics[0]), abs=1e-5)
        torch.testing.assert_close(parts.gaps[0], whole.gaps[0], atol=1e-5, rtol=0)


def test_recorded_loss_and_gradient_norm(make_policy, step):
    """Numbers of a fixed configuration, so that no change goes unnoticed. The weights are a formula, not a generator's."""
    policy = make_policy(randomise=False)
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(policy.named_parameters())):
            wave = torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + i).float().reshape(p.shape)
            p.copy_(1 + 0.1 * wave if "norm" in name else 0.25 * wave)
    (m,) = step(policy, make_groups(policy)).metrics
    got = {k: m[k] for k in ("loss/policy", "loss/distillation", "loss/total", "grad_norm/total", "grad_norm/policy", "teacher/gap_mean")}
    assert got == pytest.approx(RECORDED, rel=1e-5, abs=1e-5)


RECORDED = {
    "loss/policy": 0.0369425, "loss/distillation": 0.2500583, "loss/total": 0.1619716,
    "grad_norm/total": 0.7102308, "grad_norm/policy": 1.1881642, "teacher/gap_mean": -0.2999740,
}  # fmt: skip


# -- the teacher ------------------------------------------------------------------------------------------------------------


def test_an_empty_skill_with_equal_weights_asks_no_teacher(make_policy, step):
    policy = make_policy()
    policy.sync()
    groups = make_groups(policy, skills=(None, 8))
    equal = step(policy, groups, same=True)
    assert [s.prompt_ids for s in equal.asked[0]] == [groups[1].teacher_prompt_ids] * 3
    assert equal.gaps[0][0] == 0 != equal.gaps[0][1]

    plain = make_groups(policy, skills=(None, None))
    none = step(policy, plain, same=True)
    assert none.asked == [[]] and none.gaps[0].eq(0).all()
    assert none.metrics[0]["loss/distillation"] == none.metrics[0]["teacher/gap_mean"] == none.metrics[0]["grad_norm/distillation"] == 0
    # Scoring it all the same gives the same: the forward that is skipped is one that says nothing.
    scored = step(policy, plain, same=False)
    assert len(scored.asked[0]) == 6 and scored.gaps[0].abs().max() < 1e-5
    close(scored.grads[0], none.grads[0])

    untaught = step(policy, groups, objective=Objective(distillation_weight=0.0))
    assert untaught.asked == [[]] and math.isnan(untaught.metrics[0]["grad_norm/distillation"])


@pytest.mark.parametrize(
    ("sync", "asked"),
    [
        (TeacherSync(), [0, 0, 0, 0]),
        (TeacherSync(every=2), [0, 6, 0, 6]),
        (TeacherSync("ema", rate=0.5), [0, 6, 6, 6]),
        (TeacherSync("ema", rate=1.0), [0, 0, 0, 0]),
        (TeacherSync("frozen"), [0, 6, 6, 6]),
    ],
    ids=["every", "k=2", "ema", "ema of rate 1", "frozen"],
)
def test_a_teacher_that_lags_is_asked_without_a_skill(make_policy, step, sync, asked):
    policy = make_policy()
    policy.sync()
    batches = [make_groups(policy, skills=(None, None), seed=i) for i in range(4)]
    steps = step(policy, *batches, same=True, callbacks=[sync], optimizer=OptimizerSettings(lr=1e-2))
    assert [len(x) for x in steps.asked] == asked
    assert [bool(m["teacher/k3"] > 0) for m in steps.metrics] == [n > 0 for n in asked]


def test_a_teacher_prompt_too_long_is_dropped_whole(make_policy, step):
    policy = make_policy()
    groups = make_groups(policy)
    fits = [len(g.teacher_prompt_ids) + len(t.token_ids) for g in groups for t in g.trajectories]
    plain = max(len(t.prompt_ids) + len(t.token_ids) for g in groups for t in g.trajectories)
    policy.context_length = limit = sorted(fits)[3]
    assert plain <= limit < max(fits)  # the student's rows all fit
    steps = step(policy, groups, micro_batch_tokens=1)
    assert steps.metrics[0]["teacher/dropped_rows"] == sum(n > limit for n in fits) > 0
    assert len(steps.asked[0]) == sum(n <= limit for n in fits)
    prompts = {g.teacher_prompt_ids for g in groups}
    assert all(s.prompt_ids in prompts and len(s) <= limit for s in steps.asked[0])

    policy.context_length = plain  # none fits: only GRPO is left
    alone = step(policy, groups)
    assert alone.metrics[0]["teacher/dropped_rows"] == sum(n > plain for n in fits)
    policy.context_length = 1
    none = step(policy, groups)
    assert none.asked == [[]] and none.metrics[0]["teacher/dropped_rows"] == 6 and none.gaps[0].eq(0).all()
    close(none.grads[0], step(policy, groups, objective=Objective(distillation_weight=0.0)).grads[0])


def test_the_gap_of_a_group_is_aligned_with_its_outcome(make_policy, step):
    """What the bank books: sum of A_i * (log tea - log stu) over the group's action tokens."""
    policy = make_policy()
    groups = make_groups(policy)
    steps, want = step(policy, groups), []
    for g in groups:
        rewards, total = torch.tensor([t.reward for t in g.trajectories]), 0.0
        for t, a in zip(g.trajectories, ((rewards - rewards.mean()) / rewards.std()).tolist(), strict=True):
            with torch.no_grad():
                teacher = policy.score("teacher", [TokenSequence(g.teacher_prompt_ids, t.token_ids, t.action_mask)], TEMPERATURE)[0]
                student = policy.score("student", [TokenSequence(t.prompt_ids, t.token_ids, t.action_mask)], TEMPERATURE)[0]
            total += a * float((teacher - student).sum())
        want.append(total)
    assert steps.gaps[0].tolist() == pytest.approx(want, abs=1e-4)
    n = sum(t.n_actions for g in groups for t in g.trajectories)
    assert steps.metrics[0]["teacher/health"] == pytest.approx(sum(want) / n, abs=1e-5)


# -- groups without a signal --------------------------------------------------------------------------------------------------


def test_zero_variance_groups(make_policy, step):
    policy = make_policy()
    groups = make_groups(policy, rewards=((0.1, 0.1, 0.1), (1.0, 1.0, 1.0)), skills=(None, None))
    grpo = step(policy, groups, objective=Objective(distillation_weight=0.0))
    assert flat(grpo.grads[0]).eq(0).all() and grpo.metrics[0]["reward/zero_variance"] == 1.0
    taught = step(policy, groups)
    assert taught.metrics[0]["grad_norm/policy"] < 1e-6 < taught.metrics[0]["grad_norm/distillation"]
    mixed = step(policy, [groups[0], make_groups(policy)[1]])
    assert mixed.metrics[0]["reward/zero_variance"] == 0.5


def test_trajectories_without_tokens(make_policy, step):
    """A prompt that did not fit leaves an episode without a turn: it counts in the baseline, not in N."""
    policy = make_policy()
    first, second = make_groups(policy)

    def empty(t: Trajectory) -> Trajectory:
        return replace(t, token_ids=(), action_mask=(), logprobs=(), turns=(), finish_reason="length")

    some = replace(first, trajectories=(first.trajectories[0], *map(empty, first.trajectories[1:])))
    mixed = step(policy, [some, second], micro_batch_tokens=1)
    grpo, sdl = by_hand(policy, [some, second])
    close(mixed.grads[0], torch.autograd.grad(grpo + 0.5 * sdl, policy.student_parameters()))
    assert mixed.metrics[0]["rollout/finish_length"] == pytest.approx(2 / 6)

    lost = replace(second.trajectories[1], finish_reason="failed", failure="killed")
    one = step(policy, [some, replace(second, trajectories=(second.trajectories[0], lost, second.trajectories[2]))])
    assert one.metrics[0]["rollout/failed"] == pytest.approx(1 / 6) and mixed.metrics[0]["rollout/failed"] == 0

    before = [p.clone() for p in policy.student_parameters()]
    none = [replace(g, trajectories=tuple(map(empty, g.trajectories))) for g in (first, second)]
    nothing = step(policy, none, optimizer=OptimizerSettings(lr=1.0))
    assert flat(policy.student_parameters()).equal(flat(before)) and nothing.gaps[0].eq(0).all()
    m = nothing.metrics[0]
    assert m["loss/total"] == m["grad_norm/total"] == m["grad_norm/policy"] == m["rollout/action_tokens"] == 0
    assert set(m) == set(METRICS) and not any(math.isinf(v) for v in m.values())


def test_groups_of_one(make_policy, step):
    """Without a policy loss there is nothing to compare with; with it the error names the key."""
    policy = make_policy()
    groups = make_groups(policy, rewards=((1.0,), (0.0,)))
    alone = step(policy, groups, objective=Objective(policy_weight=0.0, distillation_weight=0.5))
    assert alone.metrics[0]["grad_norm/distillation"] > 0 and alone.metrics[0]["teacher/health"] == 0
    with pytest.raises(ValueError, match="group_size"):
        step(policy, groups)


# -- optimizer, settings, checkpoints -----------------------------------------------------------------------------------------


def rates(steps: Steps) -> list[float]:
    return [m["optimizer/lr"] for m in steps.metrics]


def test_warm_up_and_schedule(make_policy, step):
    policy = make_policy()
    batch = make_groups(policy)

    def lr(n: int, **settings: Any) -> list[float]:
        return rates(step(policy, *[batch] * n, optimizer=OptimizerSettings(lr=1e-4, **settings), grad_norm_every=0))

    assert lr(3) == pytest.approx([1e-4] * 3)
    assert lr(5, warmup_steps=4) == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4])
    cosine = [1e-4 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert lr(6, warmup_steps=2, schedule="cosine") == pytest.approx([0.5e-4, 1e-4, *cosine])
    assert lr(2, warmup_steps=8) == pytest.approx([1e-4 / 8, 2e-4 / 8])


def test_how_often_norms_are_measured(make_policy, step):
    policy = make_policy()
    batch = make_groups(policy)
    for every, measured in ((0, []), (2, [0, 2]), (1, [0, 1, 2])):
        steps = step(policy, *[batch] * 3, grad_norm_every=every)
        assert [i for i, m in enumerate(steps.metrics) if not math.isnan(m["grad_norm/distillation"])] == measured
        for g in steps.grads:
            close(g, steps.grads[0], 0.0)


def test_settings_are_checked():
    for settings in ({"lr": -1.0}, {"warmup_steps": -1}, {"weight_decay": -0.1}, {"gradient_clip_norm": -1.0}):
        with pytest.raises(ConfigError, match=r"model\.init_args\.optimizer"):
            OptimizerSettings(**settings)


def test_a_checkpoint_holds_both_adapters_only(make_policy, step, tmp_path):
    policy = make_policy()
    step(policy, make_groups(policy), optimizer=OptimizerSettings(lr=1e-3), save=tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    names = [f"{a}.{k}" for a in ("student", "teacher") for k in policy.adapter("student")]
    assert sorted(state) == sorted(names) and all("lora_" in k for k in state)
    assert all(torch.equal(state[f"student.{k}"], p) for k, p in policy.adapter("student").items())
    assert all(torch.equal(state[f"teacher.{k}"], p) for k, p in policy.adapter("teacher").items())
    assert checkpoint["skillsd"] == {"base": policy.base_name, "teacher_is_student": False}

    def module(other: Policy) -> SkillSD:
        made = SkillSD(other.settings)
        made.policy = other
        return made

    fresh = make_policy(randomise=False)
    again = module(fresh)
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(state)
    assert all(torch.equal(state[k], v) for k, v in fresh.adapter_state().items())
    for other in (make_policy("llama"), make_policy(lora={"r": 2}), make_policy(lora={"targets": ["q_proj"]})):
        with pytest.raises(ConfigError, match=r"model\.init_args\.policy"):
            module(other).on_load_checkpoint(checkpoint)
    with pytest.raises(ConfigError, match=r"policy\.lora"):
        module(make_policy(lora={"r": 2})).load_state_dict(state)
    with pytest.raises(ConfigError, match="checkpoint"):
        again.on_load_checkpoint({})  # of another program
