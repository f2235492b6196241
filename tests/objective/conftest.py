"""A batch on a vocabulary of 6, in float64: whole distributions of student and teacher at every position, not only sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from skillsd.objective import Objective


@dataclass
class Batch:
    """B rows of T positions over V tokens.

    Args:
        logits: The student's, [B, T, V], with gradient.
        teacher: Log-probs of the teacher, [B, T, V].
        tokens: What was sampled, [B, T].
        logp_old: Log-probs of the tokens under the old student, [B, T].
        logp_behaviour: Log-probs of the tokens under whoever sampled them, [B, T].
        mask: [B, T].
        advantage: [B].
        teacher_mask: [B].
        success: [B].
        return_gap: [B].
    """

    logits: Tensor
    teacher: Tensor
    tokens: Tensor
    logp_old: Tensor
    logp_behaviour: Tensor
    mask: Tensor
    advantage: Tensor
    teacher_mask: Tensor
    success: Tensor
    return_gap: Tensor

    def rows(self, rows: slice) -> Batch:
        """Some of the rows, of the same logits."""
        return Batch(*(getattr(self, f.name)[rows] for f in fields(self)))

    def replace(self, **changes: Any) -> Batch:
        """With other tensors."""
        return replace(self, **changes)

    def inputs(self, objective: Objective) -> dict[str, Tensor | None]:
        """What `terms` takes, as the module makes it: in rows without a teacher the gap and the divergence are 0."""
        student = self.logits.log_softmax(-1)
        logp, logp_teacher = (x.gather(-1, self.tokens[..., None])[..., 0] for x in (student, self.teacher))
        out = {f.name: getattr(self, f.name) for f in fields(self)[3:]}
        divergence = None
        if objective.signal.distributional:
            divergence = objective.signal.divergence(student.flatten(0, 1), self.teacher.flatten(0, 1)).view(logp.shape)
            divergence = torch.where(self.teacher_mask[:, None], divergence, 0.0)
        return out | {
            "logp": logp,
            "logp_teacher": torch.where(self.teacher_mask[:, None], logp_teacher, logp.detach()),
            "divergence": divergence,
        }

    def loss(self, objective: Objective, n: int | None = None, **changes: Any) -> Tensor:
        """The total of `objective`, over N or another n."""
        return objective.total(objective.terms(**self.inputs(objective) | changes), n or int(self.mask.sum()))

    def gradient(self, objective: Objective, n: int | None = None, **changes: Any) -> Tensor:
        """Gradient of `loss` in the logits, [B, T, V]."""
        return torch.autograd.grad(self.loss(objective, n, **changes), self.logits)[0]


@pytest.fixture
def batch() -> Batch:
    """Seven rows, two of them without a teacher; ratios between 0.2 and 6, and return gaps on either side of every bound."""
    g = torch.Generator().manual_seed(1)
    rows, width, vocabulary = 7, 9, 6

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logits, teacher = normal(rows, width, vocabulary), normal(rows, width, vocabulary).log_softmax(-1)
    tokens = torch.randint(vocabulary, (rows, width), generator=g)
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    mask = torch.rand(rows, width, generator=g) < 0.7
    return Batch(
        logits.requires_grad_(), teacher, tokens, logp + 0.5 * normal(rows, width), logp + 0.7 * normal(rows, width), mask, normal(rows),
        torch.tensor([True, True, False, True, True, False, True]), torch.tensor([True, False, True, True, False, False, False]),
        torch.tensor([0.13, 0.9, 0.3, 0.04, torch.nan, 0.2, -0.5], dtype=torch.float64),
    )  # fmt: skip
