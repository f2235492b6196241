"""The SkillBank callback: Algorithm 1, line 7. Finished trajectories in, skill prompts for the teacher out."""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L

from skillsd import ranks
from skillsd.bounded import fill
from skillsd.errors import ConfigError
from skillsd.keys import lacks
from skillsd.run_folder import BANK_FILE
from skillsd.skills.bank import SkillBank
from skillsd.skills.context import BankContext, GroundTruthContext, GroupContext, NoContext, PrivilegedContext
from skillsd.skills.skill import FIELDS, SKILL_TEMPLATE, Skill
from skillsd.skills.summarisers import BaseSummariser, CheckedSummariser, Finished, RulesSummariser, Summariser
from skillsd.skills.summarisers.transcript import conversation
from skillsd.trajectory import Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)
TRANSCRIPT_TEMPLATE = """\
# An earlier attempt at this task, which succeeded
{transcript}

# Your attempt
"""


class SkillBankCallback(L.Callback):
    """Summarises trajectories into skills, keeps them in a bank, and gives each task's teacher its prompt.

    With several ranks, rank 0 alone has the bank: it chooses for all, and each summarises what it has played.
    The summaries of iteration i enter the bank, in (task, member) order, at the first iteration boundary at which they are
    ready; with `rules` and `base` that is always the next one. What a summariser returns is data: see CheckedSummariser.

    Args:
        summariser: Makes skills. Default: RulesSummariser.
        context: Chooses what the teacher sees. Default: the task's own skill by UCB.
        capacity: Skills kept a task; null keeps all.
        drop: Which one goes when the bank of a task is full.
        booking: What a skill's mean reward is.
        min_reward: Trajectories with less reward give no skill to the bank; null lets all in, as in the paper. Contexts that choose
            after the rollout are not bound by it.
        template: Wrapper of a skill in front of the teacher's prompt (str.format over its three fields); null is
            SKILL_TEMPLATE.
        transcript_template: The same of another attempt, for contexts that show one: {transcript}, the conversation, shortened in the
            middle to 24,000 characters, or {actions}, its answers alone, with spaces between them.
        refresh: When prompts are chosen anew: at each `epoch`'s start, or at each `iteration` as in the paper. As an epoch visits
            every task once, nothing is lost with per-task skills.
    """

    def __init__(
        self,
        summariser: Summariser | None = None,
        context: PrivilegedContext | None = None,
        capacity: int | None = 8,
        drop: Literal["worst", "oldest"] = "worst",
        booking: Literal["source", "next_visit", "gap"] = "source",
        min_reward: float | None = None,
        template: str | None = None,
        transcript_template: str | None = None,
        refresh: Literal["epoch", "iteration"] = "epoch",
    ) -> None:
        super().__init__()
        protocols: tuple[tuple[str, Any, Any], ...] = (("summariser", summariser, Summariser), ("context", context, PrivilegedContext))
        for key, given, protocol in protocols:
            if given is not None and (missing := lacks(given, protocol)):
                raise ConfigError(f"skills.{key}: {type(given).__qualname__} lacks {' and '.join(missing)}: write what is missing.")
        self.summariser: Summariser = summariser or RulesSummariser()
        self.checked = CheckedSummariser(self.summariser)
        self.context: PrivilegedContext = context or BankContext()
        self.bank_settings: dict[str, Any] = {"capacity": capacity, "drop": drop, "booking": booking}
        self.min_reward = -math.inf if min_reward is None else min_reward
        self.template, self.transcript_template = template or SKILL_TEMPLATE, transcript_template or TRANSCRIPT_TEMPLATE
        self.refresh_when = refresh
        shown = ("transcript", "actions")
        for key, text, fields in (("template", self.template, FIELDS), ("transcript_template", self.transcript_template, shown)):
            try:
                fill(text, dict.fromkeys(fields, ""))
            except ValueError as e:
                raise ConfigError(f"skills.{key}: use only {', '.join(fields)} in braces ({e}).") from e
        self.prompts: dict[str, int] = {}
        self.failed = 0
        self.made = 0  # summaries that gave a skill since this start of the run
        self.summary_s = 0.0  # seconds that training waited for summaries in this iteration
        self._hindsight: list[Finished] | None = None  # of the iteration under way, made before its update
        self.bank: SkillBank | None = None
        self.together: Callable[[], AbstractContextManager[None]] = nullcontext
        self._state: dict[str, Any] | None = None
        self._checked = False
        self._fits = False  # or does something else, which leaves the summariser open

    def check_summariser(self) -> None:
        """Try the summariser before anything is written or loaded, if this run uses it. Once is enough.

        Raises:
            ConfigError: It cannot work.
        """
        if not self._checked and ranks.leads() and not isinstance(self.context, NoContext):
            self.checked.check_ready()
        self._checked = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check_summariser()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._fits = True
        if self.bank is None and ranks.leads():  # opened late: input that is refused before leaves no file behind
            path = Path(trainer.default_root_dir) / BANK_FILE
            if self._state is not None and self._state["position"] and not path.exists():
                raise ConfigError(
                    f"skills: {path} is not there, and the checkpoint saw {self._state['position']} events in the bank: a checkpoint goes "
                    "on in its own run folder, or in a copy of the whole folder."
                )
            try:
                self.bank = SkillBank(path, **self.bank_settings)
            except (ValueError, sqlite3.Error) as e:
                raise ConfigError(f"skills: {e}") from e
        if self._state is not None and self.bank is not None:
            self._rewind(self._state)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.bank is not None and self.failed and not self.made and not len(self.bank):
            why = self.checked.last_error
            log.warning("skills: none of %d trajectories could be summarised%s", self.failed, f"; the last failure: {why}" if why else "")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._fits:
            self._fits = False
            self.checked.close()
        if self.bank is not None:
            self.bank.close()
            self.bank = None

    def bind(
        self, generate: Callable[..., list[str]], solve: Callable[[str, Summariser], Skill | None],
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        """Give a summariser that needs one the base model's voice, and a context that needs it the environment's own solutions.

        Whatever may use that voice is done in the context `together`, by all ranks: see `Policy.together`.
        """
        self.together = together
        if isinstance(self.summariser, BaseSummariser):
            self.summariser.bind(generate)
        if isinstance(self.context, GroundTruthContext):
            self.context.bind(lambda task_id: solve(task_id, self.checked))

    # -- what the stream asks for ------------------------------------------------------------------------------------------

    def choose(
        self, task_ids: Sequence[str], every: Sequence[str], seed: int, epoch: int, epoch_start: bool
    ) -> list[tuple[int | None, str]]:
        """`skill_for` each of an iteration's tasks, after a `refresh` of `every` training task: rank 0 chooses and tells the others."""
        found: list[tuple[int | None, str]] = []
        with self.together():
            if ranks.leads():
                self.refresh(every, seed, epoch, epoch_start)
                found = [self.skill_for(t) for t in task_ids]
        return ranks.broadcast(found)

    def refresh(self, task_ids: Sequence[str], seed: int, epoch: int, epoch_start: bool) -> None:
        """Choose every task's skill anew where it is due. Called before each iteration's rollout."""
        assert self.bank is not None
        if epoch_start or self.refresh_when == "iteration":
            self.prompts = {}
        for task_id in task_ids:
            if task_id in self.prompts:
                continue  # of those without a prompt, one may have got its first skill late, from a slow summariser
            skill = self.context(self.bank, task_id, task_ids, seed, epoch)
            if skill is not None and skill.skill_id is not None:
                self.prompts[task_id] = skill.skill_id

    def skill_for(self, task_id: str) -> tuple[int | None, str]:
        """The skill that conditions the task's teacher: its id and its text; (None, "") without one.

        Raises:
            RuntimeError: the bank has skills of the task, and its teacher would get none.
        """
        assert self.bank is not None
        skill_id = self.prompts.get(task_id)
        if skill_id is not None:
            return skill_id, self._text(self.bank.get(skill_id))
        if isinstance(self.context, BankContext) and self.bank.skills(task_id):
            raise RuntimeError(f"task {task_id} has {len(self.bank.skills(task_id))} skills, and its teacher got none")
        return None, ""

    def texts(self, groups: Sequence[Sequence[Trajectory]], iteration: int) -> list[list[str]] | None:
        """What a `GroupContext` puts in front of each member's teacher prompt, of this rank's groups; None with one of the other kind."""
        if not isinstance(self.context, GroupContext):
            return None
        skills: dict[tuple[str, int], Skill] = {}
        if self.context.needs_skills:
            started = time.perf_counter()
            self._insert(iteration)  # what is ready from before stays apart
            self._submit(groups, iteration)
            self.checked.drain()
            self._hindsight = self.checked.collect()
            skills = {(s.task_id, s.source_member): s for done in self._hindsight for s in done.skills}
            self.summary_s += time.perf_counter() - started
        with self.together():  # a context may have the base model summarise
            return [[self._text(x) for x in self.context.choose(g, [skills.get((t.task_id, t.member)) for t in g])] for g in groups]

    def _text(self, told: Skill | Trajectory | None) -> str:
        if isinstance(told, Trajectory):
            actions = " ".join(turn.action for turn in told.turns)
            return fill(self.transcript_template, {"transcript": conversation(told), "actions": actions})
        return told.render(self.template) if told is not None else ""

    # -- what an iteration leaves ------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        groups: Sequence[TrajectoryGroup] = batch
        iteration = groups[0].trajectories[0].iteration
        if self.bank is not None:
            self._book(self.bank, groups, outputs["group_gap"].tolist(), iteration)
        started = time.perf_counter()
        if self._hindsight is None and not isinstance(self.context, NoContext):
            mine = [groups[i].trajectories for i in ranks.share(len(groups))]
            self._submit(mine, iteration, self.min_reward)  # what would not enter costs no summary
        if trainer.should_stop or trainer.global_step >= trainer.estimated_stepping_batches:
            self.checked.drain()  # the last checkpoint is to hold all of them; nothing enters the bank behind a checkpoint
        size = self._insert(iteration)
        self.summary_s += time.perf_counter() - started
        numbers = {"skills/bank": float(size), "skills/failed": float(self.failed), "time/summary_s": self.summary_s}
        self.summary_s = 0.0
        outputs["metrics"].add(numbers)
        pl_module.log_dict(numbers, logger=False, batch_size=1)

    def _book(self, bank: SkillBank, groups: Sequence[TrajectoryGroup], gaps: Sequence[float], iteration: int) -> None:
        for g, gap in zip(groups, gaps, strict=True):
            if g.skill_id is not None and g.counted:  # a use of which nothing is known is none
                reward = sum(t.reward for t in g.counted) / len(g.counted)
                bank.record_use(g.skill_id, iteration, reward=reward, gap=gap)

    def _submit(self, groups: Sequence[Sequence[Trajectory]], iteration: int, least: float = -math.inf) -> None:
        rows = [t for g in groups for t in g if t.turns and not t.failure and t.reward >= least]
        with self.together():
            self.checked.submit(iteration, rows)

    def _insert(self, iteration: int) -> int:
        """Put what is ready on any rank into the bank, in the order that one rank would; the bank's size."""
        finished, self._hindsight = [*(self._hindsight or []), *self.checked.collect()], None
        told = [done for theirs in ranks.gather(finished) for done in theirs]
        self.failed += sum(done.n_failed for done in told)
        self.made += sum(len(done.skills) for done in told)
        size = 0
        if self.bank is not None:
            for since in sorted({done.iteration for done in told}):
                skills = [s for d in told if d.iteration == since for s in d.skills if s.source_reward >= self.min_reward]
                self.bank.insert(sorted(skills, key=lambda s: (s.task_id, s.source_member)), iteration)
            size = len(self.bank)
        size, self.failed = ranks.broadcast((size, self.failed))
        return size

    # -- checkpoints -------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.bank is None:
            return  # rank 0 has it, and writes the checkpoint
        self.bank.sync()  # the checkpoint says how far it is
        checkpoint["skill_bank"] = {
            "iteration": trainer.global_step, "position": self.bank.position, "prompts": dict(self.prompts), "failed": self.failed,
        }  # fmt: skip

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rewind the bank to the checkpoint: what was written after it did not happen."""
        self._state = checkpoint.get("skill_bank")

    def _rewind(self, state: dict[str, Any]) -> None:
        assert self.bank is not None
        try:
            self.bank.cut(state["iteration"], expect=state["position"])
        except ValueError as e:
            raise ConfigError(f"skills: {e}") from e
        self.prompts, self.failed, self._state = dict(state["prompts"]), state["failed"], None
