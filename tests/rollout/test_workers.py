"""Environments that answer in threads: nothing about the trajectories changes, and all are closed."""

import json
import signal
import threading
import time
from collections.abc import Sequence

import gymnasium
import pytest
from tests.rollout.scripted import Scripted, play

from skillsd.engines.engine import Completion, Request
from skillsd.policy.nano import build_tokenizer
from skillsd.rollout import Chat, Collector, RolloutSettings
from skillsd.timeouts import Failure
from skillsd.trajectory import Trajectory


class Waiting(gymnasium.Env):
    """A stand-in for another process: it answers after `pause(name, turn)` seconds. A task is `name:turns` or `name:turns:failure`."""

    observation_space = action_space = gymnasium.spaces.Text(1)
    made: list = []
    threads: set = set()

    def __init__(self, pause=lambda name, turn: 0.0, error=None, close_error=None):
        self.pause, self.error, self.close_error, self.closed, self.steps = pause, error, close_error, 0, 0
        self.made.append(self)

    def reset(self, *, seed=None, options=None):
        self.name, turns, *self.end = options["task_id"].split(":")
        self.turn, self.turns = 0, int(turns)
        self.wait()
        return f"{self.name} " * 3, {"task_id": options["task_id"], "instruction": ""}

    def step(self, action):
        self.turn += 1
        self.wait()
        self.steps += 1
        if self.error is not None:
            self.error(self.name, self.turn)
        over = self.turn == self.turns
        info = {"completion": float(over), "success": over}
        if over and self.end:
            return "gone", 0.5, False, True, info | {"failed": self.end[0]}
        return f"{self.name} " * self.turn, 0.25, over, False, info

    def wait(self):
        self.threads.add(threading.current_thread().name)
        time.sleep(self.pause(self.name, self.turn))

    def close(self):
        self.closed += 1
        if self.close_error is not None:
            raise self.close_error


@pytest.fixture
def waiting():
    """A collector of Waiting environments and of episodes named `up:3` and so on."""
    gymnasium.register("test/Waiting-v0", Waiting, disable_env_checker=True, order_enforce=False)
    Waiting.made, Waiting.threads, made = [], set(), []
    t = build_tokenizer()
    engine = Scripted(t.convert_tokens_to_ids(["left", "<|end|>"]), t.eos_token_id)

    def make(kwargs=None, **limits):
        made.append(Collector("test/Waiting-v0", kwargs or {}, Chat(t, [t.eos_token_id]), engine, RolloutSettings(**limits), 2048))
        return made[-1]

    yield make
    for collector in made:
        collector.close()
    del gymnasium.registry["test/Waiting-v0"]


NAMES = ("up:3", "down:1", "left:4", "right:2", "up:2:gone", "down:5", "left:1", "right:3")


def test_threads_change_no_trajectory(waiting):
    """Whatever takes how long, the same come back in the same order: the first episodes are the slowest, and more wait than threads."""

    def pause(name: str, turn: int) -> float:
        return {"up": 0.03, "down": 0.02, "left": 0.01, "right": 0.0}[name] / (turn + 1)

    want = play(waiting(), *NAMES)
    assert [(t.task_id, len(t.turns)) for t in want] == [(n, int(n.split(":")[1])) for n in NAMES]
    assert Waiting.threads == {"MainThread"}
    Waiting.threads.clear()
    for limits in ({"env_workers": 1}, {"env_workers": 3}, {"env_workers": 8, "max_rows": 3}):
        assert play(waiting({"pause": pause}, **limits), *NAMES) == want
    assert all(name.startswith("environment") for name in Waiting.threads)


def test_environments_wait_together(waiting):
    """Each reset and each step meets the three others at a barrier, which one after another could not pass."""
    barrier = threading.Barrier(4, timeout=30)

    def pause(name: str, turn: int) -> float:
        barrier.wait()
        return 0.0

    played = play(waiting({"pause": pause}, env_workers=4), "up:3", "down:3", "left:3", "right:3")
    assert [len(t.turns) for t in played] == [3] * 4
    assert waiting({}).threads is None  # made when needed


class Continuous(Scripted):
    """Rows join at any time; a turn takes as many steps as the row's number, plus 1."""

    continuous = True

    def open(self, temperature: float, adapter: str | None = "student") -> "Continuous":
        self.left: dict[int, int] = {}
        return self

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(requests)
        self.left |= {r.row: r.row + 1 for r in requests}

    def step(self) -> list[tuple[int, Completion]]:
        self.left = {row: n - 1 for row, n in self.left.items()}
        waiting = [r for r in self.given if self.left[r.row]]
        self.given = [r for r in self.given if not self.left[r.row]]
        finished = super().step()
        self.given = waiting
        return finished


@pytest.mark.parametrize("workers", [0, 4])
def test_rows_that_join_at_any_time_change_no_trajectory(waiting, workers):
    want = play(waiting(), *NAMES)
    for max_rows in (2, 3, 64):
        collector = waiting(env_workers=workers, max_rows=max_rows)
        collector.engine = Continuous(collector.engine.answer, collector.engine.stop)
        assert play(collector, *NAMES) == want


def test_others_decode_while_an_environment_thinks(waiting):
    """The first row's reset ends only when another row has finished its episode of five turns, which waiting for everybody could not."""
    finished = threading.Event()

    def pause(name: str, turn: int) -> float:
        if name == "up":
            assert finished.wait(30)
        elif turn == 5:
            finished.set()
        return 0.0

    collector = waiting({"pause": pause}, env_workers=2)
    collector.engine = Continuous(collector.engine.answer, collector.engine.stop)
    played = play(collector, "up:1", "down:5")
    assert [len(t.turns) for t in played] == [1, 5]


def test_the_next_rollout_waits_for_environments_that_still_answer(waiting):
    """After an interruption; otherwise one would be reset under the thread that is in it."""
    inside, entered = [], threading.Event()

    def pause(name: str, turn: int) -> float:
        if name == "slow" and turn == 1:
            inside.append(name)
            entered.set()
            time.sleep(2.0)
            inside.remove(name)
        return 0.0

    def error(name: str, turn: int) -> None:
        if name == "broken":
            assert entered.wait(30)
            raise SystemExit("no answer")

    collector = waiting({"pause": pause, "error": error}, env_workers=2)
    collector.engine = Continuous(collector.engine.answer, collector.engine.stop)
    with pytest.raises(SystemExit):
        play(collector, "slow:2", "broken:2")
    began = list(inside)
    assert [len(t.turns) for t in play(collector, "up:2", "down:2")] == [2, 2]
    assert began == ["slow"] and not inside


@pytest.mark.parametrize("workers", [0, 4])
def test_an_interruption_in_an_environment_surfaces(waiting, workers):
    """The first in their order, after every call has ended; then the collector can play on. An error does not (test_hostile)."""
    broken = {"up", "left"}

    def error(name: str, turn: int) -> None:
        if name in broken and turn == 2:
            raise SystemExit(f"no answer from {name}")

    slow_first = {"pause": lambda name, turn: 0.05 * (name in ("up", "right")), "error": error}
    collector = waiting(slow_first, env_workers=workers)
    with pytest.raises(SystemExit, match="no answer from up"):
        play(collector, "down:3", "up:3", "left:3", "right:3")
    assert sorted(env.unwrapped.steps for env in collector.envs) == ([1, 1, 2, 2] if not workers else [2] * 4)
    broken.clear()
    assert [len(t.turns) for t in play(collector, "up:3", "left:2")] == [3, 2]


def test_a_failed_episode_counts_for_nothing(waiting):
    """Whatever its last info says; its turns, tokens and reason are kept."""
    t, other = play(waiting(), "up:3:the world is gone", "down:1")
    assert (t.finish_reason, t.failure, t.reward, t.completion, t.success) == ("failed", "environment: the world is gone", 0.0, 0.0, False)
    assert len(t.turns) == 3 and t.n_actions == 6 and len(t.token_ids) == len(t.action_mask)
    assert (other.finish_reason, other.failure, other.reward, other.success) == ("done", "", 0.25, True)
    assert Trajectory.from_json(t.to_json()) == t
    line = json.loads(other.to_json())
    assert line.pop("failure") == "" and Trajectory.from_json(json.dumps(line)) == other  # a line of before there were failures


@pytest.mark.parametrize("workers", [0, 2])
def test_close_closes_every_environment_once(waiting, workers):
    """Every environment once, whatever one of them raises; the threads end; the next episodes get new environments."""
    collector = waiting({"close_error": OSError("stuck")}, env_workers=workers)
    want, before = play(collector, *NAMES[:3]), set(threading.enumerate())
    assert len(Waiting.made) == 3 and bool(collector.threads) == bool(workers)
    with pytest.raises(Failure, match="stuck"):
        collector.close()
    assert [env.closed for env in Waiting.made] == [1, 1, 1]
    assert len(before - set(threading.enumerate())) == workers
    collector.close()
    assert play(collector, *NAMES[:3]) == want
    assert len(Waiting.made) == 6 and [env.closed for env in Waiting.made] == [1, 1, 1, 0, 0, 0]
    for env in Waiting.made:
        env.close_error = None


def test_close_waits_for_a_step_in_progress(waiting, monkeypatch):
    """After Ctrl-C no environment is closed under a thread that is in it, and resets that have not begun are dropped."""
    go, inside, under = threading.Event(), [], []

    def pause(name: str, turn: int) -> float:
        inside.append(name)
        time.sleep(0.2)  # until the main thread waits
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert go.wait(30)
        inside.remove(name)
        return 0.0

    monkeypatch.setattr(Waiting, "close", lambda env: under.append(list(inside)))
    collector, handler = waiting({"pause": pause}, env_workers=1), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            play(collector, "up:1", "down:1")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert inside == ["up"]
    threading.Timer(0.1, go.set).start()
    collector.close()
    assert under == [[], []] and [hasattr(env, "name") for env in Waiting.made].count(True) == 1
