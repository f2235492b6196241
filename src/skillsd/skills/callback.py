"""The SkillBank callback: a `SkillSelection` in Lightning's hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import lightning as L

from skillsd.files.run_folder import BANK_FILE
from skillsd.skills.context import PrivilegedContext
from skillsd.skills.selection import SkillSelection
from skillsd.skills.summarisers import Summariser


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
        # opened late: input that is refused before leaves no file behind
        self.selection.open(Path(trainer.default_root_dir) / BANK_FILE, self._saved)
        self._saved = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        last = trainer.should_stop or trainer.global_step >= trainer.estimated_stepping_batches
        numbers = self.selection.finish(batch, outputs["group_gap"].tolist(), last)
        outputs["metrics"].add(numbers)
        pl_module.log_dict(numbers, logger=False, batch_size=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.selection.warn_if_useless()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._fits:
            self._fits = False
            self.selection.checked.close()
        self.selection.close()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if (state := self.selection.state(trainer.global_step)) is not None:  # rank 0 has it, and writes the checkpoint
            checkpoint["skill_bank"] = state

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get("skill_bank")


def find_selection(trainer: L.Trainer) -> SkillSelection | None:
    """The selection of a trainer's SkillBankCallback; None without one."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    return next((c.selection for c in callbacks if isinstance(c, SkillBankCallback)), None)
