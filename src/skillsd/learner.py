"""One update of the student: micro-batches, backward, out of memory, the reduction over ranks, and the optimizer's step.

The loss itself is the module's (`SkillSD.loss`). Micro-batches add sums, N is the batch's, so their gradients add up to the batch's own.
"""

from __future__ import annotations

import gc
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from skillsd import parallel
from skillsd.batch import Batch, MicroBatch
from skillsd.errors import ConfigError
from skillsd.files.checkpoint import how_to_resume
from skillsd.objective import Terms
from skillsd.optimizer import OptimizerSettings
from skillsd.policy import OUT_OF_MEMORY, Policy, Scores

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

MAX_SKIPPED = 3
"""So many updates in a row that are not finite stop the run."""


class Loss(NamedTuple):
    """What a micro-batch of B rows and T tokens comes to.

    Args:
        terms: Sums over its action tokens.
        student: Its scores under the student.
        logp_old: log-probs of the student at the rollout, [B, T], nats.
        logp_teacher: The teacher's, [B, T]; the student's own in rows that no teacher scores.
        teacher_s: Seconds of teacher scoring.
    """

    terms: Terms
    student: Scores
    logp_old: Tensor
    logp_teacher: Tensor
    teacher_s: float


@dataclass
class Update:
    """What an update was.

    Attributes:
        gaps: Sum over each row's action tokens of log pi_tea - log pi_stu, nats, float32 [R]; 0 in rows that no teacher scored.
        distillation_grad: The distillation term's own gradient, by parameter; empty where it was not asked for.
        sums: Sums over the N action tokens by name: both loss terms, entropy, and the objective's metrics.
        max_drift: Largest |log pi now - log pi at the rollout|, nats.
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


class Learner:
    """Makes updates of a module's student, one at a time.

    Args:
        module: A LightningModule with a `policy`, whose trainer has the optimizer.
        settings: Of the optimizer.
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

    def update(self, batch: Batch, loss: Callable[[MicroBatch], Loss], split_gradient: bool = False) -> Update:
        """One step of the optimizer on a batch.

        Args:
            batch: What is learnt from.
            loss: Of some of its rows; called with gradients on.
            split_gradient: Find the distillation term's own gradient too, by a second backward.

        Raises:
            ConfigError: A row does not fit into the memory, ranks differ, the third update in a row is not finite, or the weights no
                longer are.
        """
        params, rows = self.policy.student_parameters(), batch.local_rows()
        separate = params if split_gradient else []
        update = self._within_memory(batch, rows, lambda: self._accumulate(batch, rows, loss, separate))
        _reduce(update, params)
        self._step(update, params)
        return update

    def metrics(self, batch: Batch, update: Update, seconds: float) -> dict[str, float]:
        """What an update has measured, as METRICS names it. To be asked before the gradient is cleared.

        Args:
            batch, update: What was learnt from, and how.
            seconds: From the groups to the step, teacher scoring included.
        """
        n, sums = batch.n_actions, update.sums
        n_teacher = max(1, sum(batch.rows[i].n_actions for i in batch.teacher_rows))
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
            "time/learner_tokens_per_s": batch.scored_tokens / seconds,
        }  # fmt: skip
        if separate := update.distillation_grad:  # the total was clipped in place: undo the scale before taking the difference
            params = self.policy.student_parameters()
            rest = [(p.grad / update.clip_scale if p.grad is not None else 0.0) - g for p, g in zip(params, separate, strict=True)]
            found |= {"grad_norm/distillation": total_norm(separate), "grad_norm/policy": total_norm(rest)}
        return found

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.skipped, self.skipped_in_a_row = state.get("skipped", 0), state.get("skipped_in_a_row", 0)

    # -- the gradient -----------------------------------------------------------------------------------------------------

    def _within_memory(self, batch: Batch, rows: Sequence[int], accumulate: Callable[[], Update]) -> Update:
        """The gradient of `rows`, begun anew with half the micro-batch whenever memory runs out: it is the same."""
        while True:
            try:
                return accumulate()
            except torch.OutOfMemoryError as e:
                if self.policy.sharded:
                    raise ConfigError(OUT_OF_MEMORY) from e
                # go on outside: the exception holds the tensors of the failed attempt
            longest = max(len(batch.student[i]) for i in rows)
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
        self, batch: Batch, rows: Sequence[int], loss: Callable[[MicroBatch], Loss], separate: Sequence[nn.Parameter]
    ) -> Update:
        """The gradient of `rows`, a micro-batch at a time; that of the distillation alone for the parameters in `separate`."""
        policy, first = self.policy, batch.rows[0]
        self.module.optimizers().zero_grad()
        torch.manual_seed(first.seed * 1_000_003 + first.iteration + (parallel.rank() << 40))  # for dropout: a resumed run draws the same
        update = Update(torch.zeros(len(batch.rows)), [torch.zeros_like(p) for p in separate])
        lengths = [len(batch.student[i]) for i in rows]
        for part in policy.micro_batches(lengths, self.micro_batch_tokens, lambda: self._idle(separate)):
            micro = batch.select([rows[k] for k in part], policy.device)
            found = loss(micro)
            terms, logp = found.terms, found.student.logp
            if separate:
                for total, g in zip(
                    update.distillation_grad, self._backward(terms.distillation / batch.n_actions, logp, separate), strict=False
                ):
                    if g is not None:
                        total += g
            self._backward(self.module.objective.total(terms, batch.n_actions), logp)
            _note(update, micro, found, self.keep_tokens)
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
        norm = float(nn.utils.clip_grad_norm_(params, clip)) if any(p.grad is not None for p in params) else 0.0
        update.grad_norm, update.clip_scale, update.lr = norm, min(1.0, clip / (norm + 1e-6)), optimizer.param_groups[0]["lr"]
        update.skipped = not all(map(math.isfinite, (norm, update.sums["policy"], update.sums["distillation"])))
        self._count(update)
        if update.skipped:
            optimizer.zero_grad()  # without gradients AdamW touches nothing; the step still counts, so that the run ends where it would
        optimizer.step()
        # A wait for the device, once an iteration: the checkpoint that follows copies the weights to the host anyway.
        if not nn.utils.get_total_norm([p.detach() for p in params], math.inf).isfinite():
            raise ConfigError(
                f"model.optimizer: the weights are not finite after an update of loss {update.loss:g}, gradient norm {norm:g}, "
                f"lr {update.lr:g}; it is not saved. {how_to_resume(self.module.trainer)}: set a smaller lr."
            )
        self.policy.student_changed()
        self.module.lr_schedulers().step()

    def _count(self, update: Update) -> None:
        if not update.skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        update.distillation_grad = []
        what = f"loss {update.loss:g}, gradient norm {update.grad_norm:g}"
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise ConfigError(
                f"model.optimizer: {MAX_SKIPPED} updates in a row were not finite (the last: {what}) and left the policy as it "
                f"was. {how_to_resume(self.module.trainer)}: set a smaller lr or gradient_clip_norm, or model.policy.dtype to float32."
            )
        log.warning("iteration %d: the update is skipped, it is not finite: %s", self.module.global_step, what)


def _note(update: Update, micro: MicroBatch, found: Loss, keep_tokens: bool) -> None:
    """Add to an update what is logged of a micro-batch."""
    mask, logp = micro.mask, found.student.logp.detach()
    gap = found.logp_teacher - logp
    update.gaps[micro.index] = (gap * mask).sum(1).cpu()
    update.teacher_s += found.teacher_s
    if keep_tokens:
        update.tokens.append((gap[mask & micro.teacher_mask[:, None]], (logp - micro.logp_behaviour)[mask]))
    terms, entropy = found.terms, (found.student.entropy * mask).sum()
    drift = torch.where(mask, (logp - found.logp_old).abs(), 0.0).max()
    numbers = {"policy": terms.policy, "distillation": terms.distillation, "entropy": entropy, **terms.metrics}
    *sums, largest = torch.stack([x.detach().double() for x in (*numbers.values(), drift)]).tolist()  # one transfer for all
    for key, value in zip(numbers, sums, strict=True):
        update.sums[key] += value
    update.max_drift = max(update.max_drift, largest)


def _reduce(update: Update, params: Sequence[nn.Parameter]) -> None:
    """Add up what the ranks have: one reduction for the gradients, and what is logged."""
    update.peak_gib = peak_gib(params[0].device)
    if parallel.world() == 1:
        return
    trained, size = any(p.grad is not None for p in params), total_norm([p.detach() for p in params])
    tokens = [(gap.cpu(), rho.cpu()) for gap, rho in update.tokens]
    every = parallel.gather((trained, dict(update.sums), update.gaps, update.max_drift, update.peak_gib, tokens, size))
    if not all(math.isclose(x[6], size, rel_tol=1e-3) for x in every):  # far beyond what rounding on unlike GPUs does
        raise ConfigError(f"the ranks' students differ (norms {[x[6] for x in every]}): start them with the same code, files and settings.")
    if any(x[0] for x in every):
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        parallel.all_reduce_sum([*(p.grad for p in params if p.grad is not None), *update.distillation_grad])
    update.sums = defaultdict(float, {k: sum(x[1].get(k, 0.0) for x in every) for k in dict.fromkeys(k for x in every for k in x[1])})
    update.gaps = torch.stack([x[2] for x in every]).sum(0)
    update.max_drift, update.peak_gib = max(x[3] for x in every), max(x[4] for x in every)
    update.tokens = [pair for x in every for pair in x[5]]


def peak_gib(device: torch.device) -> float:
    """Most memory since the start, GiB: what PyTorch reserved on a GPU, else the process's resident set (nan where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def total_norm(tensors: Sequence[Tensor]) -> float:
    """The 2-norm of all tensors together."""
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors])))
