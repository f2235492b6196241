"""An iteration's groups as rows to learn from: Algorithm 1, line 4. A row is a trajectory; R rows stand group after group.

Which rows train, which of them a teacher scores, their advantages, N and lambda are settled here, once, whatever the micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from skillsd import parallel
from skillsd.metrics import mean
from skillsd.objective import Objective, float32_rewards, group_advantages
from skillsd.policy import TokenSequence
from skillsd.trajectory import FAILURES, Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class Batch:
    """The groups of an iteration as R rows, or some of these rows (`select`), of which the longest has T tokens after its prompt.

    Attributes:
        rows: The R trajectories.
        student, teacher: What each adapter scores, R: the same tokens behind the student's and behind the teacher's prompt.
        advantage: A_i of each row in its group, float32 [R]; 0 for failed episodes and in groups with fewer than two others.
        success: Rows that solved their task, bool [R].
        return_gap: See `objective.signal.Tokens`, float32 [R]; NaN where nobody acted under the teacher's prompt.
        sampled_by_teacher: Rows whose tokens the teacher sampled (Eq. 13), bool [R].
        train_mask: Rows that train, bool [R]: with an action, not failed, and not in a group that the filter leaves out.
        teacher_mask: Those of them that a teacher scores, bool [R]; none where lambda is 0.
        groups: The iteration's groups. They and all that follows are the whole iteration's, also in a batch of some rows.
        dropped_rows: How many more rows a teacher would score if its prompt fitted into the context.
        n_actions: N of Eq. 3-14, the action tokens of all rows that train, at least 1.
        weight: lambda.
        temperature: Sampling temperature; log-probs are recomputed at the same one.
    """

    rows: list[Trajectory]
    student: list[TokenSequence]
    teacher: list[TokenSequence]
    advantage: Tensor
    success: Tensor
    return_gap: Tensor
    sampled_by_teacher: Tensor
    train_mask: Tensor
    teacher_mask: Tensor
    groups: Sequence[TrajectoryGroup]
    dropped_rows: int
    n_actions: int
    weight: float
    temperature: float

    @classmethod
    def from_groups(
        cls, groups: Sequence[TrajectoryGroup], objective: Objective, step: int, teacher_is_student: bool, context_length: int
    ) -> Batch:
        """Settle what an update learns from.

        Args:
            groups: The trajectories of one iteration, all sampled at one temperature.
            objective: Whose lambda, filter and policy weight hold.
            step: The iteration, for lambda's schedule.
            teacher_is_student: The adapters hold equal weights, so that a teacher without context would say what the student says.
            context_length: Tokens that a teacher's sequence may have.

        Raises:
            ValueError: The policy term is on, and a group has one trajectory.
        """
        members = [(g, k, t) for g in groups for k, t in enumerate(g.trajectories)]
        teacher = [TokenSequence(g.teacher_prompts[k], t.token_ids, t.action_mask) for g, k, t in members]
        advantages = [advantages_of(g, objective.policy_weight > 0) for g in groups]
        filtered = [objective.group_filter == "zero_variance" and not a.any() for a in advantages for _ in a]
        trains = [t.n_actions > 0 and not t.failed and not f for (_, _, t), f in zip(members, filtered, strict=True)]

        weight = objective.weight(step)
        wanted = [
            x and weight > 0 and (g.has_teacher_context(k) or not teacher_is_student) for x, (g, k, _) in zip(trains, members, strict=True)
        ]
        scored = [x and len(s) <= context_length for x, s in zip(wanted, teacher, strict=True)]  # a skill is never truncated
        return cls(
            rows=[t for _, _, t in members],
            student=[TokenSequence(g.student_prompts[k], t.token_ids, t.action_mask) for g, k, t in members],
            teacher=teacher,
            advantage=torch.cat(advantages),
            success=torch.tensor([t.success for _, _, t in members]),
            return_gap=torch.tensor([return_gap(g, k) for g, k, _ in members]),
            sampled_by_teacher=torch.tensor([g.sampled_by_teacher for g, _, _ in members]),
            train_mask=torch.tensor(trains),
            teacher_mask=torch.tensor(scored),
            groups=groups,
            dropped_rows=sum(wanted) - sum(scored),
            n_actions=max(1, sum(t.n_actions for x, (_, _, t) in zip(trains, members, strict=True) if x)),
            weight=weight,
            temperature=groups[0].temperature,
        )

    def select(self, index: list[int], device: torch.device) -> Batch:
        """Some of the rows, as a micro-batch on a device."""
        return replace(
            self,
            rows=[self.rows[i] for i in index],
            student=[self.student[i] for i in index],
            teacher=[self.teacher[i] for i in index],
            advantage=self.advantage[index].to(device),
            success=self.success[index].to(device),
            return_gap=self.return_gap[index].to(device),
            sampled_by_teacher=self.sampled_by_teacher[index].to(device),
            train_mask=self.train_mask[index].to(device),
            teacher_mask=self.teacher_mask[index].to(device),
        )

    @cached_property
    def mask(self) -> Tensor:
        """Action mask, bool [R, T]: the one made when sampling."""
        return pad_sequence([torch.tensor(t.action_mask, dtype=torch.bool) for t in self.rows], batch_first=True).to(self.advantage.device)

    @cached_property
    def logp_behaviour(self) -> Tensor:
        """Recorded log-probs of whoever sampled the tokens, float32 [R, T], nats; 0 where the mask is false."""
        return pad_sequence([torch.tensor(t.logprobs, dtype=torch.float32) for t in self.rows], batch_first=True).to(self.advantage.device)

    @property
    def teacher_rows(self) -> list[int]:
        """The rows that a teacher scores."""
        return self.teacher_mask.nonzero().flatten().tolist()

    def local_rows(self) -> list[int]:
        """This rank's part of the rows that train, about as much work as every other's: a teacher's forward costs a third of a student's
        pass."""
        train_rows, scored = self.train_mask.nonzero().flatten().tolist(), set(self.teacher_rows)
        costs = [len(self.student[i]) + len(self.teacher[i]) / 3 * (i in scored) for i in train_rows]
        return [train_rows[k] for k in parallel.balanced(costs)]

    def group_gap(self, gaps: Tensor) -> Tensor:
        """Outcome-aligned gap of each group, sum of A_i times `gaps` [R], nats, [groups]; an update that was not finite counts as 0."""
        sizes = [len(g.trajectories) for g in self.groups]
        pairs = zip(self.advantage.split(sizes), gaps.nan_to_num(0.0, 0.0, 0.0).split(sizes), strict=True)
        return torch.stack([(a * gap).sum() for a, gap in pairs])

    def metrics(self) -> dict[str, float]:
        """What is known before the update."""
        rows, groups = self.rows, self.groups
        counted, failed = [t for t in rows if not t.failed], [t.failure_kind for t in rows if t.failed]
        advantages = self.advantage.split([len(g.trajectories) for g in groups])
        context = (g.has_teacher_context(k) for g in groups for k, t in enumerate(g.trajectories) if not t.failed)
        tokens, seconds = sum(len(t.prompt_ids) + len(t.token_ids) for t in rows), max(g.rollout_s for g in groups)
        return {
            "reward/mean": mean(t.reward for t in counted), "reward/success": mean(t.success for t in counted),
            "reward/completion": mean(t.completion for t in counted),
            "reward/zero_variance": mean(not a.any() for g, a in zip(groups, advantages, strict=True) if g.counted),
            "teacher/skill_share": mean(context), "teacher/dropped_rows": float(self.dropped_rows), "teacher/weight": self.weight,
            "rollout/env_steps": float(sum(len(t.turns) for t in rows)), "rollout/tokens": float(tokens),
            "rollout/action_tokens": float(sum(t.n_actions for t in rows)), "rollout/turns": mean(len(t.turns) for t in rows),
            "rollout/finish_length": mean(t.finish_reason == "length" for t in rows),
            "rollout/failed": mean(t.failed for t in rows), **{f"rollout/failed_{k}": float(failed.count(k)) for k in FAILURES},
            "time/rollout_s": seconds, "time/rollout_tokens_per_s": tokens / seconds,
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
