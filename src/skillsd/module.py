"""Skill-SD (arXiv:2604.10674), Algorithm 1, lines 4 to 6: rewards to advantages, student and teacher on the same tokens, one update.

Lines 1 (teacher sync) and 7 (skills) are callbacks, lines 2 and 3 (retrieval and rollout) are the data module's stream.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from skillsd.errors import ConfigError
from skillsd.objective import Objective, group_advantages
from skillsd.policy import Policy, PolicySettings, TokenSequence, micro_batches
from skillsd.trajectory import Trajectory, TrajectoryGroup

METRICS = (
    "loss/total", "loss/policy", "loss/distillation", "reward/mean", "reward/success", "reward/completion", "reward/zero_variance",
    "teacher/skill_share", "teacher/dropped_rows", "teacher/gap_mean", "teacher/gap_std", "teacher/health", "teacher/k3",
    "policy/entropy", "policy/clip_fraction", "policy/logp_drift", "grad_norm/total", "grad_norm/policy", "grad_norm/distillation",
    "optimizer/lr", "rollout/action_tokens", "rollout/turns", "rollout/finish_length", "rollout/failed", "skills/bank", "skills/failed",
    "time/rollout_tokens_per_s", "time/learner_tokens_per_s",
)  # fmt: skip
"""Every scalar an iteration logs, in the order of metrics.csv. Only those under time/ differ in a re-run."""


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
    gradient_clip_norm: float = 1.0
    """Largest gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        if self.lr < 0 or self.weight_decay < 0 or self.warmup_steps < 0 or self.gradient_clip_norm < 0:
            raise ConfigError("model.init_args.optimizer: lr, weight_decay, warmup_steps and gradient_clip_norm must be 0 or more.")


class SkillSD(L.LightningModule):
    """A student and a teacher adapter on one base, trained with GRPO and skill-conditioned self-distillation.

    Args:
        policy: The base model and its adapters.
        objective: The loss.
        optimizer: AdamW and its schedule.
        micro_batch_tokens: Most padded tokens in one forward and backward; the gradient does not depend on it.
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
        self._teacher_is_student: bool | None = None  # of the checkpoint being loaded

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = Policy(self.settings, self.device)

    def configure_optimizers(self) -> Any:
        o = self.optim
        optimizer = torch.optim.AdamW(self.policy.student_parameters(), o.lr, weight_decay=o.weight_decay)
        total = max(1, int(self.trainer.estimated_stepping_batches))

        def factor(step: int) -> float:
            if step < o.warmup_steps:
                return (step + 1) / o.warmup_steps
            left = (step - o.warmup_steps) / max(1, total - o.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, left))) if o.schedule == "cosine" else 1.0

        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    # -- Algorithm 1, lines 4 to 6 ----------------------------------------------------------------------------------------

    def training_step(self, groups: Sequence[TrajectoryGroup], batch_idx: int) -> dict[str, Tensor]:
        started = time.perf_counter()
        rows = [t for g in groups for t in g.trajectories]
        torch.manual_seed(rows[0].seed * 1_000_003 + rows[0].iteration)  # for dropout: a resumed run draws the same
        advantage = self._advantages(groups)
        n = max(1, sum(t.n_actions for t in rows))  # N of Eq. 3-14: one count, whatever the micro-batches
        teacher_rows, temperature = self._teacher_rows(groups), groups[0].temperature
        optimizer: Any = self.optimizers()
        params = self.policy.student_parameters()
        optimizer.zero_grad()

        sums: dict[str, float] = defaultdict(float)
        gaps = torch.zeros(len(rows))
        apart = bool(self.grad_norm_every) and self.global_step % self.grad_norm_every == 0 and self.objective.distillation_weight > 0
        distillation_grad = [torch.zeros_like(p) for p in params] if apart else []
        for index in micro_batches([len(t.prompt_ids) + len(t.token_ids) for t in rows], self.micro_batch_tokens):
            index = [i for i in index if rows[i].n_actions]
            if not index:
                continue
            micro = [rows[i] for i in index]
            logp, entropy = self.policy.score("student", [_sequence(t) for t in micro], temperature)
            logp_teacher = self._teacher_logp(logp.detach(), index, micro, teacher_rows, temperature)
            mask, logp_old = _padded(micro, logp)
            terms = self.objective.terms(logp, logp_old, logp_teacher, mask, advantage[index].to(logp))
            if apart:
                share = self.objective.distillation_weight * terms.distillation / n
                for total, g in zip(
                    distillation_grad, torch.autograd.grad(share, params, retain_graph=True, allow_unused=True), strict=True
                ):
                    if g is not None:
                        total += g
            self.manual_backward(self.objective.total(terms, n))

            gaps[index] = ((logp_teacher - logp.detach()) * mask).sum(1).cpu()
            sums["policy"] += terms.policy.item()
            sums["distillation"] += terms.distillation.item()
            sums["entropy"] += (entropy * mask).sum().item()
            for key, value in terms.metrics.items():
                sums[key] += value.item()

        norm = self._step(optimizer, params)
        self._record(groups, rows, sums, n, teacher_rows, norm, distillation_grad, params, time.perf_counter() - started)
        per_group = gaps.split([len(g.trajectories) for g in groups])
        adv = advantage.split([len(g.trajectories) for g in groups])
        return {"group_gap": torch.stack([(a * x).sum() for a, x in zip(adv, per_group, strict=True)])}

    def _advantages(self, groups: Sequence[TrajectoryGroup]) -> Tensor:
        """[B * G], float32. Without a policy loss a group may have one member and no baseline."""
        if self.objective.policy_weight == 0 and any(len(g.trajectories) < 2 for g in groups):
            return torch.zeros(sum(len(g.trajectories) for g in groups))
        return torch.cat([group_advantages(torch.tensor([[t.reward for t in g.trajectories]]))[0] for g in groups])

    def _teacher_rows(self, groups: Sequence[TrajectoryGroup]) -> dict[int, Sequence[int]]:
        """Row -> the teacher's prompt, where a teacher forward is needed. A prompt that does not fit is left out whole and counted."""
        rows: dict[int, Sequence[int]] = {}
        self.dropped_rows = i = 0
        for g in groups:
            for t in g.trajectories:
                if self.objective.distillation_weight > 0 and (g.skill_id is not None or not self.policy.teacher_is_student):
                    if len(g.teacher_prompt_ids) + len(t.token_ids) > self.policy.context_length:
                        self.dropped_rows += 1
                    elif t.n_actions:
                        rows[i] = g.teacher_prompt_ids
                i += 1
        return rows

    def _teacher_logp(
        self, own: Tensor, index: Sequence[int], micro: Sequence[Trajectory], prompts: Mapping[int, Sequence[int]], temperature: float
    ) -> Tensor:
        """Teacher's log-probs [B, T]; the student's own (gap 0) in rows that need no teacher."""
        out = own.clone()
        with_skill = [k for k, i in enumerate(index) if i in prompts]
        sequences = [TokenSequence(prompts[index[k]], micro[k].token_ids, micro[k].action_mask) for k in with_skill]
        for part in micro_batches([len(s) for s in sequences], self.micro_batch_tokens):
            with torch.no_grad():
                logp, _ = self.policy.score("teacher", [sequences[j] for j in part], temperature)
            for row, j in enumerate(part):
                out[with_skill[j], : logp.shape[1]] = logp[row]
        return out

    def _step(self, optimizer: Any, params: Sequence[torch.nn.Parameter]) -> float:
        clip = self.optim.gradient_clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(params, clip)) if any(p.grad is not None for p in params) else 0.0
        self._clip_scale = min(1.0, clip / (norm + 1e-6))
        optimizer.step()
        self.policy.student_changed()
        self.lr = optimizer.param_groups[0]["lr"]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return norm

    # -- what is logged ---------------------------------------------------------------------------------------------------

    def _record(
        self, groups: Sequence[TrajectoryGroup], rows: Sequence[Trajectory], sums: Mapping[str, float], n: int,
        teacher_rows: Mapping[int, Any], norm: float, distillation_grad: Sequence[Tensor],
        params: Sequence[torch.nn.Parameter], seconds: float,
    ) -> None:  # fmt: skip
        taught = max(1, sum(rows[i].n_actions for i in teacher_rows))
        o, gap = self.objective, sums["gap"] / taught
        m = dict.fromkeys(METRICS, math.nan)
        m |= {
            "loss/policy": sums["policy"] / n, "loss/distillation": sums["distillation"] / n,
            "reward/mean": _mean(t.reward for t in rows), "reward/success": _mean(t.success for t in rows),
            "reward/completion": _mean(t.completion for t in rows),
            "reward/zero_variance": _mean(len({t.reward for t in g.trajectories}) == 1 for g in groups),
            "teacher/skill_share": _mean(g.skill_id is not None for g in groups for _ in g.trajectories),
            "teacher/dropped_rows": float(self.dropped_rows), "teacher/gap_mean": gap,
            "teacher/gap_std": math.sqrt(max(0.0, sums["gap_sq"] / taught - gap * gap)),
            "teacher/health": sums["teacher_health"] / taught, "teacher/k3": sums["k3"] / taught,
            "policy/entropy": sums["entropy"] / n, "policy/clip_fraction": sums["clip_fraction"] / n,
            "policy/logp_drift": sums["logp_drift"] / n, "grad_norm/total": norm, "optimizer/lr": self.lr,
            "rollout/action_tokens": float(sum(t.n_actions for t in rows)), "rollout/turns": _mean(len(t.turns) for t in rows),
            "rollout/finish_length": _mean(t.finish_reason == "length" for t in rows),
            "rollout/failed": _mean(t.finish_reason == "failed" for t in rows),
            "time/learner_tokens_per_s": sum(len(t.prompt_ids) + len(t.token_ids) for t in rows) / seconds,
        }  # fmt: skip
        m["loss/total"] = o.policy_weight * m["loss/policy"] + o.distillation_weight * m["loss/distillation"]
        if distillation_grad:  # the total was clipped in place: undo the scale before taking the difference
            rest = [(p.grad / self._clip_scale if p.grad is not None else 0.0) - g for p, g in zip(params, distillation_grad, strict=True)]
            m["grad_norm/distillation"] = _norm(distillation_grad)
            m["grad_norm/policy"] = _norm(rest)
        self.metrics = m
        self.log_dict({k: v for k, v in m.items() if not math.isnan(v)}, batch_size=1)
        self.log("success", m["reward/success"], prog_bar=True, logger=False, batch_size=1)

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
        checkpoint["skillsd"] = {"base": self.policy.base_name, "teacher_is_student": self.policy.teacher_is_student}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("skillsd", {})
        saved, self._teacher_is_student = state.get("base"), state.get("teacher_is_student")
        if saved != self.policy.base_name:
            raise ConfigError(
                f"ckpt_path: the checkpoint belongs to the base model [{saved}], this run has [{self.policy.base_name}]: "
                "set model.init_args.policy to match, or start a new run folder."
            )


def _sequence(t: Trajectory) -> TokenSequence:
    return TokenSequence(t.prompt_ids, t.token_ids, t.action_mask)


def _padded(rows: Sequence[Trajectory], like: Tensor) -> tuple[Tensor, Tensor]:
    """Action mask (bool) and recorded log-probs, right-padded to [B, T]."""
    mask, logp = torch.zeros(like.shape, dtype=torch.bool), torch.zeros(like.shape)
    for i, t in enumerate(rows):
        mask[i, : len(t.action_mask)] = torch.tensor(t.action_mask)
        logp[i, : len(t.logprobs)] = torch.tensor(t.logprobs)
    return mask.to(like.device), logp.to(like.device)


def _mean(values: Any) -> float:
    listed = [float(v) for v in values]
    return sum(listed) / max(1, len(listed))


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors])))
