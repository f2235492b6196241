"""One update after another, on groups made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from tests.training import Batches, StepRecorder, quiet_trainer

from skillsd.module import SkillSD
from skillsd.objective import Objective
from skillsd.optimizer import OptimizerSettings
from skillsd.policy import Policy


@pytest.fixture
def step() -> Callable[..., StepRecorder]:
    """Train on batches through Lightning. The learning rate is 0 unless `optimizer` is given, so that the policy stays as it is."""

    def run(
        policy: Policy, *batches: Any, objective: Objective | None = None, optimizer: OptimizerSettings | None = None,
        same: bool = False, callbacks: Sequence[L.Callback] = (), save: Path | None = None, **settings: Any,
    ) -> StepRecorder:  # fmt: skip
        module = SkillSD(
            policy.settings, objective or Objective(distillation_weight=0.5),
            optimizer or OptimizerSettings(lr=0.0, gradient_clip_norm=0.0), **({"grad_norm_every": 1} | settings),
        )  # fmt: skip
        module.policy, policy.teacher_is_student, recorder = policy, same, StepRecorder(policy)
        trainer = quiet_trainer(*callbacks, recorder)
        trainer.fit(module, Batches(batches))
        if save is not None:
            trainer.save_checkpoint(save)
        return recorder

    return run
