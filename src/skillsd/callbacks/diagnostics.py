"""Training that cannot learn: plain checks over an iteration's episodes and numbers, each of which warns once, with a cure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L

from skillsd import parallel
from skillsd.batch import advantages_of
from skillsd.bounded import visible
from skillsd.module import SkillSD
from skillsd.skills import BankContext, NoContext
from skillsd.skills.callback import find_selection
from skillsd.trajectory import TrajectoryGroup
from skillsd.words import count

log = logging.getLogger(__name__)

PATIENCE = 5
"""Iterations in a row without rewards that differ, or without a gradient, before it is said; a shorter run says it at its end."""
FEW_ACTIONS, FEW_SUMMARIES = 20, 20
"""So many actions of which none was understood, or summaries of which none became a skill, are enough to say so."""
SMALL_ADVANTAGE = 0.5
"""The largest advantage of a group is at least 0.7, but where rounding errors alone make its rewards differ."""
FEW_UNKNOWN, UNKNOWN_SHARE = 3, 0.01
"""Unknown tokens among what the model reads in an iteration: up to so many, or up to this share, are nothing to mention."""


@dataclass
class Counts:
    """What the iterations of this process came to.

    Attributes:
        policy_weight: Weight of the reward's term in the loss.
        iterations: How many there were, those before a resume included.
        flat_iterations: How many there were in a row, up to the last, in which no group had two different rewards.
        flat_rewards: The rewards of those.
        zero_gradients: How many in a row had a gradient of exactly 0 although rewards differed or a teacher saw a skill.
        actions, understood: Actions that the environment judged (info["valid"]), and those that it could read.
        prompt_tokens, unknown_tokens: Tokens of prompts and observations in the last iteration, and the unknown ones among them.
        skill_tokens, unknown_skill_tokens: The same of what teachers read beside their students' prompts: skills.
        failed_summaries, skills: Summaries that failed, and those that became skills.
        summary_error: Why the latest one failed, if that is known.
        close_rewards: The lowest and highest reward of a group whose rewards differ so little that its advantages are nearly 0.
    """

    policy_weight: float = 1.0
    iterations: int = 0
    flat_iterations: int = 0
    flat_rewards: set[float] = field(default_factory=set)
    zero_gradients: int = 0
    actions: int = 0
    understood: int = 0
    prompt_tokens: int = 0
    unknown_tokens: int = 0
    skill_tokens: int = 0
    unknown_skill_tokens: int = 0
    failed_summaries: int = 0
    skills: int = 0
    summary_error: str = ""
    close_rewards: tuple[float, ...] = ()

    def add(self, groups: Sequence[TrajectoryGroup], metrics: Mapping[str, float], unknown_id: int | None) -> None:
        """Take in an iteration.

        Args:
            groups: Its groups.
            metrics: Its numbers, as metrics.csv names them.
            unknown_id: The token that stands for what the tokenizer does not know; None if there is no such token.
        """
        self.iterations += 1
        flat = metrics["reward/zero_variance"] == 1.0
        self.flat_iterations = self.flat_iterations + 1 if flat else 0
        self.flat_rewards = self.flat_rewards | {t.reward for g in groups for t in g.counted} if flat else set()
        differ = self.policy_weight > 0 and not flat and any(len({t.reward for t in g.counted}) > 1 for g in groups)
        shown = metrics["teacher/weight"] > 0 and metrics["teacher/skill_share"] > 0
        self.zero_gradients = self.zero_gradients + 1 if metrics["grad_norm/total"] == 0.0 and (differ or shown) else 0
        rows = [t for g in groups for t in g.trajectories]
        judged = [turn.valid for t in rows for turn in t.turns if turn.valid is not None]
        self.actions, self.understood = self.actions + len(judged), self.understood + sum(judged)
        for g in groups:
            rewards = sorted({t.reward for t in g.counted})
            if len(rewards) > 1 and float(advantages_of(g).abs().max()) < SMALL_ADVANTAGE:
                self.close_rewards = rewards[0], rewards[-1]
        self.unknown_tokens = self.prompt_tokens = 0
        for t in rows if unknown_id is not None else ():
            self.prompt_tokens += len(t.prompt_ids) + len(t.token_ids) - t.n_actions
            self.unknown_tokens += t.prompt_ids.count(unknown_id)
            if unknown_id in t.token_ids:
                self.unknown_tokens += sum(i == unknown_id and not a for i, a in zip(t.token_ids, t.action_mask, strict=True))
        self.skill_tokens = self.unknown_skill_tokens = 0
        for g in groups if shown and unknown_id is not None else ():
            for own, teacher in zip(g.student_prompts, g.teacher_prompts, strict=True):
                if own != teacher:
                    self.skill_tokens += max(0, len(teacher) - len(own))
                    self.unknown_skill_tokens += max(0, teacher.count(unknown_id) - own.count(unknown_id))


# -- a warning about them, or "" -----------------------------------------------------------------------------------------------------


def _lasts(n: int, counts: Counts, over: bool) -> bool:
    """Return whether n iterations in a row are enough to warn; in a run that is over, all of them are."""
    return n >= PATIENCE or (over and 0 < n == counts.iterations)


def flat_rewards(counts: Counts, over: bool = False) -> str:
    """No group had two different rewards for PATIENCE iterations, or in all of a run that is over."""
    n, rewards = counts.flat_iterations, counts.flat_rewards
    if not counts.policy_weight or not _lasts(n, counts, over):
        return ""
    when = "In this iteration" if n == 1 else f"For {count(n, 'iteration')}"
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    what = f" (all rewards are {low:g})" if low == high else ""
    cure = "harder" if low == high and low > 0 else "easier"
    return (
        f"{when} no group of episodes had two different rewards{what}, so the reward teaches nothing: give {cure} tasks "
        "(data.env_kwargs), a larger data.group_size or a higher data.rollout.temperature."
    )


def no_gradient(counts: Counts, over: bool = False) -> str:
    """The gradient was exactly 0 although something should have given one."""
    if not _lasts(n := counts.zero_gradients, counts, over):
        return ""
    when = "in this iteration" if n == 1 else f"for {count(n, 'iteration')}"
    return (
        f"The gradient was exactly 0 {when}, although rewards differed or a teacher saw a skill, so the student does not change: look at "
        "model.objective (weights, gate) and at the size of the rewards, which may be too large or too close for float32."
    )


def close_rewards(counts: Counts, over: bool = False) -> str:
    """The rewards of a group differ, and its advantages are nearly 0."""
    if not counts.policy_weight or not counts.close_rewards:
        return ""
    low, high = counts.close_rewards
    return (
        f"A group's rewards lie between {low!r} and {high!r}, too close together to be distinguished: its advantages are nearly 0. Let the "
        "environment pay rewards that differ by more than 1e-7, and by more than 1e-13 of their size."
    )


def not_understood(counts: Counts, over: bool = False) -> str:
    """The environment could read none of the actions."""
    if counts.understood or not counts.actions or (counts.actions < FEW_ACTIONS and not over):
        return ""
    return (
        f"The environment understood none of the {count(counts.actions, 'action')} so far: look at one (skillsd show RUN --trajectory 0), "
        "say in the instruction what form an answer has, or take a model that was trained for it; data.rollout.max_turn_tokens "
        "may cut it off."
    )


def cannot_read(counts: Counts, over: bool = False) -> str:
    """More than a few tokens that the model reads stand for text that its tokenizer does not know."""
    if counts.unknown_tokens <= max(FEW_UNKNOWN, UNKNOWN_SHARE * counts.prompt_tokens):
        return ""
    share = counts.unknown_tokens / counts.prompt_tokens
    return (
        f"{share:.0%} of the tokens of prompts and observations are the tokenizer's unknown token: what they "
        "stand for, the model cannot read. Take another model.policy.model, or let the environment speak in words that this one knows."
    )


def cannot_read_skills(counts: Counts, over: bool = False) -> str:
    """The same of the skills that teachers see."""
    if not counts.skill_tokens or counts.unknown_skill_tokens <= max(FEW_UNKNOWN, UNKNOWN_SHARE * counts.skill_tokens):
        return ""
    share = counts.unknown_skill_tokens / counts.skill_tokens
    return (
        f"{share:.0%} of the tokens of the skills that teachers see are the tokenizer's unknown token: "
        "what they stand for, the model cannot read, and the student follows what a teacher makes of the rest. Write skills.template and "
        "the texts of skills.summariser in words that this model knows (nano: those of conf/sokoban.yaml), or take another "
        "model.policy.model."
    )


def no_skill_made(counts: Counts, over: bool = False) -> str:
    """The summariser has made no skill of anything."""
    if counts.skills or counts.failed_summaries < FEW_SUMMARIES:
        return ""
    why = f" (the latest: {visible(counts.summary_error)})" if counts.summary_error else ""
    return (
        f"The summariser made no skill of {count(counts.failed_summaries, 'episode')}{why}, so no teacher sees one: look at "
        "skills.summariser. Code of your own may fail; a model may need to be larger, another form, or more max_new_tokens."
    )


def no_second_visit(iterations: float, epoch: float, imported: int) -> str:
    """A task's own skill is shown when the task is played again, and this run plays each task once."""
    if imported or iterations > epoch:
        return ""
    return (
        f"This run ends after {count(int(iterations), 'iteration')} and plays no task twice, and a task's skill is made after it was "
        "played: nobody will see a skill. Set trainer.max_epochs to 2 or more, or begin with skills (skillsd skills import)."
    )


CHECKS = (cannot_read, cannot_read_skills, not_understood, flat_rewards, close_rewards, no_gradient, no_skill_made)


class Diagnostics(L.Callback):
    """Warns when a run trains but cannot learn, each reason once, and says what to change. It changes no number.

    The reasons: rewards that differ in no group, or too little to be distinguished, a gradient of exactly 0 where there should be one,
    actions that the environment never understands (for those that say so, in info["valid"]), a prompt or skills in unknown tokens, a
    summariser that makes no skill, and a run that ends before any task is played a second time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.warned = Counts(), set[Callable[..., str]]()
        self.failed_before = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.counts, self.warned = Counts(iterations=trainer.global_step), set()
        if not isinstance(pl_module, SkillSD):
            return
        objective, selection = pl_module.objective, find_selection(trainer)
        self.counts.policy_weight = objective.policy_weight
        if selection is None:
            return
        self.failed_before = selection.failed
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        used = max(objective.distillation_weight, objective.weight_end * bool(objective.weight_steps)) > 0 or data.actor != "student"
        total: Any = trainer.estimated_stepping_batches
        if used and type(selection.context) is BankContext and selection.bank is not None and trainer.global_step < total:
            self._warn(no_second_visit, no_second_visit(total, trainer.num_training_batches, selection.bank.imported))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not isinstance(pl_module, SkillSD) or not parallel.is_rank_zero():
            return
        counts, policy, selection = self.counts, pl_module.policy, find_selection(trainer)
        counts.add(batch, outputs["metrics"], unknown_token(policy.tokenizer, policy.stop_ids))
        if selection is not None and not isinstance(selection.context, NoContext):
            counts.failed_summaries, counts.skills = selection.failed - self.failed_before, selection.made
            counts.summary_error = selection.checked.last_error
        self._check()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(over=True)

    def _check(self, over: bool = False) -> None:
        for check in CHECKS:
            self._warn(check, check(self.counts, over))

    def _warn(self, check: Callable[..., str], text: str) -> None:
        if text and check not in self.warned and parallel.is_rank_zero():
            self.warned.add(check)
            log.warning("%s", text)


def unknown_token(tokenizer: Any, stop_ids: Sequence[int]) -> int | None:
    """The id that stands for unknown text alone; None where there is none, or where it also ends a turn or pads."""
    unknown = tokenizer.unk_token_id
    others = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, *stop_ids}
    return None if unknown is None or unknown in others else int(unknown)
