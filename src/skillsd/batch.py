"""An iteration's groups as rows to learn from, and what an update of them adds up, here and on other ranks."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skillsd import ranks
from skillsd.errors import ConfigError
from skillsd.objective import Objective, float32_rewards, group_advantages
from skillsd.policy import TokenSequence
from skillsd.trajectory import Trajectory, TrajectoryGroup

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass
class Update:
    """What an update adds up beside the gradient.

    Attributes:
        gaps: Per row, log pi_tea - log pi_stu.
        distillation_grad: The distillation's own gradient.
        sums: What is logged as a mean.
        largest_drift: Of |recorded - recomputed log-prob|, nats.
        peak_gib: Of the rank that took most.
        tokens: Where asked for, of each micro-batch the gap of action tokens that a teacher spoke to and log rho of all, [n] each.
    """

    gaps: Tensor
    distillation_grad: list[Tensor]
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    largest_drift: float = 0.0
    peak_gib: float = math.nan
    tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def reduce(done: Update, params: Sequence[torch.nn.Parameter]) -> None:
    """Add up what the ranks have: one reduction for the gradients, and what is logged."""
    done.peak_gib = peak_gib(params[0].device)
    if ranks.world() == 1:
        return
    trained, size = any(p.grad is not None for p in params), total_norm([p.detach() for p in params])
    tokens = [(gap.cpu(), rho.cpu()) for gap, rho in done.tokens]
    told = ranks.gather((trained, dict(done.sums), done.gaps, done.largest_drift, done.peak_gib, tokens, size))
    if not all(math.isclose(x[6], size, rel_tol=1e-3) for x in told):  # far beyond what rounding on unlike GPUs does
        raise ConfigError(f"the ranks' students differ (norms {[x[6] for x in told]}): start them with the same code, files and settings.")
    if any(x[0] for x in told):
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        ranks.add([*(p.grad for p in params if p.grad is not None), *done.distillation_grad])
    done.sums = defaultdict(float, {k: sum(x[1].get(k, 0.0) for x in told) for k in dict.fromkeys(k for x in told for k in x[1])})
    done.gaps = torch.stack([x[2] for x in told]).sum(0)
    done.largest_drift, done.peak_gib = max(x[3] for x in told), max(x[4] for x in told)
    done.tokens = [pair for x in told for pair in x[5]]


class Batch:
    """The groups of an iteration as rows.

    Attributes:
        student, teacher: What each scores, by row.
        told: Whether the row's teacher sees something that its student does not.
        by_teacher: Rows that the teacher sampled, bool [rows].
        advantage: Of each row relative to its group, float32 [rows]; 0 for failed episodes and in groups with fewer than two others.
        zero_variance: Of each group, whether all its advantages are 0; None if all its members failed.
        return_gap: See `objective.signal.Tokens`, [rows].
        kept: Rows that train: with an action, not failed, and not in a group that the filter leaves out.
    """

    def __init__(self, groups: Sequence[TrajectoryGroup], objective: Objective) -> None:
        self.rows = [t for g in groups for t in g.trajectories]
        members = [(g, k, t) for g in groups for k, t in enumerate(g.trajectories)]
        self.student = [TokenSequence(g.student_prompts[k], t.token_ids, t.action_mask) for g, k, t in members]
        self.teacher = [TokenSequence(g.teacher_prompts[k], t.token_ids, t.action_mask) for g, k, t in members]
        self.told = [g.told(k) for g, k, _ in members]
        self.by_teacher = torch.tensor([g.by_teacher for g, _, _ in members])
        self.return_gap = torch.tensor([return_gap(g, k) for g, k, _ in members])
        advantages = [advantages_of(g, objective.policy_weight > 0) for g in groups]
        self.advantage = torch.cat(advantages)
        self.zero_variance = [not bool(a.any()) if g.counted else None for g, a in zip(groups, advantages, strict=True)]
        dropped = objective.group_filter == "zero_variance"
        flat = [dropped and z for g, z in zip(groups, self.zero_variance, strict=True) for _ in g.trajectories]
        self.kept = [i for i, t in enumerate(self.rows) if t.n_actions and not t.failed and not flat[i]]

    def share(self, teacher_rows: Collection[int]) -> list[int]:
        """Of `kept` this rank's rows, of about as much work as every other's: a teacher's forward costs a third of a student's pass."""
        costs = [len(self.student[i]) + len(self.teacher[i]) / 3 * (i in teacher_rows) for i in self.kept]
        return [self.kept[k] for k in ranks.balanced(costs)]


def advantages_of(g: TrajectoryGroup, needed: bool = False) -> Tensor:
    """[G] float32. A single episode that is left has nothing to compare with. Raises ValueError for a group of one if they are `needed`."""
    out = torch.zeros(len(g.trajectories))
    if len(g.counted) > 1 or (needed and len(g.trajectories) < 2):
        left = torch.tensor([not t.failed for t in g.trajectories])
        out[left] = group_advantages(float32_rewards(torch.tensor([[t.reward for t in g.counted]], dtype=torch.float64)))[0]
    return out


def return_gap(g: TrajectoryGroup, member: int) -> float:
    """Mean reward of those who acted under the teacher's prompt minus that of those who acted under the student's."""
    other = [t.reward for t in g.counted if t.prompt_ids == g.teacher_prompts[member]]
    own = [t.reward for t in g.counted if t.prompt_ids == g.student_prompts[member]]
    return mean(other) - mean(own) if other and own and g.told(member) else math.nan


def padded(rows: Sequence[Trajectory], device: torch.device) -> tuple[Tensor, Tensor]:
    """Action mask (bool) and recorded log-probs, right-padded to [B, T]."""
    width = max(len(t.token_ids) for t in rows)
    mask = [[*t.action_mask, *[False] * (width - len(t.action_mask))] for t in rows]
    logp = [[*t.logprobs, *[0.0] * (width - len(t.logprobs))] for t in rows]
    return torch.tensor(mask, device=device), torch.tensor(logp, device=device)


def peak_gib(device: torch.device) -> float:
    """Most memory since the start, GiB: what PyTorch reserved on a GPU, else the process's resident set (nan where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def mean(values: Any) -> float:
    listed = [float(v) for v in values]
    return sum(listed) / max(1, len(listed))


def total_norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors])))


def log_measured(trainer: Any, metrics: dict[str, float], iteration: int) -> None:
    """Give loggers an iteration's numbers. Through `LightningModule.log` a number that is not measured in every iteration would be given to
    them anew, as it was, until the epoch ends."""
    if trainer.log_every_n_steps and (iteration + 1) % trainer.log_every_n_steps == 0:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, iteration)
