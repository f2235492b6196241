"""Small makers of trajectories and skills, and summarisers of a server in this process."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from tests.skills.chat_server import ChatServer, serving

from skillsd.skills import OpenAISummariser, Skill
from skillsd.trajectory import Trajectory, Turn


def _trajectory(
    task_id: str = "t1",
    member: int = 0,
    pairs: Sequence[tuple[str, str]] = (("s0", "up"), ("s1", "left")),
    completion: float = 1.0,
    iteration: int = 3,
    instruction: str = "Solve it.",
) -> Trajectory:
    turns = tuple(Turn(observation, action, 0.0) for observation, action in pairs)
    return Trajectory(
        iteration, task_id, member, 7, instruction, (1,), (2,), (True,), (-0.5,), turns, completion, completion, completion == 1.0, "done"
    )


def _skill(text: str = "a", task_id: str = "t1", reward: float = 0.0, iteration: int = 0, **rest: object) -> Skill:
    return Skill(
        f"{text}!", f"{text}?", f"{text}.", task_id, source_reward=reward, source_completion=reward, source_iteration=iteration, **rest
    )


@pytest.fixture
def make_trajectory() -> Callable[..., Trajectory]:
    return _trajectory


@pytest.fixture
def make_skill() -> Callable[..., Skill]:
    return _skill


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """A server of chat completions in this process."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(ChatServer()) as server:
        yield server


@pytest.fixture
def make_summariser(server: ChatServer) -> Iterator[Callable[..., OpenAISummariser]]:
    """Settings -> a summariser of that server, closed at the end."""
    made: list[OpenAISummariser] = []

    def make(**settings: Any) -> OpenAISummariser:
        settings = {"timeout_s": 5.0, "retries": 2, "backoff_s": 0.01, "max_workers": 4, **settings}
        made.append(OpenAISummariser("m", f"http://127.0.0.1:{server.server_port}/v1", **settings))
        return made[-1]

    yield make
    for summariser in made:
        summariser.close()
