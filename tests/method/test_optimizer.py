"""The optimizer's schedule and its settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.method.groups import make_groups
from tests.training import StepRecorder

from skillsd.errors import ConfigError
from skillsd.optimizer import OptimizerSettings


def rates(steps: StepRecorder) -> list[float]:
    return [m["optimizer/lr"] for m in steps.metrics]


def test_the_learning_rate_warms_up_and_follows_its_schedule(make_policy, step):
    policy = make_policy()
    batch = make_groups(policy)

    def lr(n: int, **settings: Any) -> list[float]:
        return rates(step(policy, *[batch] * n, optimizer=OptimizerSettings(lr=1e-4, **settings), grad_norm_every=0))

    assert lr(3) == pytest.approx([1e-4] * 3)
    assert lr(5, warmup_steps=4) == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4])
    cosine = [1e-4 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert lr(6, warmup_steps=2, schedule="cosine") == pytest.approx([0.5e-4, 1e-4, *cosine])
    assert lr(2, warmup_steps=8) == pytest.approx([1e-4 / 8, 2e-4 / 8])
    # A length of its own: the cosine does not follow a run that ends sooner, and stays at 0 in one that goes on.
    assert lr(3, warmup_steps=2, schedule="cosine", schedule_steps=6) == pytest.approx([0.5e-4, 1e-4, *cosine[:1]])
    assert lr(8, warmup_steps=2, schedule="cosine", schedule_steps=6) == pytest.approx([0.5e-4, 1e-4, *cosine, 0.0, 0.0], abs=1e-12)


def test_bad_settings_are_refused():
    for settings in ({"lr": -1.0}, {"warmup_steps": -1}, {"weight_decay": -0.1}, {"gradient_clip_norm": -1.0}):
        with pytest.raises(ConfigError, match=r"model\.optimizer"):
            OptimizerSettings(**settings)
