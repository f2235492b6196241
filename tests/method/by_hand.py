"""Losses computed one trajectory at a time on full logits, as Eq. 3-14 are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tests.method.groups import TEMPERATURE
from torch import Tensor

from skillsd.policy import Policy
from skillsd.trajectory import Trajectory, TrajectoryGroup


@dataclass
class FullRow:
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
        """Log-probs of the student at the rollout: Eq. 13 has today's where the teacher sampled."""
        return self.logp(self.student).detach() if self.group.sampled_by_teacher else self.recorded

    def grpo(self, shift: Tensor | float = 0.0) -> Tensor:
        ratio, advantage = (self.logp(self.student) - self.old).exp(), self.advantage + shift
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)

    @property
    def rho(self) -> Tensor:
        return (self.logp(self.student) - self.recorded).exp()


def rows_from_full_logits(policy: Policy, groups: Sequence[TrajectoryGroup]) -> list[FullRow]:
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
            rows.append(FullRow(g, k, student, teacher, picked, recorded, (t.reward - mean) / (std + 1e-8)))
    return rows


def paper_losses(policy: Policy, groups: Sequence[TrajectoryGroup]) -> tuple[Tensor, Tensor]:
    """Both losses from Eq. 3-14, one trajectory at a time, on full logits."""
    rows = rows_from_full_logits(policy, groups)
    n = sum(len(r.picked) for r in rows)
    sdl = torch.stack([(r.rho * ((-r.ell).exp() - 1 + r.ell)).sum() for r in rows]).sum()
    return torch.stack([r.grpo().sum() for r in rows]).sum() / n, sdl / n


def gradient(policy: Policy, loss: Tensor) -> tuple[Tensor, ...]:
    """Before any step: an optimizer's step, even of rate 0, counts as a change."""
    return torch.autograd.grad(loss, policy.student_parameters(), retain_graph=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)
