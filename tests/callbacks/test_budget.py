"""A run of so many environment steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from skillsd.callbacks import EnvStepBudget
from skillsd.errors import ConfigError
from skillsd.trajectory import Task, Trajectory, TrajectoryGroup, Turn


def batch(*groups: tuple[int, ...]) -> list[TrajectoryGroup]:
    """Turns of each member."""
    return [
        TrajectoryGroup(
            Task(f"t{i}"),
            tuple(
                Trajectory(0, f"t{i}", m, 0, "", (1,), (2,), (True,), (-0.1,), (Turn("o", "a", 0.0),) * n, 0.0, 0.0, False, "done")
                for m, n in enumerate(turns)
            ),
            ((1,),) * len(turns),
            ((1,),) * len(turns),
        )
        for i, turns in enumerate(groups)
    ]


def trainer() -> Any:
    return SimpleNamespace(should_stop=False)


def play(callback: EnvStepBudget, t: Any, *groups: tuple[int, ...]) -> bool:
    callback.on_train_batch_start(t, None, batch(*groups), 0)  # type: ignore[arg-type]
    return bool(t.should_stop)


def test_it_stops_after_the_iteration_that_reaches_it():
    callback, t = EnvStepBudget(20), trainer()
    callback.on_train_start(t, None)  # type: ignore[arg-type]
    assert [play(callback, t, (3, 2), (0, 4)), play(callback, t, (9, 1))] == [False, False] and callback.used == 19
    assert play(callback, t, (1, 1)) and callback.used == 21
    exact = EnvStepBudget(5)
    assert play(exact, trainer(), (2, 3)) and not play(EnvStepBudget(6), trainer(), (2, 3))


def test_it_counts_on_in_a_resumed_run():
    first = EnvStepBudget(10)
    play(first, trainer(), (4, 2))
    again, t = EnvStepBudget(10), trainer()
    again.load_state_dict(first.state_dict())
    again.on_train_start(t, None)  # type: ignore[arg-type]
    assert not t.should_stop and play(again, t, (4,)) and again.used == 10
    reached, t = EnvStepBudget(10), trainer()
    reached.load_state_dict(again.state_dict())
    reached.on_train_start(t, None)  # type: ignore[arg-type]
    assert t.should_stop  # it is finished
    more, t = EnvStepBudget(11), trainer()
    more.load_state_dict(again.state_dict())
    more.on_train_start(t, None)  # type: ignore[arg-type]
    assert not t.should_stop  # a larger budget goes on


def test_a_stop_by_somebody_else_stays():
    callback, t = EnvStepBudget(100), trainer()
    t.should_stop = True
    callback.on_train_start(t, None)  # type: ignore[arg-type]
    assert t.should_stop and play(callback, t, (1,))


@pytest.mark.parametrize("steps", [0, -1])
def test_bad_budgets(steps):
    with pytest.raises(ConfigError, match=rf"EnvStepBudget\.steps is {steps}: give at least 1"):
        EnvStepBudget(steps)
