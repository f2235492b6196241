"""An iteration's groups as rows to learn from: Algorithm 1, line 4. A row is a trajectory; R rows stand group after group.

Which rows train, which of them a teacher scores, their advantages, N and lambda are settled here, once, whatever the micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skillsd import parallel
from skillsd.metrics import mean
from skillsd.objective import Objective, float32_rewards, group_advantages
from skillsd.policy import TokenSequence
from skillsd.trajectory import FAILURES, Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a batch on the device: B rows, T tokens in the longest.

    Attributes:
        index: Which rows of the batch they are, B.
        student, teacher: What each adapter scores, B: the same tokens behind the student's and behind the teacher's prompt.
        mask: Action mask, bool [B, T]: the one made when sampling.
        logp_behaviour: Recorded log-probs of whoever sampled the tokens, float32 [B, T], nats; 0 where the mask is false.
        advantage: float32 [B].
        success: Rows that solved their task, bool [B].
        return_gap: See `objective.signal.Tokens`, float32 [B].
        teacher_rows: Which of the B a teacher scores.
        teacher_mask: The same as bool [B].
        sampled_by_teacher: Rows whose tokens the teacher sampled (Eq. 13), bool [B].
    """

    index: list[int]
    student: list[TokenSequence]
    teacher: list[TokenSequence]
    mask: Tensor
    logp_behaviour: Tensor
    advantage: Tensor
    success: Tensor
    return_gap: Tensor
    teacher_rows: list[int]
    teacher_mask: Tensor
    sampled_by_teacher: Tensor


@dataclass(frozen=True)
class Batch:
    """The groups of an iteration as rows.

    Attributes:
        rows: The R trajectories.
        student, teacher: What each adapter scores, R.
        advantage: A_i of each row in its group, float32 [R]; 0 for failed episodes and in groups with fewer than two others.
        success: Rows that solved their task, bool [R].
        return_gap: See `objective.signal.Tokens`, float32 [R]; NaN where nobody acted under the teacher's prompt.
        has_teacher_context: Rows whose teacher sees something that their student does not, R.
        sampled_by_teacher: Rows whose tokens the teacher sampled (Eq. 13), bool [R].
        train_rows: Rows that train: with an action, not failed, and not in a group that the filter leaves out.
        teacher_rows: Those of `train_rows` that a teacher scores; none where lambda is 0.
        dropped_rows: How many more a teacher would score if its prompt fitted into the context.
        n_actions: N of Eq. 3-14, the action tokens of `train_rows`, at least 1.
        weight: lambda.
        temperature: Sampling temperature; log-probs are recomputed at the same one.
        zero_variance: Of each group, all its advantages are 0; None if all its members failed.
        group_sizes: Rows of each group.
    """

    rows: list[Trajectory]
    student: list[TokenSequence]
    teacher: list[TokenSequence]
    advantage: Tensor
    success: Tensor
    return_gap: Tensor
    has_teacher_context: list[bool]
    sampled_by_teacher: Tensor
    train_rows: list[int]
    teacher_rows: frozenset[int]
    dropped_rows: int
    n_actions: int
    weight: float
    temperature: float
    zero_variance: list[bool | None]
    group_sizes: list[int]

    @classmethod
    def from_groups(
        cls, groups: Sequence[TrajectoryGroup], objective: Objective, step: int, teacher_is_student: bool, context_length: int
    ) -> Batch:
        """Settle what an update learns from.

        Args:
            groups: Of one iteration, at one temperature.
            objective: Whose lambda, filter and policy weight hold.
            step: The iteration, for lambda's schedule.
            teacher_is_student: The adapters hold equal weights, so that a teacher without context would say what the student says.
            context_length: Tokens that a teacher's sequence may have.

        Raises:
            ValueError: The policy term is on, and a group has one trajectory.
        """
        rows = [t for g in groups for t in g.trajectories]
        members = [(g, k, t) for g in groups for k, t in enumerate(g.trajectories)]
        student = [TokenSequence(g.student_prompts[k], t.token_ids, t.action_mask) for g, k, t in members]
        teacher = [TokenSequence(g.teacher_prompts[k], t.token_ids, t.action_mask) for g, k, t in members]
        has_context = [g.has_teacher_context(k) for g, k, _ in members]

        advantages = [advantages_of(g, objective.policy_weight > 0) for g in groups]
        zero_variance = [not bool(a.any()) if g.counted else None for g, a in zip(groups, advantages, strict=True)]
        drops_flat = objective.group_filter == "zero_variance"
        filtered = [drops_flat and z for g, z in zip(groups, zero_variance, strict=True) for _ in g.trajectories]
        train_rows = [i for i, t in enumerate(rows) if t.n_actions and not t.failed and not filtered[i]]

        weight = objective.weight(step)
        wanted = [i for i in train_rows if has_context[i] or not teacher_is_student] if weight > 0 else []
        teacher_rows = frozenset(i for i in wanted if len(teacher[i]) <= context_length)  # a skill is never truncated
        return cls(
            rows=rows,
            student=student,
            teacher=teacher,
            advantage=torch.cat(advantages),
            success=torch.tensor([t.success for t in rows]),
            return_gap=torch.tensor([return_gap(g, k) for g, k, _ in members]),
            has_teacher_context=has_context,
            sampled_by_teacher=torch.tensor([g.sampled_by_teacher for g, _, _ in members]),
            train_rows=train_rows,
            teacher_rows=teacher_rows,
            dropped_rows=len(wanted) - len(teacher_rows),
            n_actions=max(1, sum(rows[i].n_actions for i in train_rows)),
            weight=weight,
            temperature=groups[0].temperature,
            zero_variance=zero_variance,
            group_sizes=[len(g.trajectories) for g in groups],
        )

    def local_rows(self) -> list[int]:
        """This rank's part of `train_rows`, about as much work as every other's: a teacher's forward costs a third of a student's pass."""
        costs = [len(self.student[i]) + len(self.teacher[i]) / 3 * (i in self.teacher_rows) for i in self.train_rows]
        return [self.train_rows[k] for k in parallel.balanced(costs)]

    @property
    def scored_tokens(self) -> int:
        """Tokens that student and teacher score, prompts included."""
        return sum(len(self.student[i]) for i in self.train_rows) + sum(len(self.teacher[i]) for i in self.teacher_rows)

    def select(self, index: list[int], device: torch.device) -> MicroBatch:
        """The rows `index`, right-padded to the longest of them."""
        rows = [self.rows[i] for i in index]
        width = max(len(t.token_ids) for t in rows)
        mask = [[*t.action_mask, *[False] * (width - len(t.action_mask))] for t in rows]
        logp = [[*t.logprobs, *[0.0] * (width - len(t.logprobs))] for t in rows]
        has_teacher = [i in self.teacher_rows for i in index]
        return MicroBatch(
            index=index,
            student=[self.student[i] for i in index],
            teacher=[self.teacher[i] for i in index],
            mask=torch.tensor(mask, device=device),
            logp_behaviour=torch.tensor(logp, device=device),
            advantage=self.advantage[index].to(device),
            success=self.success[index].to(device),
            return_gap=self.return_gap[index].to(device),
            teacher_rows=[k for k, x in enumerate(has_teacher) if x],
            teacher_mask=torch.tensor(has_teacher, device=device),
            sampled_by_teacher=self.sampled_by_teacher[index].to(device),
        )

    def group_gap(self, gaps: Tensor) -> Tensor:
        """Outcome-aligned gap of each group, sum of A_i times `gaps` [R], nats, [groups]; an update that was not finite counts as 0."""
        gaps = gaps.nan_to_num(0.0, 0.0, 0.0)
        pairs = zip(self.advantage.split(self.group_sizes), gaps.split(self.group_sizes), strict=True)
        return torch.stack([(a * gap).sum() for a, gap in pairs])

    def metrics(self) -> dict[str, float]:
        """What is known before the update."""
        rows = self.rows
        counted, failed = [t for t in rows if not t.failed], [t.failure_kind for t in rows if t.failed]
        return {
            "reward/mean": mean(t.reward for t in counted), "reward/success": mean(t.success for t in counted),
            "reward/completion": mean(t.completion for t in counted),
            "reward/zero_variance": mean(z for z in self.zero_variance if z is not None),
            "teacher/skill_share": mean(x for x, t in zip(self.has_teacher_context, rows, strict=True) if not t.failed),
            "teacher/dropped_rows": float(self.dropped_rows), "teacher/weight": self.weight,
            "rollout/env_steps": float(sum(len(t.turns) for t in rows)),
            "rollout/tokens": float(sum(len(t.prompt_ids) + len(t.token_ids) for t in rows)),
            "rollout/action_tokens": float(sum(t.n_actions for t in rows)), "rollout/turns": mean(len(t.turns) for t in rows),
            "rollout/finish_length": mean(t.finish_reason == "length" for t in rows),
            "rollout/failed": mean(t.failed for t in rows), **{f"rollout/failed_{k}": float(failed.count(k)) for k in FAILURES},
            "learner/tokens": float(self.scored_tokens),
        }  # fmt: skip


def advantages_of(g: TrajectoryGroup, needed: bool = False) -> Tensor:
    """A_i = (R_i - mean R) / (std R + 1e-8) of a group's members that have not failed, float32 [G]; 0 for the others.

    A single episode that is left has nothing to compare with. Raises ValueError for a group of one if advantages are `needed`.
    """
    out = torch.zeros(len(g.trajectories))
    if len(g.counted) > 1 or (needed and len(g.trajectories) < 2):
        left = torch.tensor([not t.failed for t in g.trajectories])
        out[left] = group_advantages(float32_rewards(torch.tensor([[t.reward for t in g.counted]], dtype=torch.float64)))[0]
    return out


def return_gap(g: TrajectoryGroup, member: int) -> float:
    """Mean reward of those who acted under the teacher's prompt minus that of those who acted under the student's; NaN without either."""
    other = [t.reward for t in g.counted if t.prompt_ids == g.teacher_prompts[member]]
    own = [t.reward for t in g.counted if t.prompt_ids == g.student_prompts[member]]
    return mean(other) - mean(own) if other and own and g.has_teacher_context(member) else math.nan
