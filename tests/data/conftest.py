"""Data modules as Lightning leaves them after `setup`, and real runs on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.sokoban import make_data
from tests.training import StepRecorder, quiet_trainer

from skillsd.data import RolloutData
from skillsd.environment import TextEnv, make_env
from skillsd.module import SkillSD
from skillsd.objective import Objective
from skillsd.optimizer import OptimizerSettings
from skillsd.policy import Policy


@pytest.fixture
def set_up_data(make_policy: Callable[..., Any]) -> Callable[..., RolloutData]:
    """A data module as Lightning leaves it after `setup`, on a tiny policy."""

    def make(*callbacks: Any, stage: str = "fit", objective: Objective | None = None, **settings: Any) -> RolloutData:
        policy = make_policy()
        module = SimpleNamespace(policy=policy, settings=policy.settings, objective=objective or Objective())
        data = make_data(**settings)
        data.trainer = SimpleNamespace(default_root_dir="run", lightning_module=module, callbacks=list(callbacks))  # type: ignore[assignment]
        data.setup(stage)
        for callback in callbacks:
            callback.setup(SimpleNamespace(datamodule=data), module, stage)
        return data

    return make


@pytest.fixture
def opened_envs(monkeypatch) -> list[Any]:
    """Every environment made, with the number of times it was closed."""
    made: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> TextEnv:
        env = make_env(*args, **kwargs)
        env.unwrapped.closed, close = 0, env.close

        def count() -> None:
            env.unwrapped.closed += 1
            close()

        env.close = count  # type: ignore[method-assign]
        made.append(env)
        return env

    monkeypatch.setattr("skillsd.data.make_env", make)
    monkeypatch.setattr("skillsd.rollout.collector.make_env", make)
    return made


@pytest.fixture
def train(make_policy: Callable[..., Policy], tmp_path: Path) -> Callable[..., StepRecorder]:
    """A real run on small boards."""

    def run(*callbacks: Any, epochs: int = 2, **settings: Any) -> StepRecorder:
        policy = make_policy(randomise=False)
        module = SkillSD(policy.settings, Objective(distillation_weight=0.5), OptimizerSettings(lr=1e-2))
        module.policy, recorder = policy, StepRecorder(policy)
        trainer = quiet_trainer(*callbacks, recorder, max_epochs=epochs, default_root_dir=tmp_path)
        trainer.fit(module, datamodule=make_data(**settings))
        return recorder

    return run
