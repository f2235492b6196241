"""A quiet trainer, and a record of what each of its iterations did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from tests.tolerance import ROUNDING, close
from torch import Tensor

from skillsd.policy import Policy, Scores, TokenSequence


def quiet_trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """A trainer on the CPU that prints, logs, validates and saves nothing; one epoch unless `settings` say otherwise."""
    defaults = dict(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    return L.Trainer(callbacks=list(callbacks), **(defaults | settings))


class Batches:
    """A train loader that gives these batches."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@dataclass
class StepRecorder(L.Callback):
    """One entry an iteration: its batch, the gradient after the step, what was logged, and what each adapter scored."""

    policy: Policy
    batches: list[Any] = field(default_factory=list)
    grads: list[list[Tensor]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    group_gaps: list[Tensor] = field(default_factory=list)
    teacher_inputs: list[list[TokenSequence]] = field(default_factory=list)
    student_inputs: list[list[TokenSequence]] = field(default_factory=list)

    @property
    def iterations(self) -> list[tuple[Any, dict[str, float], list[TokenSequence]]]:
        """(batch, metrics, the teacher's inputs) of each iteration."""
        return list(zip(self.batches, self.metrics, self.teacher_inputs, strict=True))

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        inputs: dict[str, list[TokenSequence]] = {"teacher": [], "student": []}
        self.batches.append(batch)
        self.teacher_inputs.append(inputs["teacher"])
        self.student_inputs.append(inputs["student"])

        def score(adapter: str, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> Scores:
            inputs[adapter].extend(sequences)
            return type(self.policy).score(self.policy, adapter, sequences, temperature)

        self.policy.__dict__["score"] = score

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        del self.policy.__dict__["score"]
        self.grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.policy.student_parameters()])
        self.metrics.append(dict(outputs["metrics"]))
        self.group_gaps.append(outputs["group_gap"])


class BeforeUpdate(L.Callback):
    """Keeps what `look(trainer, batch)` gives of each batch before it is trained on."""

    def __init__(self, look: Callable[[L.Trainer, Any], Any]) -> None:
        self.look, self.seen = look, []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.look(trainer, batch))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    """What was measured, without seconds and bytes."""
    return {k: v for k, v in metrics.items() if not k.startswith(("time/", "memory/")) and not math.isnan(v)}


def same_gradient(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Assert equality but for float32 rounding, relative to the whole gradient's norm."""
    assert (flat(a) - flat(b)).norm() <= ROUNDING * flat(b).norm()


def same_update(a: StepRecorder, b: StepRecorder) -> None:
    """Assert that two first iterations are equal but for float32 rounding: gradient, metrics and gaps."""
    same_gradient(a.grads[0], b.grads[0])
    close(timeless(a.metrics[0]), timeless(b.metrics[0]))
    close(a.group_gaps[0], b.group_gaps[0])
