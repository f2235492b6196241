"""SkillSD.training_step on handmade groups: what enters the gradient, when the teacher is asked, what is logged and saved."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tests.tolerance import ROUNDING, close
from torch import Tensor

from skillsd.batch import return_gap
from skillsd.callbacks import TeacherSync
from skillsd.errors import ConfigError
from skillsd.metrics import METRICS
from skillsd.module import SkillSD
from skillsd.objective import (
    FullReverseKL,
    GapAdvantage,
    GapMultiplier,
    Objective,
    OutcomeGate,
    PositiveGate,
    SigmoidGate,
    TopKJSD,
    TwoViewKL,
)
from skillsd.optimizer import OptimizerSettings
from skillsd.policy import Policy, Scores, TokenSequence
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
                logp = policy.score("student", [TokenSequence(prompt, tokens, mask)], TEMPERATURE).logp[0].tolist()
            logp = [x + rng.uniform(-spread, spread) if m else 0.0 for x, m in zip(logp, mask, strict=True)]
            t = Trajectory(
                0, f"t{number}", member, 0, "", tuple(prompt), tuple(tokens), tuple(mask), tuple(logp), (Turn("o", "a", reward),),
                reward, reward, reward == 1.0, "done", skill_id,
            )  # fmt: skip
            played.append(t)
        teacher = (*ids(7), *prompt) if skill_id is not None else tuple(prompt)
        prompts = [(p,) * len(row) for p in (tuple(prompt), teacher)]
        groups.append(TrajectoryGroup(Task(f"t{number}"), tuple(played), *prompts, skill_id, TEMPERATURE))
    return groups


def apart(groups: Sequence[TrajectoryGroup], seed: int = 5) -> list[TrajectoryGroup]:
    """The same, each member with prompts of its own: acted, student's and teacher's differ, in length too."""
    rng = random.Random(seed)

    def ids() -> tuple[int, ...]:
        return tuple(rng.randrange(5, 60) for _ in range(rng.randint(3, 9)))

    return [
        replace(g, student_prompts=tuple(ids() for _ in g.trajectories), teacher_prompts=tuple(ids() for _ in g.trajectories))
        for g in groups
    ]


def scores(policy: Policy, adapter: str, prompt: Sequence[int], t: Trajectory) -> Tensor:
    """Log-probs of the trajectory's tokens, 0 where they are no actions."""
    with torch.no_grad():
        return policy.score(adapter, [TokenSequence(prompt, t.token_ids, t.action_mask)], TEMPERATURE).logp[0]


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
    """Of every iteration: the gradient after the step, what was logged, what the teacher was asked, and on what the student trained."""

    policy: Policy
    grads: list[list[Tensor]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    gaps: list[Tensor] = field(default_factory=list)
    asked: list[list[TokenSequence]] = field(default_factory=list)
    trained: list[list[TokenSequence]] = field(default_factory=list)

    def on_train_batch_start(self, *_: Any) -> None:
        self.asked.append([])
        self.trained.append([])

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.policy.student_parameters()])
        self.metrics.append(dict(outputs["metrics"]))
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

        def spy(adapter: str, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> Scores:
            if steps.asked:
                (steps.asked if adapter == "teacher" else steps.trained)[-1].extend(sequences)
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


def same_gradient(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Equal but for float32 rounding, relative to the whole gradient's norm."""
    assert (flat(a) - flat(b)).norm() <= ROUNDING * flat(b).norm()


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith(("time/", "memory/")) and not math.isnan(v)}


@dataclass
class Row:
    """The actions of one trajectory, from full logits: both distributions at each of them, and the log-probs of what was sampled."""

    group: TrajectoryGroup
    member: int
    student: Tensor
    teacher: Tensor
    picked: Tensor
    recorded: Tensor
    advantage: float

    def logp(self, of: Tensor) -> Tensor:
        return of.gather(-1, self.picked[:, None])[:, 0]

    @property
    def ell(self) -> Tensor:
        return self.logp(self.student) - self.logp(self.teacher)

    @property
    def old(self) -> Tensor:
        """Of the student at the rollout: Eq. 13 has today's where the teacher sampled."""
        return self.logp(self.student).detach() if self.group.sampled_by_teacher else self.recorded

    def grpo(self, shift: Tensor | float = 0.0) -> Tensor:
        ratio, advantage = (self.logp(self.student) - self.old).exp(), self.advantage + shift
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)

    @property
    def rho(self) -> Tensor:
        return (self.logp(self.student) - self.recorded).exp()


def in_full(policy: Policy, groups: Sequence[TrajectoryGroup]) -> list[Row]:
    """One trajectory at a time; those without an action are in the baseline alone."""

    def full(prompt: Sequence[int], t: Trajectory) -> Tensor:
        ids = torch.tensor([[*prompt, *t.token_ids]])
        at = torch.tensor(t.action_mask).nonzero()[:, 0] + len(prompt)
        return (policy.base(input_ids=ids).logits[0, at - 1].float() / TEMPERATURE).log_softmax(-1)

    rows = []
    for g in groups:
        rewards = [t.reward for t in g.trajectories]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        for k, t in ((k, t) for k, t in enumerate(g.trajectories) if t.n_actions):
            mask = torch.tensor(t.action_mask)
            with policy.acting("teacher"):
                teacher = full(g.teacher_prompts[k], t)
            student = full(g.student_prompts[k], t)
            picked, recorded = torch.tensor(t.token_ids)[mask], torch.tensor(t.logprobs)[mask]
            rows.append(Row(g, k, student, teacher, picked, recorded, (t.reward - mean) / (std + 1e-8)))
    return rows


def by_hand(policy: Policy, groups: Sequence[TrajectoryGroup]) -> tuple[Tensor, Tensor]:
    """Both losses from Eq. 3-14, one trajectory at a time, on full logits."""
    rows = in_full(policy, groups)
    n = sum(len(r.picked) for r in rows)
    sdl = torch.stack([(r.rho * ((-r.ell).exp() - 1 + r.ell)).sum() for r in rows]).sum()
    return torch.stack([r.grpo().sum() for r in rows]).sum() / n, sdl / n


def gradient(policy: Policy, loss: Tensor) -> tuple[Tensor, ...]:
    """Before any step: an optimizer's step, even of rate 0, counts as a change."""
    return torch.autograd.grad(loss, policy.student_parameters(), retain_graph=True)


# -- the gradient -----------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_paper(make_policy, step):
    """(Also each term's norm, with and without clipping, and the logged losses.)"""
    policy = make_policy()
    groups, params = make_groups(policy), policy.student_parameters()
    grpo, sdl = by_hand(policy, groups)
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
    groups = apart(make_groups(policy))
    grpo, sdl = by_hand(policy, groups)
    want = gradient(policy, grpo + 0.5 * sdl)
    for tokens in (1, 60, 4096):
        steps = step(policy, groups, micro_batch_tokens=tokens)
        same_gradient(steps.grads[0], want)
        for asked, prompts in ((steps.trained, "student_prompts"), (steps.asked, "teacher_prompts")):
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


def test_micro_batches_change_nothing(make_policy, step):
    policy = make_policy()
    groups = make_groups(policy)
    whole = step(policy, groups)
    for tokens in (1, 40, 90):
        parts = step(policy, groups, micro_batch_tokens=tokens)
        same_update(parts, whole)


def same_update(a: Steps, b: Steps) -> None:
    """But for rounding."""
    same_gradient(a.grads[0], b.grads[0])
    close(timeless(a.metrics[0]), timeless(b.metrics[0]))
    close(a.gaps[0], b.gaps[0])


@pytest.mark.parametrize(("view", "where"), [("student", "forward"), ("student", "backward"), ("teacher", "forward")])
def test_out_of_memory_halves_the_micro_batch(make_policy, step, monkeypatch, caplog, view, where):
    """Repeated from the start: what the failed attempt had added up, gradients included, is gone."""
    policy = make_policy()
    groups = make_groups(policy)
    whole = step(policy, groups)
    longest = max(len(p) + len(t.token_ids) for g in groups for t, p in zip(g.trajectories, g.teacher_prompts, strict=True))
    done: list[int] = []  # padded sizes of the forwards that went well
    score = type(policy)._score

    def room(self: Policy, sequences: Sequence[TokenSequence], temperature: float) -> Scores:
        padded = len(sequences) * max(map(len, sequences))
        if torch.is_grad_enabled() != (view == "student"):
            return score(self, sequences, temperature)
        if not done or padded <= longest:  # the very first goes well, and leaves its gradient
            done.append(padded)
            return score(self, sequences, temperature)
        if where == "forward":
            raise torch.OutOfMemoryError("no room")
        out = score(self, sequences, temperature)

        def fail(gradient: Tensor) -> None:
            raise torch.OutOfMemoryError("no room")

        out.logp.register_hook(fail)
        return out

    monkeypatch.setattr(type(policy), "_score", room)
    steps = step(policy, groups, micro_batch_tokens=3 * longest)
    same_update(steps, whole)
    used = [int(m["memory/micro_batch_tokens"]) for m in steps.metrics]
    assert used[0] < 3 * longest and done[0] > longest >= max(done[1:])
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert said and said[-1].endswith(f"micro_batch_tokens {used[0]}")


def test_a_row_that_does_not_fit_alone(make_policy, step, monkeypatch):
    policy = make_policy()
    groups = make_groups(policy)

    def full(self: Policy, sequences: Sequence[TokenSequence], temperature: float) -> Scores:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(type(policy), "_score", full)
    with pytest.raises(ConfigError, match=r"a trajectory of \d+ tokens alone.*gradient_checkpointing.*head_chunk.*max_trajectory_tokens"):
        step(policy, groups)


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


# -- the teacher ------------------------------------------------------------------------------------------------------------


def test_an_empty_skill_with_equal_weights_asks_no_teacher(make_policy, step):
    policy = make_policy()
    policy.sync()
    groups = make_groups(policy, skills=(None, 8))
    equal = step(policy, groups, same=True)
    assert [s.prompt_ids for s in equal.asked[0]] == [*groups[1].teacher_prompts]
    assert equal.gaps[0][0] == 0 != equal.gaps[0][1]

    plain = make_groups(policy, skills=(None, None))
    none = step(policy, plain, same=True)
    assert none.asked == [[]] and none.gaps[0].eq(0).all()
    assert none.metrics[0]["loss/distillation"] == none.metrics[0]["teacher/gap_mean"] == none.metrics[0]["grad_norm/distillation"] == 0
    # Scoring it all the same gives the same: the forward that is skipped is one that says nothing.
    scored = step(policy, plain, same=False)
    assert len(scored.asked[0]) == 6 and scored.gaps[0].abs().max() < ROUNDING
    same_gradient(scored.grads[0], none.grads[0])

    untaught = step(policy, groups, objective=Objective(distillation_weight=0.0))
    assert untaught.asked == [[]] and math.isnan(untaught.metrics[0]["grad_norm/distillation"])


def test_members_that_are_told_nothing_ask_no_teacher(make_policy, step):
    """Within a group: who sees what the student sees needs none."""
    policy = make_policy()
    policy.sync()
    first, second = make_groups(policy)
    some = replace(first, teacher_prompts=(first.teacher_prompts[0], *first.student_prompts[1:]))
    assert [some.has_teacher_context(k) for k in range(3)] == [True, False, False]
    grpo, sdl = by_hand(policy, [some, second])
    want = gradient(policy, grpo + 0.5 * sdl)
    steps = step(policy, [some, second], same=True)
    same_gradient(steps.grads[0], want)
    told = [first.trajectories[0], *second.trajectories]
    assert sorted(s.token_ids for s in steps.asked[0]) == sorted(t.token_ids for t in told)
    m = steps.metrics[0]
    assert m["teacher/skill_share"] == pytest.approx(4 / 6)
    gaps = torch.cat([(scores(policy, "teacher", g.teacher_prompts[t.member], t) - scores(policy, "student", t.prompt_ids, t))
                      for g in (some, second) for t in g.trajectories if t in told])  # fmt: skip
    close(m["teacher/gap_mean"], float(gaps.sum()) / sum(t.n_actions for t in told))  # over those alone


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
    fits = [len(p) + len(t.token_ids) for g in groups for p, t in zip(g.teacher_prompts, g.trajectories, strict=True)]
    plain = max(len(t.prompt_ids) + len(t.token_ids) for g in groups for t in g.trajectories)
    policy.context_length = limit = sorted(fits)[3]
    assert plain <= limit < max(fits)  # the student's rows all fit
    steps = step(policy, groups, micro_batch_tokens=1)
    assert steps.metrics[0]["teacher/dropped_rows"] == sum(n > limit for n in fits) > 0
    assert len(steps.asked[0]) == sum(n <= limit for n in fits)
    prompts = {p for g in groups for p in g.teacher_prompts}
    assert all(s.prompt_ids in prompts and len(s) <= limit for s in steps.asked[0])

    policy.context_length = plain  # none fits: only GRPO is left
    alone = step(policy, groups)
    assert alone.metrics[0]["teacher/dropped_rows"] == sum(n > plain for n in fits)
    policy.context_length = 1
    none = step(policy, groups)
    assert none.asked == [[]] and none.metrics[0]["teacher/dropped_rows"] == 6 and none.gaps[0].eq(0).all()
    same_gradient(none.grads[0], step(policy, groups, objective=Objective(distillation_weight=0.0)).grads[0])


def test_the_gap_of_a_group_is_aligned_with_its_outcome(make_policy, step):
    """What a use is worth to the bank: sum of A_i * (log tea - log stu) over the group's action tokens."""
    policy = make_policy()
    groups = make_groups(policy)
    steps, want = step(policy, groups), []
    for g in groups:
        rewards, total = torch.tensor([t.reward for t in g.trajectories]), 0.0
        for k, (t, a) in enumerate(zip(g.trajectories, ((rewards - rewards.mean()) / rewards.std()).tolist(), strict=True)):
            teacher, student = scores(policy, "teacher", g.teacher_prompts[k], t), scores(policy, "student", g.student_prompts[k], t)
            total += a * float((teacher - student).sum())
        want.append(total)
    close(steps.gaps[0].tolist(), want, times=4)
    n = sum(t.n_actions for g in groups for t in g.trajectories)
    close(steps.metrics[0]["teacher/health"], sum(want) / n)


# -- Eq. 13: the teacher rolls out ---------------------------------------------------------------------------------------------


def recorded(policy: Policy, t: Trajectory, adapter: str, prompt: tuple[int, ...], spread: float = 0.0) -> Trajectory:
    """The same tokens as if `adapter` had sampled them under `prompt`, log-probs off by up to `spread`."""
    rng = random.Random(len(t.token_ids))
    logp = zip(scores(policy, adapter, prompt, t).tolist(), t.action_mask, strict=True)
    return replace(t, prompt_ids=prompt, logprobs=tuple(x + rng.uniform(-spread, spread) if m else 0.0 for x, m in logp))


def sampled_by_teacher(policy: Policy, groups: Sequence[TrajectoryGroup], spread: float = 0.0) -> list[TrajectoryGroup]:
    return [
        replace(
            g, sampled_by_teacher=True,
            trajectories=tuple(recorded(policy, t, "teacher", p, spread) for t, p in zip(g.trajectories, g.teacher_prompts, strict=True)),
        )
        for g in groups
    ]  # fmt: skip


def test_the_teacher_s_rollout(make_policy, step):
    """GRPO's ratio is 1, since the old student is today's; rho is the student over the teacher, whose log-probs are on record."""
    policy = make_policy()
    groups = sampled_by_teacher(policy, make_groups(policy))
    rows = in_full(policy, groups)
    n = sum(len(r.picked) for r in rows)
    by_reward = -sum((r.advantage * r.logp(r.student)).sum() for r in rows) / n
    by_teacher = sum((r.ell.exp().detach() * r.ell.detach() * r.logp(r.student)).sum() for r in rows) / n  # Prop. 2
    want = gradient(policy, by_reward + 0.5 * by_teacher)
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
    own, taught = make_groups(policy), sampled_by_teacher(policy, apart(make_groups(policy, seed=3)), spread=0.4)
    for groups in (taught, [own[0], taught[1]], [taught[0], own[1]]):
        grpo, sdl = by_hand(policy, groups)
        want = gradient(policy, grpo + 0.5 * sdl)
        for tokens in (1, 90, 4096):
            same_gradient(step(policy, groups, micro_batch_tokens=tokens).grads[0], want)


# -- other signals ------------------------------------------------------------------------------------------------------------


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def top_jsd(row: Row, k: int, alpha: float) -> Tensor:
    """SDPO's, on probabilities in float64, position by position."""
    out = []
    for p, q in zip(row.student.double().exp(), row.teacher.double().exp(), strict=True):
        top = sorted(range(len(p)), key=lambda i: -p[i].item())[:k]
        p, q = (torch.cat([x[top], (x.sum() - x[top].sum())[None]]) for x in (p, q))
        m = (1 - alpha) * p + alpha * q
        out.append((1 - alpha) * kl(p, m) + alpha * kl(q, m))
    return torch.stack(out)


SIGNALS: dict[str, tuple[Any, Callable[[Row], Tensor]]] = {
    "sdpg": (FullReverseKL(), lambda r: kl(r.student.double().exp(), r.teacher.double().exp())),
    "sdpo": (TopKJSD(k=4, alpha=0.3), lambda r: r.rho.detach().clamp_max(2.0) * top_jsd(r, 4, 0.3)),
}


def ragged(policy: Policy) -> tuple[list[TrajectoryGroup], Callable[[Row], bool]]:
    """Members with prompts of their own, some of them not taught: told nothing, or too much. And which are."""
    first, second = apart(make_groups(policy))
    first = replace(first, teacher_prompts=(*first.teacher_prompts[:2], first.student_prompts[2]))
    second = replace(second, teacher_prompts=(second.teacher_prompts[0] * 12, *second.teacher_prompts[1:]))
    policy.context_length = limit = 40
    lengths = {(g.task.task_id, k): len(g.teacher_prompts[k]) + len(g.trajectories[k].token_ids) for g in (first, second) for k in range(3)}
    assert lengths["t1", 0] > limit and sum(n <= limit for n in lengths.values()) == 5
    return [first, second], lambda r: r.group.has_teacher_context(r.member) and lengths[r.group.task.task_id, r.member] <= limit


@pytest.mark.parametrize("name", SIGNALS)
def test_whole_distributions(make_policy, step, name):
    """Their gradient is that of a direct computation on full logits, whatever the micro-batches; rows without a teacher add nothing."""
    signal, divergence = SIGNALS[name]
    policy = make_policy(head_chunk=3)
    policy.sync()
    with torch.no_grad():  # the student has moved on a little
        for p in policy.student_parameters():
            p.add_(0.05 * torch.randn_like(p))
    groups, taught = ragged(policy)
    rows = in_full(policy, groups)
    n = sum(len(r.picked) for r in rows)
    grpo = sum(r.grpo().sum() for r in rows) / n
    added = 0.5 * sum(divergence(r).sum() for r in rows if taught(r)) / n
    good = 0.5 * sum(divergence(r).sum() for r in rows if taught(r) and r.advantage > 0) / n
    each, want = [gradient(policy, x.float()) for x in (grpo, added)], gradient(policy, (grpo + good).float())
    untold = groups[0].trajectories[2].token_ids
    for tokens in (1, 60, 120, 4096):
        steps = step(policy, groups, objective=Objective(distillation_weight=0.5, loss=signal), micro_batch_tokens=tokens, same=True)
        m = steps.metrics[0]
        same_gradient(steps.grads[0], [a + b for a, b in zip(*each, strict=True)])
        assert m["loss/distillation"] == pytest.approx(added.item(), rel=1e-4)
        assert m["grad_norm/distillation"] == pytest.approx(float(flat(each[1]).norm()), rel=1e-3) and m["teacher/dropped_rows"] == 1
        assert len(steps.asked[0]) == 4 and untold not in [s.token_ids for s in steps.asked[0]]
    gated = step(policy, groups, objective=Objective(distillation_weight=0.5, loss=signal, gate=PositiveGate()), same=True)
    same_gradient(gated.grads[0], want)
    assert 0 < good.item() < added.item()


def halves(policy: Policy, rewards: Sequence[Sequence[float]], skills: Sequence[int | None]) -> list[TrajectoryGroup]:
    """The second half of each group acted with the skill in front; each half's teacher is the other view."""
    groups = []
    for g in make_groups(policy, rewards, skills):
        plain, told = g.student_prompts[0], g.teacher_prompts[0]
        acted, other = ((plain,) * 2 + (told,) * 2), ((told,) * 2 + (plain,) * 2)
        played = tuple(recorded(policy, t, "student", p, 0.1) for t, p in zip(g.trajectories, acted, strict=True))
        groups.append(replace(g, trajectories=played, student_prompts=acted, teacher_prompts=other))
    return groups


def test_the_view_that_fared_better_teaches_the_other(make_policy, step):
    """UCOB's weights come from the halves' mean rewards, in either direction; its divergence is the other view's top K."""
    policy = make_policy(head_chunk=3)
    rewards = ((1.0, 0.0, 0.5, 0.0), (0.0, 0.0, 1.0, 1.0), (0.5, 0.0, 0.54, 0.0), (1.0, 1.0, 0.0, 0.0))
    groups = halves(policy, rewards, (3, 8, 9, None))
    weights = {("t0", 2): 1.25, ("t0", 3): 1.25, ("t1", 0): 2.0, ("t1", 1): 2.0}  # t2's gap is too small, and t3 has no skill
    rows = in_full(policy, groups)
    n, grpo = sum(len(r.picked) for r in rows), sum(r.grpo().sum() for r in rows)
    added = torch.zeros(())
    for r in rows:
        top = r.teacher.topk(6).indices
        q, p = (x.gather(-1, top).exp() for x in (r.teacher, r.student))
        gate = torch.sigmoid(-5 * r.ell.detach())
        added = added + (weights.get((r.group.task.task_id, r.member), 0.0) * gate * kl(q / q.sum(-1, True), p / p.sum(-1, True))).sum()
    want = gradient(policy, (grpo + 0.1 * added) / n)
    objective = Objective(distillation_weight=0.1, loss=TwoViewKL(k=6), gate=SigmoidGate(5.0))
    for tokens in (1, 100, 4096):
        steps = step(policy, groups, objective=objective, micro_batch_tokens=tokens)
        same_gradient(steps.grads[0], want)
        assert steps.metrics[0]["loss/distillation"] == pytest.approx((0.1 * added / n).item(), rel=1e-4)
    assert added.item() > 0


def test_a_gate_that_knows_the_outcome(make_policy, step):
    """Each row's own success and its own mean gap, whatever micro-batch it is in."""
    policy = make_policy()
    groups = apart(make_groups(policy))
    rows = in_full(policy, groups)
    n, grpo, added, signs = sum(len(r.picked) for r in rows), 0.0, 0.0, set()
    for r in rows:
        gap = (-r.ell.detach()).clamp(-3, 3).mean().item()
        sign = (1 if gap > 0.05 else -1 if gap < -0.05 else 0) * (1 if r.group.trajectories[r.member].success else -1)
        signs.add((sign, r.group.trajectories[r.member].success))
        grpo, added = grpo + r.grpo().sum(), added + sign * kl(r.student.double().exp(), r.teacher.double().exp()).sum()
    assert len(signs) > 2  # for and against, of solved ones and others
    want = gradient(policy, ((grpo + 0.5 * added) / n).float())
    objective = Objective(distillation_weight=0.5, loss=FullReverseKL(), gate=OutcomeGate())
    for tokens in (1, 60, 4096):
        same_gradient(step(policy, groups, objective=objective, micro_batch_tokens=tokens).grads[0], want)


@pytest.mark.parametrize("placement", ["advantage", "multiplier"])
def test_a_signal_in_the_advantage(make_policy, step, placement):
    """OPID adds w (log tea - log old), RLSD multiplies; both through GRPO's ratio and bounds, and in taught rows alone."""
    policy = make_policy()
    groups, taught = ragged(policy)

    def shift(r: Row) -> Tensor:
        if placement == "advantage":
            return 0.5 * (r.logp(r.teacher) - r.old)
        return 0.5 * r.advantage * ((math.copysign(1, r.advantage) * -r.ell).exp().clamp(0.8, 1.2) - 1)

    rows = in_full(policy, groups)
    n = sum(len(r.picked) for r in rows)
    shifts = [shift(r).detach() if taught(r) else torch.zeros(len(r.picked)) for r in rows]
    loss = sum(r.grpo(x).sum() for r, x in zip(rows, shifts, strict=True)) / n
    plain = sum(r.grpo().sum() for r in rows) / n
    signal = {"advantage": GapAdvantage(), "multiplier": GapMultiplier(clip=0.2)}[placement]
    objective, want = Objective(distillation_weight=0.5, **{placement: signal}), gradient(policy, loss)
    for tokens in (1, 4096):
        # As if the adapters were one: then a row that is told nothing needs no teacher.
        steps = step(policy, groups, objective=objective, micro_batch_tokens=tokens, same=True)
        m = steps.metrics[0]
        same_gradient(steps.grads[0], want)
        close((m["loss/total"], m["loss/policy"]), (loss.item(), plain.item()))
        close(m["loss/distillation"], (loss - plain).item())
        heard = sum(len(r.picked) for r in rows if taught(r))
        assert m["teacher/shift"] == pytest.approx(float(sum(x.abs().sum() for x in shifts)) / heard, rel=1e-4) and m["teacher/shift"] > 0


def test_the_weight_moves_over_iterations(make_policy, step):
    """By the optimizer's steps; at weight 0 no teacher is asked."""
    policy = make_policy()
    batch = make_groups(policy)
    steps = step(policy, *[batch] * 5, objective=Objective(distillation_weight=0.6, weight_steps=3, weight_end=0.0))
    assert [m["teacher/weight"] for m in steps.metrics] == pytest.approx([0.6, 0.4, 0.2, 0.0, 0.0])
    assert [len(x) for x in steps.asked] == [6, 6, 6, 0, 0]
    first = steps.metrics[0]["loss/distillation"]
    assert [m["loss/distillation"] / first for m in steps.metrics] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0], rel=1e-5)
    constant = step(policy, batch, batch, objective=Objective(distillation_weight=0.6))
    assert [m["teacher/weight"] for m in constant.metrics] == [0.6, 0.6]
    rising = step(policy, batch, batch, batch, objective=Objective(distillation_weight=0.0, weight_steps=2, weight_end=0.4))
    assert [m["teacher/weight"] for m in rising.metrics] == pytest.approx([0.0, 0.2, 0.4])
    assert [len(x) for x in rising.asked] == [0, 6, 6]


# -- groups without a signal --------------------------------------------------------------------------------------------------


def test_zero_variance_groups(make_policy, step):
    policy = make_policy()
    groups = make_groups(policy, rewards=((0.1, 0.1, 0.1), (1.0, 1.0, 1.0)), skills=(None, None))
    grpo = step(policy, groups, objective=Objective(distillation_weight=0.0))
    assert flat(grpo.grads[0]).eq(0).all() and grpo.metrics[0]["reward/zero_variance"] == 1.0
    taught = step(policy, groups)
    assert taught.metrics[0]["grad_norm/policy"] < ROUNDING < taught.metrics[0]["grad_norm/distillation"]
    mixed = step(policy, [groups[0], make_groups(policy)[1]])
    assert mixed.metrics[0]["reward/zero_variance"] == 0.5


@pytest.mark.parametrize("policy_weight", [1.0, 0.0])
def test_groups_that_are_left_out(make_policy, step, policy_weight):
    """Their rows are in no loss, not in N, and no forward is made for them; the rewards that are logged are everybody's."""
    policy = make_policy()
    groups = make_groups(policy, ((0.1, 0.1, 0.1), (1.0, 0.0, 0.5), (1.0, 1.0, 1.0)), (3, 8, None))
    weights: dict[str, Any] = {"policy_weight": policy_weight, "distillation_weight": 0.5}
    alone = step(policy, [groups[1]], objective=Objective(**weights))
    every = step(policy, groups, objective=Objective(**weights))
    for tokens in (1, 60, 4096):
        kept = step(policy, groups, objective=Objective(**weights, group_filter="zero_variance"), micro_batch_tokens=tokens)
        same_gradient(kept.grads[0], alone.grads[0])
        assert {s.token_ids for s in (*kept.asked[0], *kept.trained[0])} == {t.token_ids for t in groups[1].trajectories}
        assert kept.gaps[0][[0, 2]].eq(0).all()
        close(kept.gaps[0][1], alone.gaps[0][0])
        m, a, e = kept.metrics[0], alone.metrics[0], every.metrics[0]
        for key in METRICS:
            if math.isnan(a[key]) or key.startswith(("time/", "memory/")):
                continue
            overall = key.startswith(("reward/", "rollout/")) or key == "teacher/skill_share"
            close(m[key], e[key] if overall else a[key], where=key)
    assert (flat(every.grads[0]) - flat(alone.grads[0])).norm() > 1e-3

    before = [p.clone() for p in policy.student_parameters()]
    filtered = Objective(**weights, group_filter="zero_variance")
    none = step(policy, groups[::2], objective=filtered, optimizer=OptimizerSettings(lr=1.0))
    assert flat(policy.student_parameters()).equal(flat(before)) and none.asked == none.trained == [[]] and none.gaps[0].eq(0).all()
    assert none.metrics[0]["loss/total"] == none.metrics[0]["learner/tokens"] == 0 < none.metrics[0]["rollout/action_tokens"]


def test_trajectories_without_tokens(make_policy, step):
    """A prompt that did not fit leaves an episode without a turn: it counts in the baseline, not in N."""
    policy = make_policy()
    first, second = make_groups(policy)

    def empty(t: Trajectory) -> Trajectory:
        return replace(t, token_ids=(), action_mask=(), logprobs=(), turns=(), finish_reason="length")

    some = replace(first, trajectories=(first.trajectories[0], *map(empty, first.trajectories[1:])))
    grpo, sdl = by_hand(policy, [some, second])
    want = gradient(policy, grpo + 0.5 * sdl)
    mixed = step(policy, [some, second], micro_batch_tokens=1)
    same_gradient(mixed.grads[0], want)
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


def without(g: TrajectoryGroup, *members: int) -> TrajectoryGroup:
    left = [k for k in range(len(g.trajectories)) if k not in members]
    return replace(
        g, trajectories=tuple(g.trajectories[k] for k in left), student_prompts=tuple(g.student_prompts[k] for k in left),
        teacher_prompts=tuple(g.teacher_prompts[k] for k in left),
    )  # fmt: skip


def lose(g: TrajectoryGroup, *members: int, kind: str = "raised") -> TrajectoryGroup:
    def lost(t: Trajectory) -> Trajectory:
        return replace(t, reward=0.0, completion=0.0, success=False, finish_reason="failed", failure=f"{kind}: x")

    return replace(g, trajectories=tuple(lost(t) if k in members else t for k, t in enumerate(g.trajectories)))


def test_failed_episodes_are_in_no_statistic(make_policy, step):
    """The update and what is logged are those of a batch without them; of a group with one left the advantage is 0."""
    policy = make_policy()
    first, second = make_groups(policy, ((1.0, 0.0, 0.5, 0.25), (0.0, 1.0, 1.0)))
    lost = step(policy, [lose(first, 0, 3), second], micro_batch_tokens=60)
    clean = step(policy, [without(first, 0, 3), second])
    same_gradient(lost.grads[0], clean.grads[0])
    close(lost.gaps[0], clean.gaps[0])
    assert {s.token_ids for s in (*lost.asked[0], *lost.trained[0])}.isdisjoint(first.trajectories[k].token_ids for k in (0, 3))
    m, want = lost.metrics[0], clean.metrics[0]
    for key in METRICS:
        if not math.isnan(want[key]) and not key.startswith(("time/", "memory/", "rollout/")):
            close(m[key], want[key], where=key)
    assert m["rollout/failed"] == pytest.approx(2 / 7) and m["rollout/failed_raised"] == 2 and m["rollout/failed_hung"] == 0
    assert m["rollout/env_steps"] == 7  # they were played

    grpo = Objective(distillation_weight=0.0)
    single = step(policy, [lose(first, 0, 1, 3)], objective=grpo)
    assert flat(single.grads[0]).eq(0).all() and single.metrics[0]["reward/mean"] == 0.5

    before = [p.clone() for p in policy.student_parameters()]
    none = step(
        policy, [lose(first, 0, 1, 2, 3), lose(second, 0, 1, 2, kind="hung")], optimizer=OptimizerSettings(lr=1.0, weight_decay=0.5)
    )
    assert flat(policy.student_parameters()).equal(flat(before)) and none.asked == none.trained == [[]]
    assert none.metrics[0]["rollout/failed"] == 1 and none.metrics[0]["rollout/failed_hung"] == 3


def test_returns_are_compared_without_failed_episodes(make_policy):
    """UCOB's gap between the two views."""
    policy = make_policy()
    (g,) = make_groups(policy, ((1.0, 0.0, 0.5, 0.25),), (3,))
    acted = [g.student_prompts[0]] * 2 + [g.teacher_prompts[0]] * 2
    g = replace(g, trajectories=tuple(replace(t, prompt_ids=p) for t, p in zip(g.trajectories, acted, strict=True)))
    assert return_gap(g, 0) == pytest.approx(0.375 - 0.5)
    assert return_gap(lose(g, 1, 2), 0) == pytest.approx(0.25 - 1.0)
    assert math.isnan(return_gap(lose(g, 2, 3), 0))


def test_groups_of_one(make_policy, step):
    """Without a policy loss there is nothing to compare with; with it the error names the key."""
    policy = make_policy()
    groups = make_groups(policy, rewards=((1.0,), (0.0,)))
    alone = step(policy, groups, objective=Objective(policy_weight=0.0, distillation_weight=0.5))
    assert alone.metrics[0]["grad_norm/distillation"] > 0 and alone.metrics[0]["teacher/health"] == 0
    with pytest.raises(ValueError, match="group_size"):
        step(policy, groups)


# -- counts and times ---------------------------------------------------------------------------------------------------------


def test_steps_and_tokens(make_policy, step):
    """Turns that were played, tokens of all episodes with their prompts, and tokens that went through a forward of the learner."""
    policy = make_policy()
    first, second = apart(make_groups(policy))
    turn = first.trajectories[0].turns[0]
    first = replace(first, trajectories=tuple(replace(t, turns=(turn,) * n) for t, n in zip(first.trajectories, (4, 1, 2), strict=True)))
    lost = replace(second.trajectories[0], token_ids=(), action_mask=(), logprobs=(), turns=(), finish_reason="length")
    second = replace(second, trajectories=(lost, *second.trajectories[1:]))
    second = replace(second, teacher_prompts=(*second.teacher_prompts[:2], (7,) * 400))
    policy.context_length = 300
    m = step(policy, [first, second]).metrics[0]
    rows = [t for g in (first, second) for t in g.trajectories]
    assert m["rollout/env_steps"] == 4 + 1 + 2 + 0 + 1 + 1 and m["rollout/turns"] == pytest.approx(9 / 6)
    assert m["rollout/tokens"] == sum(len(t.prompt_ids) + len(t.token_ids) for t in rows)
    assert m["rollout/action_tokens"] == sum(t.n_actions for t in rows)
    pairs = [(p, t) for g in (first, second) for p, t in zip(g.student_prompts, g.trajectories, strict=True)]
    student = sum(len(p) + len(t.token_ids) for p, t in pairs if t.n_actions)
    pairs = [(p, t) for g in (first, second) for p, t in zip(g.teacher_prompts, g.trajectories, strict=True)]
    teacher = sum(len(p) + len(t.token_ids) for p, t in pairs if t.n_actions and len(p) < 300)
    assert m["learner/tokens"] == student + teacher and m["teacher/dropped_rows"] == 1
    alone = step(policy, [first, second], objective=Objective(distillation_weight=0.0)).metrics[0]
    assert alone["learner/tokens"] == student and alone["rollout/tokens"] == m["rollout/tokens"]


def test_the_teacher_s_time_is_told_apart(make_policy, step, monkeypatch):
    policy, score = make_policy(), Policy.score
    groups, slow = make_groups(policy), {"teacher": 0.05, "student": 0.02}

    def slowly(self: Policy, adapter: str, *args: Any) -> Scores:
        time.sleep(slow[adapter])
        return score(self, adapter, *args)

    monkeypatch.setattr(Policy, "score", slowly)
    started = time.perf_counter()
    each = step(policy, groups, groups, groups, micro_batch_tokens=1).metrics  # a forward a row
    seconds = time.perf_counter() - started
    assert sum(m["time/teacher_s"] + m["time/update_s"] for m in each) < seconds  # of one iteration each, not of all so far
    for m in each:
        assert m["time/teacher_s"] >= 6 * 0.05 and m["time/update_s"] >= 6 * 0.02
        assert m["time/learner_tokens_per_s"] == pytest.approx(m["learner/tokens"] / (m["time/teacher_s"] + m["time/update_s"]), rel=1e-3)
        assert all(math.isnan(m[k]) for k in ("time/rollout_s", "time/summary_s"))  # others' business
    alone = step(policy, groups, groups, objective=Objective(distillation_weight=0.0)).metrics
    assert all(m["time/teacher_s"] < 0.05 < 100 * m["time/update_s"] for m in alone)


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
    # A length of its own: the cosine does not follow a run that ends sooner, and stays at 0 in one that goes on.
    assert lr(3, warmup_steps=2, schedule="cosine", schedule_steps=6) == pytest.approx([0.5e-4, 1e-4, *cosine[:1]])
    assert lr(8, warmup_steps=2, schedule="cosine", schedule_steps=6) == pytest.approx([0.5e-4, 1e-4, *cosine, 0.0, 0.0], abs=1e-12)


def test_how_often_norms_are_measured(make_policy, step):
    policy = make_policy()
    batch = make_groups(policy)
    for every, measured in ((0, []), (2, [0, 2]), (1, [0, 1, 2])):
        steps = step(policy, *[batch] * 3, grad_norm_every=every)
        assert [i for i, m in enumerate(steps.metrics) if not math.isnan(m["grad_norm/distillation"])] == measured
        for g in steps.grads:
            assert flat(g).equal(flat(steps.grads[0]))


def test_settings_are_checked():
    for settings in ({"lr": -1.0}, {"warmup_steps": -1}, {"weight_decay": -0.1}, {"gradient_clip_norm": -1.0}):
        with pytest.raises(ConfigError, match=r"model\.optimizer"):
            OptimizerSettings(**settings)


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
