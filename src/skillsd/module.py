"""Skill-SD (arXiv:2604.10674): a student learns from its rewards, and from itself with the task's skill in front.

Algorithm 1, an iteration:

    1  teacher <- student, their average, or as it began            callbacks/teacher.py
    2  S(x) <- the skill of each task x that UCB retrieves          skills/selection.py, which asks skills/retrieval.py
    3  the student plays G episodes of each task, without S(x)      rollout/, asked by stream.py
    4  rewards -> group advantages                                  batch.py
    5  student and teacher score the same tokens                    here: `loss`, `teacher`
    6  one update of L = L_GRPO + lambda L_SDL                      here: `training_step`; learner.py
    7  the new trajectories are summarised into the bank            skills/selection.py
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from skillsd.batch import Batch
from skillsd.errors import ConfigError
from skillsd.files.checkpoint import check_base
from skillsd.learner import Learner
from skillsd.metrics import Metrics
from skillsd.objective import NotPerToken, Objective, Terms
from skillsd.optimizer import OptimizerSettings
from skillsd.policy import Policy, PolicySettings, Scores
from skillsd.strategy import check_same_step, check_strategy, keep_base_local
from skillsd.trajectory import Trajectory, TrajectoryGroup


class SkillSD(L.LightningModule):
    """A student and a teacher adapter on one base, trained with GRPO and skill-conditioned self-distillation.

    Args:
        policy: The base model and its adapters.
        objective: The loss.
        optimizer: AdamW and its schedule.
        micro_batch_tokens: Most tokens in one forward and backward, padding included where there is any; the gradient does not depend on
            it. An update that runs out of memory is repeated with half of it.
        grad_norm_every: Iterations between two measurements of each term's gradient norm (they cost a second backward); 0 never.
    """

    def __init__(
        self,
        policy: PolicySettings,
        objective: Objective | None = None,
        optimizer: OptimizerSettings | None = None,
        micro_batch_tokens: int = 16384,
        grad_norm_every: int = 10,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        self.settings, self.objective, self.optim = policy, objective or Objective(), optimizer or OptimizerSettings()
        self.grad_norm_every = grad_norm_every
        self.learner = Learner(self, self.optim, micro_batch_tokens)
        self.policy: Policy = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.policy is None:
            if self._trainer is not None:
                check_strategy(self._trainer.strategy)
            self.policy = Policy(self.settings, self.device)
            keep_base_local(self)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.policy.student_parameters(), self.optim.lr, weight_decay=self.optim.weight_decay)
        run_steps = self.trainer.estimated_stepping_batches  # infinite without an end: see cli
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self.optim.factor(run_steps))]

    def on_train_start(self) -> None:
        check_same_step(self.trainer)
        self.optim.apply(self.optimizers(), self.lr_schedulers())

    # -- Algorithm 1, lines 4 to 6 ----------------------------------------------------------------------------------------

    def training_step(self, groups: Sequence[TrajectoryGroup], batch_idx: int) -> dict[str, Any]:
        """One update on the groups of one iteration.

        Returns:
            `metrics`: the iteration's numbers so far, to which callbacks add theirs; `group_gap`: [groups], see `Batch.group_gap`;
            `skipped`: the update was not finite; `tokens`: see `Update`.
        """
        policy, started = self.policy, time.perf_counter()
        batch = Batch.from_groups(groups, self.objective, self.global_step, policy.teacher_is_student, policy.context_length)
        measure = self.grad_norm_every > 0 and self.global_step % self.grad_norm_every == 0 and batch.weight > 0
        update = self.learner.update(batch, self.loss, split_gradient=measure)
        metrics = Metrics(batch.metrics(), self.learner.metrics(batch, update, time.perf_counter() - started))
        self.log_dict(metrics.measured, logger=False, batch_size=1)
        self.log_dict(metrics.progress(), prog_bar=True, logger=False, batch_size=1)
        return {"metrics": metrics, "group_gap": batch.group_gap(update.gaps), "skipped": update.skipped, "tokens": update.tokens}

    def loss(self, rows: Batch) -> Terms:
        """Both terms of a micro-batch of B rows and T tokens, as sums over its action tokens; the learner divides them by N.

            r     = pi_stu / sg(pi_old)            L_GRPO = -(1/N) sum min(r A, clip(r, 1 - 0.2, 1 + 0.28) A)        (Eq. 3-4)
            ell   = log pi_stu(y | x) - log pi_tea(y | x + S(x))                                                     (Eq. 10)
            rho   = pi_stu / sg(pi_behaviour), with gradient through the numerator                                   (Eq. 11, 13)
            L_SDL = (1/N) sum rho (exp(-ell) - 1 + ell)                                                              (Eq. 12)
            L     = L_GRPO + lambda L_SDL                                                                            (Eq. 14)

        Another method of the family puts its own signal in the place of L_SDL: see `objective`.
        """
        student = self.policy.score("student", rows.student, rows.temperature)
        logp_teacher, divergence, seconds = self.teacher(student, rows)
        # Eq. 13: where the teacher sampled, the old student is today's, since a batch is one update
        logp_old = torch.where(rows.sampled_by_teacher[:, None], student.logp.detach(), rows.logp_behaviour)
        try:
            terms = self.objective.terms(
                student.logp, logp_old, logp_teacher, rows.mask, rows.advantage, weight=rows.weight, logp_behaviour=rows.logp_behaviour,
                teacher_mask=rows.teacher_mask, success=rows.success, return_gap=rows.return_gap, divergence=divergence,
            )  # fmt: skip
        except NotPerToken as e:
            raise ConfigError(f"model.objective: {e}") from e
        terms.metrics["entropy"] = (student.entropy * rows.mask).sum()
        return replace(terms, teacher_s=seconds)

    def teacher(self, student: Scores, rows: Batch) -> tuple[Tensor, Tensor | None, float]:
        """The same tokens under the teacher, with its context in front and without gradient.

        Returns:
            Log-probs [B, T], nats, those of the student in rows without a teacher, so that their gap is 0; the signal's divergence
            [B, T] with gradient, if it compares distributions; and seconds.
        """
        started, signal = self._now(), self.objective.signal
        logp = student.logp.detach().clone()
        divergence = token_index = None
        if signal.distributional:
            divergence = torch.zeros_like(student.logp)
            token_index = (rows.mask.flatten().cumsum(0) - 1).view_as(rows.mask)  # of each action token in `hidden`
        teacher_rows = rows.teacher_rows
        for part in self.policy.micro_batches([len(rows.teacher[k]) for k in teacher_rows], self.learner.micro_batch_tokens):
            chosen = [teacher_rows[j] for j in part]
            row_index = torch.tensor(chosen, device=logp.device)
            with torch.no_grad():
                scores = self.policy.score("teacher", [rows.teacher[k] for k in chosen], rows.temperature)
            logp[row_index, : scores.logp.shape[1]] = scores.logp
            if divergence is not None and token_index is not None:
                row, column = rows.mask[row_index].nonzero(as_tuple=True)
                student_hidden = student.hidden[token_index[row_index][row, column]]
                value = self.policy.compare(student_hidden, scores.hidden, signal.divergence, rows.temperature)
                divergence = divergence.index_put((row_index[row], column), value)
        return logp, divergence, self._now() - started

    def _now(self) -> float:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()  # or the seconds of one part would be booked on the next
        return time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Comes after all callbacks have added their numbers: seal the record, and give loggers what was measured in this iteration.

        Through `log` a number that is not measured in every iteration would be given to them anew, as it was, until the epoch ends.
        """
        self.optimizers().zero_grad()  # type: ignore[union-attr]  # the rollout can use the gradient's memory
        iteration, trainer = batch[0].trajectories[0].iteration, self.trainer
        measured = outputs["metrics"].seal().measured
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (iteration + 1) % every == 0:
            for logger in trainer.loggers:
                logger.log_metrics(measured, iteration)

    # -- validation, batches and checkpoints -------------------------------------------------------------------------------

    def validation_step(self, trajectories: Sequence[Trajectory], batch_idx: int) -> None:
        """Held-out episodes arrive played; their interval and table are the panel's business (callbacks/panel.py)."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # plain data; tensors are made where they are needed

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The two adapters alone: the base is never saved."""
        return self.policy.adapter_state()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self.policy.load_adapter_state(state_dict)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skillsd"] = {"base": self.policy.identity} | self.learner.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_base(checkpoint, self.policy.identity)
        self.learner.load_state_dict(checkpoint["skillsd"])
