"""One update of the student: micro-batches, backward, out of memory, the reduction over ranks, and the optimizer's step.

The loss itself is the module's (`SkillSD.loss`). Micro-batches add sums, N is the batch's, so their gradients add up to the batch's own.
"""

from __future__ import annotations

import gc
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from skillsd import parallel
from skillsd.batch import Batch
from skillsd.errors import ConfigError
from skillsd.files.checkpoint import how_to_resume
from skillsd.objective import Terms
from skillsd.optimizer import OptimizerSettings
from skillsd.policy import OUT_OF_MEMORY, Policy
from skillsd.policy.memory import peak_gib

log = logging.getLogger(__name__)

MAX_SKIPPED = 3
"""So many updates in a row that are not finite stop the run."""


@dataclass
class Update:
    """What an update was.

    Attributes:
        gaps: Sum over each row's action tokens of log pi_tea - log pi_stu, nats, float32 [R]; 0 in rows that no teacher scored.
        distillation_grad: The distillation term's own gradient, by parameter; empty where it was not asked for.
        sums: Sums over the N action tokens by name: both loss terms, entropy, and the objective's metrics.
        max_drift: Largest absolute difference of log pi now and log pi at the rollout, nats.
        peak_gib: Most memory of any rank, GiB.
        teacher_s: Seconds of teacher scoring.
        grad_norm: Before clipping.
        clip_scale: What the gradient was multiplied with to clip it.
        lr: The learning rate of the step.
        skipped: Nothing was changed, since the loss or the gradient was not finite.
        tokens: Where asked for, of each micro-batch the gap of the tokens that a teacher scored and log rho of all action tokens, [n] each.
    """

    gaps: Tensor
    distillation_grad: list[Tensor] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    max_drift: float = 0.0
    peak_gib: float = math.nan
    teacher_s: float = 0.0
    grad_norm: float = 0.0
    clip_scale: float = 1.0
    lr: float = 0.0
    skipped: bool = False
    tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Sum of both terms over the action tokens."""
        return self.sums["policy"] + self.sums["distillation"]

    def add(self, terms: Terms) -> None:
        """Add the numbers of a micro-batch."""
        numbers = {"policy": terms.policy, "distillation": terms.distillation, **terms.metrics}
        *sums, largest = torch.stack([x.detach().double() for x in (*numbers.values(), terms.max_drift)]).tolist()  # one transfer for all
        for key, value in zip(numbers, sums, strict=True):
            self.sums[key] += value
        self.max_drift, self.teacher_s = max(self.max_drift, largest), self.teacher_s + terms.teacher_s


class Learner:
    """Makes updates of a module's student, one at a time.

    Args:
        module: A LightningModule with a `policy`, whose trainer has the optimizer.
        settings: The optimizer's settings.
        micro_batch_tokens: Most tokens in one forward and backward. An update that runs out of memory is repeated with half of it.

    Attributes:
        skipped, skipped_in_a_row: Updates that were not finite, since the run began and up to the last.
        keep_tokens: Updates carry their `tokens`; whoever draws histograms asks before an iteration.
    """

    def __init__(self, module: Any, settings: OptimizerSettings, micro_batch_tokens: int) -> None:
        if micro_batch_tokens < 1:
            raise ConfigError(f"model.micro_batch_tokens is {micro_batch_tokens}: give at least 1.")
        self.module, self.settings, self.micro_batch_tokens = module, settings, micro_batch_tokens
        self.skipped = self.skipped_in_a_row = 0
        self.keep_tokens = False

    @property
    def policy(self) -> Policy:
        """The module's."""
        return self.module.policy  # type: ignore[no-any-return]

    def update(self, batch: Batch, loss: Callable[[Batch], Terms], split_gradient: bool = False) -> Update:
        """One step of the optimizer on a batch. Whenever memory runs out, the gradient is begun anew with half the micro-batch.

        Args:
            batch: The rows to learn from.
            loss: Computes the loss of some of its rows; it is called with gradients on.
            split_gradient: Find the distillation term's own gradient too, by a second backward.

        Raises:
            ConfigError: A row does not fit into the memory, ranks differ, the third update in a row is not finite, or the weights no
                longer are.
        """
        params, rows = self.policy.student_parameters(), batch.local_rows()
        update: Update | None = None
        while update is None:
            try:
                update = self._accumulate(batch, rows, loss, params if split_gradient else [])
            except torch.OutOfMemoryError as e:
                if self.policy.sharded:
                    raise ConfigError(OUT_OF_MEMORY) from e
            if update is None:  # outside of the handler: the exception holds the tensors of the failed attempt
                self._halve_micro_batch(max(len(batch.student[i]) for i in rows))
        _reduce(update, params)
        self._step(update, params)
        return update

    def metrics(self, batch: Batch, update: Update, seconds: float) -> dict[str, float]:
        """What an update has measured, as METRICS names it. To be asked before the gradient is cleared.

        Args:
            batch, update: What was learnt from, and how.
            seconds: From the groups to the step, teacher scoring included.
        """
        n, sums, scored = batch.n_actions, update.sums, batch.teacher_rows
        n_teacher = max(1, sum(batch.rows[i].n_actions for i in scored))
        tokens = sum(len(x) for x, trains in zip(batch.student, batch.train_mask, strict=True) if trains)
        tokens += sum(len(batch.teacher[i]) for i in scored)
        gap = sums["gap"] / n_teacher
        found = {
            "loss/policy": sums["policy"] / n, "loss/distillation": sums["distillation"] / n, "loss/total": update.loss / n,
            "teacher/gap_mean": gap, "teacher/gap_std": math.sqrt(max(0.0, sums["gap_sq"] / n_teacher - gap * gap)),
            "teacher/health": sums["teacher_health"] / n_teacher, "teacher/k3": sums["k3"] / n_teacher,
            "teacher/shift": sums["shift"] / n_teacher, "policy/entropy": sums["entropy"] / n,
            "policy/clip_fraction": sums["clip_fraction"] / n, "policy/logp_drift": sums["logp_drift"] / n,
            "policy/logp_drift_max": update.max_drift, "policy/skipped_steps": float(self.skipped), "grad_norm/total": update.grad_norm,
            "optimizer/lr": update.lr, "memory/peak_gib": update.peak_gib, "memory/micro_batch_tokens": float(self.micro_batch_tokens),
            "time/teacher_s": update.teacher_s, "time/update_s": seconds - update.teacher_s,
            "learner/tokens": float(tokens), "time/learner_tokens_per_s": tokens / seconds,
        }  # fmt: skip
        if separate := update.distillation_grad:  # the total was clipped in place: undo the scale before taking the difference
            params = self.policy.student_parameters()
            rest = [(p.grad / update.clip_scale if p.grad is not None else 0.0) - g for p, g in zip(params, separate, strict=True)]
            found |= {"grad_norm/distillation": float(get_total_norm(separate)), "grad_norm/policy": float(get_total_norm(rest))}
        return found

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.skipped, self.skipped_in_a_row = state.get("skipped", 0), state.get("skipped_in_a_row", 0)

    # -- the gradient -----------------------------------------------------------------------------------------------------

    def _halve_micro_batch(self, longest: int) -> None:
        """After an update that ran out of memory, whose longest row has so many tokens."""
        if self.micro_batch_tokens <= longest:
            raise ConfigError(
                f"model.micro_batch_tokens: a trajectory of {longest} tokens alone does not fit into the memory: set "
                "model.policy.gradient_checkpointing, a smaller model.policy.head_chunk or data.rollout.max_trajectory_tokens."
            )
        self.micro_batch_tokens = max(longest, self.micro_batch_tokens // 2)
        gc.collect()
        torch.cuda.empty_cache()
        log.warning("out of memory in the update: it is repeated with micro_batch_tokens %d", self.micro_batch_tokens)

    def _accumulate(
        self, batch: Batch, rows: Sequence[int], loss: Callable[[Batch], Terms], separate: Sequence[nn.Parameter]
    ) -> Update:  # fmt: skip
        """The gradient of `rows`, a micro-batch at a time; that of the distillation alone for the parameters in `separate`."""
        policy, first = self.policy, batch.rows[0]
        self.module.optimizers().zero_grad()
        torch.manual_seed(first.seed * 1_000_003 + first.iteration + (parallel.rank() << 40))  # for dropout: a resumed run draws the same
        update = Update(torch.zeros(len(batch.rows)), [torch.zeros_like(p) for p in separate])
        lengths = [len(batch.student[i]) for i in rows]
        for part in policy.micro_batches(lengths, self.micro_batch_tokens, lambda: self._idle(separate)):
            index = [rows[k] for k in part]
            micro = batch.select(index, policy.device)
            terms = loss(micro)
            if separate:
                distillation = terms.distillation / batch.n_actions
                for total, g in zip(update.distillation_grad, self._backward(distillation, terms.logp, separate), strict=False):
                    if g is not None:
                        total += g
            self._backward(self.module.objective.total(terms, batch.n_actions), terms.logp)
            update.gaps[index] = (terms.gap * micro.mask).sum(1).cpu()
            update.add(terms)
            if self.keep_tokens:
                rho = terms.logp.detach() - micro.logp_behaviour
                update.tokens.append((terms.gap[micro.mask & micro.teacher_mask[:, None]].cpu(), rho[micro.mask].cpu()))
        return update

    def _backward(self, loss: Tensor, student: Tensor, separate: Sequence[nn.Parameter] = ()) -> Sequence[Tensor | None]:
        """Adds the gradient of `loss` to the parameters', or gives that of those in `separate`, if there is one.

        Without a reward, rows that no teacher scores teach nothing. On a sharded base all ranks have a backward if one has.
        """
        if not self.policy.agree(int(loss.requires_grad)):
            return ()
        loss = loss if loss.requires_grad else student.sum() * 0.0
        model = self.module.trainer.model  # DDP would reduce after each backward: there is one reduction, after the last micro-batch
        with self.policy.recomputing(), model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            if separate:
                return torch.autograd.grad(loss, list(separate), retain_graph=True, allow_unused=True)
            self.module.manual_backward(loss)
        return ()

    def _idle(self, separate: Sequence[nn.Parameter]) -> None:
        """Other ranks on the sharded base have one more micro-batch: the same forwards and backwards, of nothing."""
        student = self.policy.idle(grad=True)
        for _ in range(self.policy.agree(0)):
            self.policy.idle()
        if separate:
            self._backward(student.detach(), student, separate)
        self._backward(student.detach(), student)

    # -- the step ---------------------------------------------------------------------------------------------------------

    def _step(self, update: Update, params: Sequence[nn.Parameter]) -> None:
        """Clip and step. If the loss or the gradient is not finite, nothing changes but the schedule and the counters."""
        optimizer, clip = self.module.optimizers(), self.settings.gradient_clip_norm or math.inf
        norm = float(clip_grad_norm_(params, clip)) if any(p.grad is not None for p in params) else 0.0
        update.grad_norm, update.clip_scale, update.lr = norm, min(1.0, clip / (norm + 1e-6)), optimizer.param_groups[0]["lr"]
        update.skipped = not all(map(math.isfinite, (norm, update.sums["policy"], update.sums["distillation"])))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if update.skipped else 0
        if update.skipped:
            self._skip(update)
            optimizer.zero_grad()  # without gradients AdamW touches nothing; the step still counts, so that the run ends where it would
        optimizer.step()
        # A wait for the device, once an iteration: the checkpoint that follows copies the weights to the host anyway.
        if not get_total_norm([p.detach() for p in params], math.inf).isfinite():
            raise ConfigError(
                f"model.optimizer: the weights are not finite after an update of loss {update.loss:g}, gradient norm {norm:g}, "
                f"lr {update.lr:g}; it is not saved. {how_to_resume(self.module.trainer)}: set a smaller lr."
            )
        self.policy.student_changed()
        self.module.lr_schedulers().step()

    def _skip(self, update: Update) -> None:
        """Note that an update is not finite. Raises ConfigError where too many in a row were not."""
        self.skipped += 1
        update.distillation_grad = []
        what = f"loss {update.loss:g}, gradient norm {update.grad_norm:g}"
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise ConfigError(
                f"model.optimizer: {MAX_SKIPPED} updates in a row were not finite (the last: {what}) and left the policy as it "
                f"was. {how_to_resume(self.module.trainer)}: set a smaller lr or gradient_clip_norm, or model.policy.dtype to float32."
            )
        log.warning("iteration %d: the update is skipped, it is not finite: %s", self.module.global_step, what)


def _reduce(update: Update, params: Sequence[nn.Parameter]) -> None:
    """Add up what the ranks have: one reduction for the gradients, and what is logged."""
    update.peak_gib = peak_gib(params[0].device)
    if parallel.world() == 1:
        return
    trained, size = any(p.grad is not None for p in params), float(get_total_norm([p.detach() for p in params]))
    ranks = parallel.gather((trained, size, replace(update, distillation_grad=[])))
    sizes, updates = [x[1] for x in ranks], [x[2] for x in ranks]
    if not all(math.isclose(x, size, rel_tol=1e-3) for x in sizes):  # far beyond what rounding on unlike GPUs does
        raise ConfigError(
            f"trainer.devices: the ranks' students differ (norms {sizes}): start all ranks with the same code, files and settings."
        )
    if any(x[0] for x in ranks):
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        parallel.all_reduce_sum([*(p.grad for p in params if p.grad is not None), *update.distillation_grad])
    names = dict.fromkeys(name for u in updates for name in u.sums)
    update.sums = defaultdict(float, {name: sum(u.sums.get(name, 0.0) for u in updates) for name in names})
    update.gaps = torch.stack([u.gaps for u in updates]).sum(0)
    update.max_drift, update.peak_gib = max(u.max_drift for u in updates), max(u.peak_gib for u in updates)
    update.tokens = [pair for u in updates for pair in u.tokens]
