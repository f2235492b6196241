"""What RunLog asks of the module and of the environment for TensorBoard; that files and events are right is seen in tests/e2e."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from skillsd.callbacks import RunLog, tensorboard
from skillsd.environment import TextEnv
from skillsd.errors import ConfigError
from skillsd.timeouts import Alarm
from skillsd.trajectory import Trajectory, Turn


def test_tokens_are_kept_for_tensorboard_alone(tmp_path):
    def asked(log: RunLog, *loggers: Any) -> list[int]:
        module, trainer = SimpleNamespace(learner=SimpleNamespace()), SimpleNamespace(loggers=loggers, default_root_dir=tmp_path / "run")
        out = []
        for i in range(21):
            log.on_train_batch_start(trainer, module, [SimpleNamespace(trajectories=[SimpleNamespace(iteration=i)])], 0)
            out += [i] * module.learner.keep_tokens
        return out

    loggers = TensorBoardLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")
    assert asked(RunLog(), *loggers) == [0, 10, 20] and asked(RunLog(histogram_every=7), *loggers) == [0, 7, 14]
    assert asked(RunLog(), loggers[1]) == asked(RunLog()) == asked(RunLog(histogram_every=0), *loggers) == []
    with pytest.raises(ConfigError, match=r"^log.histogram_every is -1: give 0 \(never\)"):
        RunLog(histogram_every=-1)


class Painter:
    """Draws some of what it says, or fails at it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.unwrapped, self.error, self.asked = self, error, 0

    def picture(self, observation: str) -> Any:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return np.full((2, 2, 3), int(observation), np.uint8) if int(observation) % 2 else None


def pictures(log: RunLog, *envs: Any, final: str | None = None) -> list[int]:
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(collector=SimpleNamespace(envs=list(map(TextEnv, envs)), alarm=Alarm(60.0))))
    turns = tuple(Turn(str(i), "", 0.0) for i in range(tensorboard.FRAMES + 9))
    t = Trajectory(0, "t", 0, 0, "", (), (), (), (), turns, 0.0, 0.0, False, "done", final_observation=final)
    return [int(p[0, 0, 0]) for p in log._pictures(trainer, t)]


def test_boards_of_an_environment_that_draws_some():
    assert pictures(RunLog(), Painter()) == list(range(1, tensorboard.FRAMES, 2))
    assert pictures(RunLog(), Painter(), final="99") == [*range(1, tensorboard.FRAMES - 1, 2), 99]  # how it ended is always shown
    assert pictures(RunLog(), SimpleNamespace(unwrapped=None)) == pictures(RunLog()) == []


def test_a_picture_that_fails_ends_no_run(caplog):
    log, env = RunLog(), Painter(RuntimeError("no \x1b[2J ink"))
    assert pictures(log, env) == [] == pictures(log, env)
    assert env.asked == 1 and len(caplog.records) == 1  # it is not asked again
    assert "picture() failed (raised: RuntimeError: no \\x1b[2J ink)" in caplog.text
