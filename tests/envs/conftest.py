"""AppWorld's tests need what `make appworld` makes; without it they are skipped, and the closing line of the run says so."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.envs.sandboxed import Place

from skillsd_appworld import AppWorldEnv, paths


@pytest.fixture(scope="session")
def appworld() -> None:
    """Skips where AppWorld is not set up."""
    try:
        paths.find_python()
        paths.find_root("tiny")
    except FileNotFoundError as e:
        pytest.skip(f"AppWorld is not set up ({e})")


@pytest.fixture
def make_env(appworld: None) -> Iterator[Callable[..., AppWorldEnv]]:
    """Environments on the tiny tasks, closed at the end; those with the same settings share their processes."""
    made: list[AppWorldEnv] = []

    def make(**kwargs: Any) -> AppWorldEnv:
        made.append(AppWorldEnv(**{"turn_seconds": 20, **kwargs}))
        return made[-1]

    yield make
    for env in made:
        env.close()


@pytest.fixture
def env(make_env: Callable[..., AppWorldEnv]) -> AppWorldEnv:
    """With the limits that all tests share."""
    return make_env(max_api_calls=100)


@pytest.fixture
def hasty(make_env: Callable[..., AppWorldEnv]) -> AppWorldEnv:
    """With a short time limit, for code that runs into it; not too short for what follows on a busy machine."""
    return make_env(turn_seconds=4, grace_seconds=1)


@pytest.fixture
def place() -> Iterator[Place]:
    """Folders for one sandbox."""
    root = Path(tempfile.mkdtemp())  # not tmp_path: only its owner may enter that
    root.chmod(0o755)
    yield Place(root)
    shutil.rmtree(root)


def block(code: str) -> str:
    """An answer with this code."""
    return f"A thought.\n```python\n{code}\n```"


WRITES, ASKS = 1, 2
"""Tiers of tasks: to change something, and to answer a question."""


def task_of(env: AppWorldEnv, tier: int = WRITES, at: int = 0) -> str:
    """The name of a training task of a tier."""
    return [t["task_id"] for t in env.tasks("train") if t["difficulty"] == str(tier)][at]


def run(env: AppWorldEnv, code: str) -> str:
    """The output of one turn that does not end the episode."""
    observation, reward, terminated, truncated, info = env.step(block(code))
    assert not terminated and not truncated and reward == 0, info
    return observation


def solve(env: AppWorldEnv, task_id: str | None = None) -> None:
    """The next episode (or this one) on the same slot is right."""
    if task_id is not None:
        env.reset(options={"task_id": task_id})
    (answer,) = env.solution() or []
    observation, reward, terminated, _, info = env.step(answer)
    assert (reward, terminated, info["success"]) == (1.0, True, True), (observation, info)
