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
class Seen:
    """What the iterations of this process came to.

    Attributes:
        iterations: How many there were, those before a resume included.
        flat: How many there were in a row, up to the last, in which no group had two different rewards.
        rewards: The rewards of those.
        still: How many in a row had a gradient of exactly 0 although rewards differed or a teacher saw a skill.
        actions, understood: Actions that the environment judged (info["valid"]), and those that it could read.
        unknown, read: Unknown tokens among those of prompts and observations in the last iteration, and all of these.
        foreign, skill_tokens: The same in what teachers read beside their students' prompts: skills.
        refused, skills: Summaries that failed, and those that became skills.
        why: Why the latest one failed, if that is known.
        merged: The two ends of a group whose rewards differ so little that no advantage comes of it; empty if there was none.
    """

    iterations: int = 0
    flat: int = 0
    rewards: set[float] = field(default_factory=set)
    still: int = 0
    actions: int = 0
    understood: int = 0
    unknown: int = 0
    read: int = 0
    foreign: int = 0
    skill_tokens: int = 0
    refused: int = 0
    skills: int = 0
    why: str = ""
    merged: tuple[float, ...] = ()

    def add(self, groups: Sequence[TrajectoryGroup], metrics: Mapping[str, float], policy_weight: float, unknown_id: int | None) -> None:
        """Take in an iteration.

        Args:
            groups: Its groups.
            metrics: Its numbers, as metrics.csv names them.
            policy_weight: Weight of the reward's term in the loss.
            unknown_id: The token that stands for what the tokenizer does not know; None if there is no such token.
        """
        self.iterations += 1
        flat = metrics["reward/zero_variance"] == 1.0
        self.flat = self.flat + 1 if flat else 0
        self.rewards = self.rewards | {t.reward for g in groups for t in g.counted} if flat else set()
        differ = policy_weight > 0 and not flat and any(len({t.reward for t in g.counted}) > 1 for g in groups)
        shown = metrics["teacher/weight"] > 0 and metrics["teacher/skill_share"] > 0
        self.still = self.still + 1 if metrics["grad_norm/total"] == 0.0 and (differ or shown) else 0
        rows = [t for g in groups for t in g.trajectories]
        judged = [turn.valid for t in rows for turn in t.turns if turn.valid is not None]
        self.actions, self.understood = self.actions + len(judged), self.understood + sum(judged)
        for g in groups:
            rewards = sorted({t.reward for t in g.counted})
            if len(rewards) > 1 and float(advantages_of(g).abs().max()) < SMALL_ADVANTAGE:
                self.merged = rewards[0], rewards[-1]
        self.unknown = self.read = 0
        for t in rows if unknown_id is not None else ():
            self.read += len(t.prompt_ids) + len(t.token_ids) - t.n_actions
            self.unknown += t.prompt_ids.count(unknown_id)
            if unknown_id in t.token_ids:
                self.unknown += sum(i == unknown_id and not a for i, a in zip(t.token_ids, t.action_mask, strict=True))
        self.foreign = self.skill_tokens = 0
        for g in groups if shown and unknown_id is not None else ():
            for own, teacher in zip(g.student_prompts, g.teacher_prompts, strict=True):
                if own != teacher:
                    self.skill_tokens += max(0, len(teacher) - len(own))
                    self.foreign += max(0, teacher.count(unknown_id) - own.count(unknown_id))


# -- what is said of it; "" if there is nothing to say -------------------------------------------------------------------------------


def flat_rewards(seen: Seen, policy_weight: float, over: bool = False) -> str:
    """No group had two different rewards for PATIENCE iterations, or in all of a run that is over."""
    if not policy_weight or not seen.flat or (seen.flat < PATIENCE and not (over and seen.flat == seen.iterations)):
        return ""
    when = "In this iteration" if seen.flat == 1 else f"For {count(seen.flat, 'iteration')}"
    low, high = min(seen.rewards, default=0.0), max(seen.rewards, default=0.0)
    what = f" (all rewards are {low:g})" if low == high else ""
    cure = "harder" if low == high and low > 0 else "easier"
    return (
        f"{when} no group of episodes had two different rewards{what}, so the reward teaches nothing: give {cure} tasks "
        "(data.env_kwargs), a larger data.group_size or a higher data.rollout.temperature."
    )


def no_gradient(seen: Seen, over: bool = False) -> str:
    """The gradient was exactly 0 although something should have given one."""
    if not seen.still or (seen.still < PATIENCE and not (over and seen.still == seen.iterations)):
        return ""
    when = "in this iteration" if seen.still == 1 else f"for {count(seen.still, 'iteration')}"
    return (
        f"The gradient was exactly 0 {when}, although rewards differed or a teacher saw a skill, so the student does not change: look at "
        "model.objective (weights, gate) and at the size of the rewards, which may be too large or too close for float32."
    )


def merged_rewards(seen: Seen, policy_weight: float) -> str:
    """The rewards of a group differ, and its advantages are nearly 0."""
    if not policy_weight or not seen.merged:
        return ""
    low, high = seen.merged
    return (
        f"A group's rewards lie between {low!r} and {high!r}, too close together to be distinguished: its advantages are nearly 0. Let the "
        "environment pay rewards that differ by more than 1e-7, and by more than 1e-13 of their size."
    )


def not_understood(seen: Seen, over: bool = False) -> str:
    """The environment could read none of the actions."""
    if seen.understood or not seen.actions or (seen.actions < FEW_ACTIONS and not over):
        return ""
    return (
        f"The environment understood none of the {count(seen.actions, 'action')} so far: look at one (skillsd show RUN --trajectory 0), "
        "say in the instruction what form an answer has, or take a model that was trained for it; data.rollout.max_turn_tokens "
        "may cut it off."
    )


def cannot_read(seen: Seen) -> str:
    """More than a few tokens that the model reads stand for text that its tokenizer does not know."""
    if seen.unknown <= max(FEW_UNKNOWN, UNKNOWN_SHARE * seen.read):
        return ""
    return (
        f"{100 * seen.unknown / seen.read:.0f}% of the tokens of prompts and observations are the tokenizer's unknown token: what they "
        "stand for, the model cannot read. Take another model.policy.model, or let the environment speak in words that this one knows."
    )


def cannot_read_skills(seen: Seen) -> str:
    """The same of the skills that teachers see."""
    if not seen.skill_tokens or seen.foreign <= max(FEW_UNKNOWN, UNKNOWN_SHARE * seen.skill_tokens):
        return ""
    return (
        f"{100 * seen.foreign / seen.skill_tokens:.0f}% of the tokens of the skills that teachers see are the tokenizer's unknown token: "
        "what they stand for, the model cannot read, and the student follows what a teacher makes of the rest. Write skills.template and "
        "the texts of skills.summariser in words that this model knows (nano: those of conf/sokoban.yaml), or take another "
        "model.policy.model."
    )


def no_skill_made(seen: Seen) -> str:
    """The summariser has made no skill of anything."""
    if seen.skills or seen.refused < FEW_SUMMARIES:
        return ""
    why = f" (the latest: {visible(seen.why)})" if seen.why else ""
    return (
        f"The summariser made no skill of {count(seen.refused, 'episode')}{why}, so no teacher sees one: look at skills.summariser, which "
        "may need a larger model, another form, or more max_new_tokens."
    )


def no_second_visit(iterations: float, epoch: int, imported: int) -> str:
    """A task's own skill is shown when the task is played again, and this run plays each task once."""
    if imported or iterations > epoch:
        return ""
    return (
        f"This run ends after {count(int(iterations), 'iteration')} and plays no task twice, and a task's skill is made after it was "
        "played: nobody will see a skill. Set trainer.max_epochs to 2 or more, or begin with skills (skillsd skills import)."
    )


class Diagnostics(L.Callback):
    """Warns when a run trains but cannot learn, each reason once, and says what to change. It changes no number.

    The reasons: rewards that differ in no group, or too little to be distinguished, a gradient of exactly 0 where there should be one,
    actions that the environment never understands (for those that say so, in info["valid"]), a prompt or skills in unknown tokens, a
    summariser that makes no skill, and a run that ends before any task is played a second time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.said = Seen(), set[Callable[..., str]]()
        self.failed_before = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen, self.said = Seen(iterations=trainer.global_step), set()
        selection = find_selection(trainer)
        if not isinstance(pl_module, SkillSD) or selection is None:
            return
        self.failed_before = selection.failed
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        objective = pl_module.objective
        used = max(objective.distillation_weight, objective.weight_end * bool(objective.weight_steps)) > 0 or data.actor != "student"
        total: Any = trainer.estimated_stepping_batches
        if used and type(selection.context) is BankContext and selection.bank is not None and trainer.global_step < total:
            self._say(no_second_visit, total, trainer.num_training_batches, selection.bank.imported)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not isinstance(pl_module, SkillSD) or not parallel.is_rank_zero():
            return
        tokenizer, weight, selection = pl_module.policy.tokenizer, pl_module.objective.policy_weight, find_selection(trainer)
        self.seen.add(batch, outputs["metrics"], weight, unknown_token(tokenizer, pl_module.policy.stop_ids))
        if selection is not None and not isinstance(selection.context, NoContext):
            self.seen.refused, self.seen.skills = selection.failed - self.failed_before, selection.made
            self.seen.why = selection.checked.last_error
        self._say(cannot_read, self.seen)
        self._say(cannot_read_skills, self.seen)
        self._say(not_understood, self.seen)
        self._say(flat_rewards, self.seen, weight)
        self._say(merged_rewards, self.seen, weight)
        self._say(no_gradient, self.seen)
        self._say(no_skill_made, self.seen)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, SkillSD):
            self._say(not_understood, self.seen, over=True)
            self._say(flat_rewards, self.seen, pl_module.objective.policy_weight, over=True)
            self._say(no_gradient, self.seen, over=True)

    def _say(self, check: Callable[..., str], *seen: Any, **how: Any) -> None:
        if check not in self.said and parallel.is_rank_zero() and (text := check(*seen, **how)):
            self.said.add(check)
            log.warning("%s", text)


def unknown_token(tokenizer: Any, stop_ids: Sequence[int]) -> int | None:
    """The id that stands for unknown text alone; None where there is none, or where it also ends a turn or pads."""
    unknown = tokenizer.unk_token_id
    others = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, *stop_ids}
    return None if unknown is None or unknown in others else int(unknown)
