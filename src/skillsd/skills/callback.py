"""The SkillBank callback: the bank of a run, and a `SkillSelection` in Lightning's hooks."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import lightning as L

from skillsd import parallel
from skillsd.errors import ConfigError
from skillsd.files.run_folder import BANK_FILE
from skillsd.skills.bank import SkillBank
from skillsd.skills.context import PrivilegedContext
from skillsd.skills.selection import SkillSelection
from skillsd.skills.summarisers import Summariser

log = logging.getLogger(__name__)


@runtime_checkable
class UsesSkills(Protocol):
    """A data module whose teachers see skills."""

    def use_skills(self, selection: SkillSelection) -> None:
        """Take the run's selection; called before training."""


class SkillBankCallback(L.Callback):
    """Summarises trajectories into skills, keeps them in a bank, and gives each task's teacher its prompt. See `selection`.

    Args:
        summariser: Makes skills. Default: RulesSummariser.
        context: Chooses what the teacher sees. Default: the task's own skill by UCB.
        capacity: Skills kept a task; null keeps all.
        eviction: Which one goes when the bank of a task is full: that of the lowest mean reward, or the oldest.
        value_estimate: What a skill's mean reward is: its source's reward, or the mean over its uses of the group's reward or gap.
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
        eviction: Literal["worst", "oldest"] = "worst",
        value_estimate: Literal["source", "next_visit", "gap"] = "source",
        min_reward: float | None = None,
        template: str | None = None,
        transcript_template: str | None = None,
        refresh: Literal["epoch", "iteration"] = "epoch",
    ) -> None:
        super().__init__()
        bank = {"capacity": capacity, "eviction": eviction, "value_estimate": value_estimate}
        self.selection = SkillSelection(summariser, context, bank, min_reward, template, transcript_template, refresh)
        self._saved: dict[str, Any] | None = None  # a checkpoint's state, until the bank is open
        self._fits = False  # or does something else, which leaves the summariser open

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.selection.check_summariser()
            data = getattr(trainer, "datamodule", None)
            if isinstance(data, UsesSkills):
                data.use_skills(self.selection)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._fits = True
        if parallel.is_rank_zero():  # opened late: input that is refused before leaves no file behind
            self._open(Path(trainer.default_root_dir) / BANK_FILE, self._saved)
        self._saved = None

    def _open(self, path: Path, state: dict[str, Any] | None) -> None:
        """Open the bank, and rewind it to a checkpoint's `state`: what was written after it did not happen.

        Raises:
            ConfigError: It cannot be used, or is not the one that the checkpoint saw.
        """
        selection = self.selection
        if selection.bank is None and state is not None and state["position"] and not path.exists():
            raise ConfigError(
                f"skills: {path} is not there, and the checkpoint saw {state['position']} events in the bank: a checkpoint goes "
                "on in its own run folder, or in a copy of the whole folder."
            )
        try:
            selection.bank = selection.bank or SkillBank(path, **selection.bank_settings)
            if state is not None:
                selection.bank.cut(state["iteration"], expect=state["position"])
                selection.chosen = {task_id: selection.bank.get(skill_id) for task_id, skill_id in state["prompts"].items()}
                selection.failed = state["failed"]
        except (ValueError, sqlite3.Error) as e:
            raise ConfigError(f"skills: {e}") from e

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        last = trainer.should_stop or trainer.global_step >= trainer.estimated_stepping_batches
        numbers = self.selection.finish(batch, outputs["group_gap"].tolist(), last)
        outputs["metrics"].add(numbers)
        pl_module.log_dict(numbers, logger=False, batch_size=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        selection = self.selection
        if selection.bank is not None and selection.failed and not selection.made and not len(selection.bank):
            why = f"; the last failure: {selection.checked.last_error}" if selection.checked.last_error else ""
            log.warning("skills: none of %d trajectories could be summarised%s", selection.failed, why)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._fits:
            self._fits = False
            self.selection.checked.close()
        if self.selection.bank is not None:
            self.selection.bank.close()
            self.selection.bank = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        selection, bank = self.selection, self.selection.bank
        if bank is not None:  # rank 0 has it, and writes the checkpoint
            bank.sync()  # the checkpoint says how far it is
            prompts = {task_id: skill.skill_id for task_id, skill in selection.chosen.items()}
            state = {"iteration": trainer.global_step, "position": bank.position, "prompts": prompts, "failed": selection.failed}
            checkpoint["skill_bank"] = state

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get("skill_bank")


def find_selection(trainer: L.Trainer) -> SkillSelection | None:
    """The selection of a trainer's SkillBankCallback; None without one."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    return next((c.selection for c in callbacks if isinstance(c, SkillBankCallback)), None)
