"""Skill-SD (arXiv:2604.10674), Algorithm 1, lines 4 to 6: rewards to advantages, student and teacher on the same tokens, one update.

Lines 1 (teacher sync) and 7 (skills) are callbacks, lines 2 and 3 (retrieval and rollout) are the data module's stream.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from skillsd import ranks
from skillsd.batch import Batch, Update, log_measured, mean, padded, reduce, total_norm
from skillsd.checkpoint import LAST, check_base
from skillsd.errors import ConfigError
from skillsd.objective import Objective
from skillsd.policy import OUT_OF_MEMORY, Policy, PolicySettings, Scores, micro_batches, of_the_base
from skillsd.run_folder import CHECKPOINTS
from skillsd.trajectory import FAILURES, Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)

METRICS = (
    "loss/total", "loss/policy", "loss/distillation", "reward/mean", "reward/success", "reward/completion", "reward/zero_variance",
    "teacher/skill_share", "teacher/dropped_rows", "teacher/gap_mean", "teacher/gap_std", "teacher/health", "teacher/k3",
    "policy/entropy", "policy/clip_fraction", "policy/logp_drift", "policy/logp_drift_max", "grad_norm/total", "grad_norm/policy",
    "grad_norm/distillation", "teacher/weight", "teacher/shift", "optimizer/lr", "rollout/env_steps", "rollout/tokens",
    "rollout/action_tokens", "rollout/turns", "rollout/finish_length", "rollout/failed", *(f"rollout/failed_{k}" for k in FAILURES),
    "policy/skipped_steps", "learner/tokens", "skills/bank", "skills/failed",
    "memory/peak_gib", "memory/micro_batch_tokens", "time/rollout_s", "time/teacher_s", "time/update_s", "time/summary_s",
    "time/rollout_tokens_per_s", "time/learner_tokens_per_s",
)  # fmt: skip
"""Every scalar an iteration logs, in the order of metrics.csv. Only those under time/ and memory/ differ in a re-run.

Failed episodes (`rollout/failed`, a share; by kind, counts) are in those under rollout/ alone. `policy/skipped_steps` counts the run's."""
MOST = 1e30
"""Of a learning rate and a weight decay: AdamW refuses a factor beyond float32 in the middle of a run."""
SKIPS = 3
"""So many updates in a row that are not finite stop the run."""


@dataclass
class OptimizerSettings:
    """AdamW on the student's adapter."""

    lr: float = 2e-5
    """Learning rate after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 0
    """Iterations over which the learning rate grows linearly."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine to 0 at the run's end."""
    schedule_steps: int | None = None
    """Iterations at which the cosine reaches 0, for runs that another limit ends; null is the run's length."""
    gradient_clip_norm: float = 1.0
    """Largest gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        if not all(x >= 0 for x in (self.lr, self.weight_decay, self.warmup_steps, self.gradient_clip_norm)):  # nan is neither
            raise ConfigError("model.init_args.optimizer: lr, weight_decay, warmup_steps and gradient_clip_norm must be 0 or more.")
        if max(self.lr, self.weight_decay) > MOST:
            raise ConfigError(f"model.init_args.optimizer: lr and weight_decay must be at most {MOST:g}: AdamW computes in float32.")
        if self.schedule_steps is not None and self.schedule_steps < 1:
            raise ConfigError(f"model.init_args.optimizer.schedule_steps is {self.schedule_steps}: give at least 1 iteration, or null.")


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
        if micro_batch_tokens < 1:
            raise ConfigError(f"model.init_args.micro_batch_tokens is {micro_batch_tokens}: give at least 1.")
        self.automatic_optimization = False
        self.strict_loading = False
        self.settings, self.objective, self.optim = policy, objective or Objective(), optimizer or OptimizerSettings()
        self.micro_batch_tokens, self.grad_norm_every = micro_batch_tokens, grad_norm_every
        self.policy: Policy = None  # type: ignore[assignment]
        self.metrics: dict[str, float] = {}
        self.teacher_s = 0.0  # seconds of teacher scoring in this iteration
        self.skipped = self.skipped_in_a_row = 0  # updates whose loss or gradient was not finite
        self.keep_tokens = False  # `training_step` is to return them: a logger asks before an iteration
        self._teacher_is_student: bool | None = None  # of the checkpoint being loaded

    def configure_model(self) -> None:
        if self.policy is None:
            if self._trainer is not None:
                check_strategy(self._trainer.strategy)
            self.policy = Policy(self.settings, self.device)
            # DDP would send every rank what it has loaded itself, or its part of it.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, of_the_base(self))

    def configure_optimizers(self) -> Any:
        o = self.optim
        optimizer = torch.optim.AdamW(self.policy.student_parameters(), o.lr, weight_decay=o.weight_decay)
        total = max(1, o.schedule_steps or self.trainer.estimated_stepping_batches)  # infinite without an end: see cli

        def factor(step: int) -> float:
            if step < o.warmup_steps:
                return (step + 1) / o.warmup_steps
            left = (step - o.warmup_steps) / max(1, total - o.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, left))) if o.schedule == "cosine" else 1.0

        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    def on_train_start(self) -> None:
        """The configuration's lr and weight decay hold, whatever a checkpoint brought along: "set a smaller lr" must help.

        Raises:
            ConfigError: the ranks have not all read the same checkpoint.
        """
        if len(set(ranks.gather(self.global_step))) > 1:
            raise ConfigError(
                f"trainer.default_root_dir: {self.trainer.default_root_dir} is not the same folder on every node, so not all ranks have "
                "read its checkpoint: name one on a filesystem that they share."
            )
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        schedule.base_lrs = [self.optim.lr]
        lr = self.optim.lr * schedule.lr_lambdas[0](schedule.last_epoch)
        for group in optimizer.param_groups:
            group.update(initial_lr=self.optim.lr, lr=lr, weight_decay=self.optim.weight_decay)

    # -- Algorithm 1, lines 4 to 6 ----------------------------------------------------------------------------------------

    def training_step(self, groups: Sequence[TrajectoryGroup], batch_idx: int) -> dict[str, Any]:
        started = time.perf_counter()
        batch = Batch(groups, self.objective)
        rows, temperature = batch.rows, groups[0].temperature
        advantage = batch.advantage
        n = max(1, sum(rows[i].n_actions for i in batch.kept))  # N of Eq. 3-14: one count, whatever the micro-batches
        weight = self.objective.weight(self.global_step)
        teacher_rows = self._teacher_rows(batch, weight)
        mine = batch.share(teacher_rows)
        optimizer: Any = self.optimizers()
        params = self.policy.student_parameters()
        apart = bool(self.grad_norm_every) and self.global_step % self.grad_norm_every == 0 and weight > 0

        def update() -> Update:
            optimizer.zero_grad()
            return self._accumulate(batch, mine, advantage, n, weight, teacher_rows, temperature, params if apart else [])

        done = self._within_memory(update, [len(batch.student[i]) for i in mine])
        reduce(done, params)
        norm = self._step(optimizer, params, done)
        self._record(batch, done, n, weight, teacher_rows, norm, params, time.perf_counter() - started)
        sizes = [len(g.trajectories) for g in groups]
        gaps = done.gaps.nan_to_num(0.0, 0.0, 0.0)  # of an update that was skipped
        gap = torch.stack([(a * x).sum() for a, x in zip(advantage.split(sizes), gaps.split(sizes), strict=True)])
        return {"group_gap": gap, "tokens": done.tokens}

    def on_train_batch_end(self, *args: Any) -> None:
        """The rollout can use the gradient's memory."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()

    def _within_memory(self, update: Callable[[], Update], lengths: Sequence[int]) -> Update:
        """`update` of rows of these lengths, begun anew with half the micro-batch whenever memory runs out: the gradient is the same.

        Raises:
            ConfigError: a row that stands alone does not fit, or others would have to repeat it too, on a sharded base.
        """
        while True:
            try:
                return update()
            except torch.OutOfMemoryError as e:
                if self.policy.sharded:
                    raise ConfigError(OUT_OF_MEMORY) from e
                # go on outside: the exception holds the tensors of the failed attempt
            longest = max(lengths)
            if self.micro_batch_tokens <= longest:
                raise ConfigError(
                    f"model.init_args.micro_batch_tokens: a trajectory of {longest} tokens alone does not fit into the memory: set "
                    "policy.gradient_checkpointing, a smaller policy.head_chunk or data.init_args.rollout.max_trajectory_tokens."
                )
            self.micro_batch_tokens = max(longest, self.micro_batch_tokens // 2)
            gc.collect()
            torch.cuda.empty_cache()
            log.warning("out of memory in the update: it is repeated with micro_batch_tokens %d", self.micro_batch_tokens)

    def _accumulate(
        self, batch: Batch, mine: Sequence[int], advantage: Tensor, n: int, weight: float, teacher_rows: Collection[int],
        temperature: float, apart: Sequence[torch.nn.Parameter],
    ) -> Update:  # fmt: skip
        """The gradient of the rows `mine`, a micro-batch at a time; that of the distillation alone for the parameters in `apart`."""
        rows = batch.rows
        torch.manual_seed(rows[0].seed * 1_000_003 + rows[0].iteration + (ranks.rank() << 40))  # for dropout: a resumed run draws the same
        out = Update(torch.zeros(len(rows)), [torch.zeros_like(p) for p in apart])
        self.teacher_s = 0.0
        parts = micro_batches([len(batch.student[i]) for i in mine], self.micro_batch_tokens, not self.policy.packs)
        for at in range(self.policy.agree(len(parts))):
            if at >= len(parts):
                self._idle(apart)
                continue
            index = [mine[k] for k in parts[at]]
            mask, recorded = padded([rows[i] for i in index], self.policy.device)
            student = self.policy.score("student", [batch.student[i] for i in index], temperature)
            logp = student.logp
            teacher, divergence = self._teacher(student, mask, index, batch, teacher_rows, temperature)
            # Eq. 13: where the teacher sampled, the old student is today's, since a batch is one update
            old = torch.where(batch.by_teacher[index].to(mask.device)[:, None], logp.detach(), recorded)
            taught = torch.tensor([i in teacher_rows for i in index], device=mask.device)
            terms = self.objective.terms(
                logp, old, teacher, mask, advantage[index].to(logp), weight=weight, logp_behaviour=recorded, taught=taught,
                success=torch.tensor([rows[i].success for i in index], device=mask.device),
                return_gap=batch.return_gap[index].to(logp), divergence=divergence,
            )  # fmt: skip
            if apart:
                for total, g in zip(out.distillation_grad, self._backward(terms.distillation / n, logp, apart), strict=False):
                    if g is not None:
                        total += g
            self._backward(self.objective.total(terms, n), logp)

            out.gaps[index] = ((teacher - logp.detach()) * mask).sum(1).cpu()
            if self.keep_tokens:
                out.tokens.append(((teacher - logp.detach())[mask & taught[:, None]], (logp.detach() - recorded)[mask]))
            entropy = (student.entropy * mask).sum()
            drift = torch.where(mask, (logp - old).abs(), 0.0).max()
            numbers = {"policy": terms.policy, "distillation": terms.distillation, "entropy": entropy, **terms.metrics}
            *sums, most = torch.stack([x.detach().double() for x in (*numbers.values(), drift)]).tolist()  # one transfer for all
            for key, value in zip(numbers, sums, strict=True):
                out.sums[key] += value
            out.largest_drift = max(out.largest_drift, most)
        return out

    def _backward(self, loss: Tensor, student: Tensor, apart: Sequence[torch.nn.Parameter] = ()) -> Sequence[Tensor | None]:
        """Adds the gradient of `loss` to the parameters', or gives that of those in `apart`, if there is one.

        Without a reward, rows that no teacher speaks to teach nothing. On a sharded base all ranks have a backward if one has.
        """
        if not self.policy.agree(int(loss.requires_grad)):
            return ()
        loss = loss if loss.requires_grad else student.sum() * 0.0
        with self.policy.recomputing(), self._alone():
            if apart:
                return torch.autograd.grad(loss, list(apart), retain_graph=True, allow_unused=True)
            self.manual_backward(loss)
        return ()

    def _idle(self, apart: Sequence[torch.nn.Parameter]) -> None:
        """Other ranks on the sharded base have one more micro-batch: the same forwards and backwards, of nothing."""
        student = self.policy.idle(grad=True)
        for _ in range(self.policy.agree(0)):
            self.policy.idle()
        if apart:
            self._backward(student.detach(), student, apart)
        self._backward(student.detach(), student)

    def _alone(self) -> Any:
        """A backward that tells no other rank: micro-batches differ in number, and there is one reduction after the last."""
        model = self.trainer.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def _teacher_rows(self, batch: Batch, weight: float) -> set[int]:
        """Rows that need a teacher. A prompt that does not fit is left out whole and counted."""
        self.dropped_rows = 0
        if weight <= 0:
            return set()
        wanted = {i for i in batch.kept if batch.told[i] or not self.policy.teacher_is_student}
        fitting = {i for i in wanted if len(batch.teacher[i]) <= self.policy.context_length}
        self.dropped_rows = len(wanted) - len(fitting)
        return fitting

    def _teacher(
        self, student: Scores, mask: Tensor, index: Sequence[int], batch: Batch, teacher_rows: Collection[int], temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        """Teacher's log-probs [B, T], the student's own (gap 0) in rows that need no teacher; and the signal's divergence if it has one."""
        started = self._now()
        out, signal = student.logp.detach().clone(), self.objective.signal
        divergence = place = None
        if signal.distributional:
            divergence = torch.zeros_like(student.logp)
            place = (mask.flatten().cumsum(0) - 1).view_as(mask)  # of each action token in `hidden`
        taught = [k for k, i in enumerate(index) if i in teacher_rows]
        parts = micro_batches([len(batch.teacher[index[k]]) for k in taught], self.micro_batch_tokens, not self.policy.packs)
        idle = self.policy.agree(len(parts)) - len(parts)
        for part in parts:
            chosen = [taught[j] for j in part]
            at = torch.tensor(chosen, device=mask.device)
            with torch.no_grad():
                scores = self.policy.score("teacher", [batch.teacher[index[k]] for k in chosen], temperature)
            out[at, : scores.logp.shape[1]] = scores.logp
            if divergence is not None and place is not None:
                where = mask[at].nonzero(as_tuple=True)
                own = student.hidden[place[at][where]]
                value = self.policy.compare(own, scores.hidden, signal.divergence, temperature)
                divergence = divergence.index_put((at[where[0]], where[1]), value)
        for _ in range(idle):
            self.policy.idle()
        self.teacher_s += self._now() - started
        return out, divergence

    def _now(self) -> float:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()  # or the seconds of one part would be booked on the next
        return time.perf_counter()

    def _step(self, optimizer: Any, params: Sequence[torch.nn.Parameter], done: Update) -> float:
        """One update; the gradient's norm. If that or the loss is not finite, nothing changes but the schedule and the counters.

        Raises:
            ConfigError: that was the third time in a row, or the update was finite and the weights no longer are.
        """
        clip = self.optim.gradient_clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(params, clip)) if any(p.grad is not None for p in params) else 0.0
        self._clip_scale = min(1.0, clip / (norm + 1e-6))
        if math.isfinite(norm) and math.isfinite(done.sums["policy"]) and math.isfinite(done.sums["distillation"]):
            self.skipped_in_a_row = 0
        else:
            self._skip(norm, done)
            optimizer.zero_grad()  # without gradients AdamW touches nothing; the step still counts, so that the run ends where it would
        optimizer.step()
        # A wait for the device, once an iteration: the checkpoint that follows copies the weights to the host anyway.
        if not torch.nn.utils.get_total_norm([p.detach() for p in params], math.inf).isfinite():
            raise ConfigError(
                f"model.init_args.optimizer: the weights are not finite after an update of loss {_loss(done):g}, gradient norm {norm:g}, "
                f"lr {optimizer.param_groups[0]['lr']:g}; it is not saved. {last_checkpoint(self.trainer)}: set a smaller lr."
            )
        self.policy.student_changed()
        self.lr = optimizer.param_groups[0]["lr"]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return norm

    def _skip(self, norm: float, done: Update) -> None:
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        done.distillation_grad = []
        what = f"loss {_loss(done):g}, gradient norm {norm:g}"
        if self.skipped_in_a_row >= SKIPS:
            raise ConfigError(
                f"model.init_args.optimizer: {SKIPS} updates in a row were not finite (the last: {what}) and left the policy as it was. "
                f"{last_checkpoint(self.trainer)}: set a smaller lr or gradient_clip_norm, or policy.dtype to float32."
            )
        log.warning("iteration %d: the update is skipped, it is not finite: %s", self.global_step, what)

    # -- what is logged ---------------------------------------------------------------------------------------------------

    def _record(
        self, batch: Batch, done: Update, n: int, weight: float, teacher_rows: Collection[int], norm: float,
        params: Sequence[torch.nn.Parameter], seconds: float,
    ) -> None:  # fmt: skip
        rows, sums = batch.rows, done.sums
        counted, failed = [t for t in rows if not t.failed], [t.failure_kind for t in rows if t.failed]
        taught = max(1, sum(rows[i].n_actions for i in teacher_rows))
        scored = sum(len(batch.student[i]) for i in batch.kept) + sum(len(batch.teacher[i]) for i in teacher_rows)
        gap = sums["gap"] / taught
        m = dict.fromkeys(METRICS, math.nan)
        m |= {
            "loss/policy": sums["policy"] / n, "loss/distillation": sums["distillation"] / n,
            "loss/total": (sums["policy"] + sums["distillation"]) / n,
            "reward/mean": mean(t.reward for t in counted), "reward/success": mean(t.success for t in counted),
            "reward/completion": mean(t.completion for t in counted),
            "reward/zero_variance": mean(z for z in batch.zero_variance if z is not None),
            "teacher/skill_share": mean(x for x, t in zip(batch.told, rows, strict=True) if not t.failed),
            "teacher/dropped_rows": float(self.dropped_rows), "teacher/gap_mean": gap,
            "teacher/gap_std": math.sqrt(max(0.0, sums["gap_sq"] / taught - gap * gap)),
            "teacher/health": sums["teacher_health"] / taught, "teacher/k3": sums["k3"] / taught,
            "teacher/weight": weight, "teacher/shift": sums["shift"] / taught,
            "policy/entropy": sums["entropy"] / n, "policy/clip_fraction": sums["clip_fraction"] / n,
            "policy/logp_drift": sums["logp_drift"] / n, "policy/logp_drift_max": done.largest_drift, "grad_norm/total": norm,
            "optimizer/lr": self.lr,
            "rollout/env_steps": float(sum(len(t.turns) for t in rows)),
            "rollout/tokens": float(sum(len(t.prompt_ids) + len(t.token_ids) for t in rows)),
            "rollout/action_tokens": float(sum(t.n_actions for t in rows)), "rollout/turns": mean(len(t.turns) for t in rows),
            "rollout/finish_length": mean(t.finish_reason == "length" for t in rows),
            "rollout/failed": mean(t.failed for t in rows), **{f"rollout/failed_{k}": float(failed.count(k)) for k in FAILURES},
            "policy/skipped_steps": float(self.skipped),
            "learner/tokens": float(scored), "memory/peak_gib": done.peak_gib,
            "memory/micro_batch_tokens": float(self.micro_batch_tokens),
            "time/teacher_s": self.teacher_s, "time/update_s": seconds - self.teacher_s,
            "time/learner_tokens_per_s": scored / seconds,
        }  # fmt: skip
        if apart := done.distillation_grad:  # the total was clipped in place: undo the scale before taking the difference
            rest = [(p.grad / self._clip_scale if p.grad is not None else 0.0) - g for p, g in zip(params, apart, strict=True)]
            m["grad_norm/distillation"] = total_norm(apart)
            m["grad_norm/policy"] = total_norm(rest)
        self.metrics, measured = m, {k: v for k, v in m.items() if not math.isnan(v)}
        self.log_dict(measured, logger=False, batch_size=1)
        self.log_dict({"success": m["reward/success"], "GiB": m["memory/peak_gib"]}, prog_bar=True, logger=False, batch_size=1)
        log_measured(self.trainer, measured, rows[0].iteration)

    # -- validation, batches and checkpoints -------------------------------------------------------------------------------

    def validation_step(self, trajectories: Sequence[Trajectory], batch_idx: int) -> None:
        """Held-out episodes arrive played; their interval and table are the panel's business (callbacks/panel.py)."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # plain data; tensors are made where they are needed

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The two adapters alone: the base is never saved."""
        return self.policy.adapter_state()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self.policy.load_adapter_state(dict(state_dict))
        if self._teacher_is_student is not None:  # equal tensors do not tell: after a step without a gradient the run scores both
            self.policy.teacher_is_student = self._teacher_is_student

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skillsd"] = {
            "base": self.policy.identity, "teacher_is_student": self.policy.teacher_is_student,
            "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row,
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_base(checkpoint, self.policy.identity)
        state = checkpoint["skillsd"]
        self._teacher_is_student = state.get("teacher_is_student")
        self.skipped, self.skipped_in_a_row = state.get("skipped", 0), state.get("skipped_in_a_row", 0)


def _loss(done: Update) -> float:
    return done.sums["policy"] + done.sums["distillation"]


def check_strategy(strategy: Strategy) -> None:
    """Refuse what splits the weights, or starts its ranks from a copy of this process: the one reduction is of whole gradients.

    A launcher's variables say nothing about a run on a single device, of which there may be several.

    Raises:
        ConfigError: it is neither one device nor DDP with processes of its own.
    """
    ranks.alone(isinstance(strategy, SingleDeviceStrategy))
    started = getattr(strategy, "_start_method", "popen")
    if not (isinstance(strategy, SingleDeviceStrategy) or (isinstance(strategy, DDPStrategy) and started == "popen")):
        how = "" if started == "popen" else f" with start_method {started}"
        raise ConfigError(
            f"trainer.strategy is {type(strategy).__name__}{how}: set it to ddp, which starts each rank anew (in a notebook it cannot), or "
            "trainer.devices to 1."
        )


def last_checkpoint(trainer: Any) -> str:
    """Where a run that stops can be taken up, in words."""
    saver = trainer.checkpoint_callback
    path = Path((saver and saver.dirpath) or Path(trainer.default_root_dir) / CHECKPOINTS) / LAST
    return f"The last good checkpoint is {path} (--ckpt_path last)" if path.is_file() else "There is no checkpoint yet"
