"""AppWorld's tests need what `make appworld` makes; without it they are skipped, and the closing line of the run says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

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


def block(code: str) -> str:
    """An answer with this code."""
    return f"A thought.\n```python\n{code}\n```"
