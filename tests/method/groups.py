"""Groups made by hand, of random tokens, with the log-probs of a policy on record."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from skillsd.policy import Policy, TokenSequence
from skillsd.trajectory import Task, Trajectory, TrajectoryGroup, Turn

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


def with_own_prompts(groups: Sequence[TrajectoryGroup], seed: int = 5) -> list[TrajectoryGroup]:
    """The same, each member with prompts of its own: acted, student's and teacher's differ, in length too."""
    rng = random.Random(seed)

    def ids() -> tuple[int, ...]:
        return tuple(rng.randrange(5, 60) for _ in range(rng.randint(3, 9)))

    return [
        replace(g, student_prompts=tuple(ids() for _ in g.trajectories), teacher_prompts=tuple(ids() for _ in g.trajectories))
        for g in groups
    ]


def scored(policy: Policy, adapter: str, prompt: Sequence[int], t: Trajectory) -> Tensor:
    """Log-probs of the trajectory's tokens, 0 where they are no actions."""
    with torch.no_grad():
        return policy.score(adapter, [TokenSequence(prompt, t.token_ids, t.action_mask)], TEMPERATURE).logp[0]


def sampled_by(policy: Policy, t: Trajectory, adapter: str, prompt: tuple[int, ...], spread: float = 0.0) -> Trajectory:
    """The same tokens as if `adapter` had sampled them under `prompt`, log-probs off by up to `spread`."""
    rng = random.Random(len(t.token_ids))
    logp = zip(scored(policy, adapter, prompt, t).tolist(), t.action_mask, strict=True)
    return replace(t, prompt_ids=prompt, logprobs=tuple(x + rng.uniform(-spread, spread) if m else 0.0 for x, m in logp))


def sampled_by_teacher(policy: Policy, groups: Sequence[TrajectoryGroup], spread: float = 0.0) -> list[TrajectoryGroup]:
    return [
        replace(
            g, sampled_by_teacher=True,
            trajectories=tuple(sampled_by(policy, t, "teacher", p, spread) for t, p in zip(g.trajectories, g.teacher_prompts, strict=True)),
        )
        for g in groups
    ]  # fmt: skip


def without_members(g: TrajectoryGroup, *members: int) -> TrajectoryGroup:
    left = [k for k in range(len(g.trajectories)) if k not in members]
    return replace(
        g, trajectories=tuple(g.trajectories[k] for k in left), student_prompts=tuple(g.student_prompts[k] for k in left),
        teacher_prompts=tuple(g.teacher_prompts[k] for k in left),
    )  # fmt: skip


def with_failed(g: TrajectoryGroup, *members: int, kind: str = "raised") -> TrajectoryGroup:
    def lost(t: Trajectory) -> Trajectory:
        return replace(t, reward=0.0, completion=0.0, success=False, finish_reason="failed", failure=f"{kind}: x")

    return replace(g, trajectories=tuple(lost(t) if k in members else t for k, t in enumerate(g.trajectories)))
