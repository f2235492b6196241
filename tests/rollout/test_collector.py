"""The collector on the real Sokoban environment, and its limits on an environment of ten turns."""

import json
import math
import random
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import gymnasium
import pytest
import torch
from tests.tolerance import close

from skillsd.engines.engine import Completion, Request, Session
from skillsd.engines.in_process import InProcessEngine
from skillsd.environment import make_env
from skillsd.errors import ConfigError
from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence
from skillsd.policy.nano import build_tokenizer
from skillsd.rollout import Chat, Collector, Episode, RolloutSettings
from skillsd.timeouts import Failure
from skillsd.trajectory import Task, Trajectory

SOKOBAN = "skillsd_sokoban:skillsd/Sokoban-v0"
KWARGS = {"action_format": "bare", "max_turns": 5, "boxes": 1, "prompts": {"instruction": "answer with one move."}}


class TenTurns(gymnasium.Env):
    """Done after ten turns, a tenth of the completion for each; it remembers what it was asked for."""

    observation_space = action_space = gymnasium.spaces.Text(1)
    asked: list = []

    def reset(self, *, seed=None, options=None):
        self.turn = 0
        self.asked.append((seed, options))
        return "up " * 5, {"task_id": options["task_id"], "instruction": "", "completion": 0.0, "success": False}

    def step(self, action):
        self.turn += 1
        over = self.turn == 10
        return "down " * 5, float(over), over, False, {"completion": self.turn / 10, "success": over}


class Scripted(Session):
    """An engine that gives the same answer each turn, cut at the limit, and keeps the requests."""

    def __init__(self, answer: Sequence[int], stop: int) -> None:
        self.answer, self.stop, self.requests, self.given = list(answer), stop, [], []

    def open(self, temperature: float, adapter: str | None = "student") -> "Scripted":
        return self

    def close(self, failed: bool = False) -> None:
        pass

    @property
    def busy(self) -> bool:
        return bool(self.given)

    def submit(self, requests: Sequence[Request]) -> None:
        self.requests += requests
        self.given += requests

    def step(self) -> list[tuple[int, Completion]]:
        given, self.given = self.given, []
        cut = [(r.row, self.answer[: r.limit]) for r in given]
        return [(row, Completion(ids, [-0.5] * len(ids), ids[-1] == self.stop)) for row, ids in cut]

    def forget(self, rows: Iterable[int]) -> None:
        pass


@pytest.fixture
def ten_turns():
    """Plays one episode of TenTurns with given limits; a turn costs 3 sampled and 6 environment tokens, the prompt 6."""
    gymnasium.register("test/TenTurns-v0", TenTurns, disable_env_checker=True, order_enforce=False)
    t = build_tokenizer()
    engine = Scripted(t.convert_tokens_to_ids(["left", "left", "<|end|>"]), t.eos_token_id)

    def play(context_length=2048, n=1, **limits):
        collector = Collector(
            "test/TenTurns-v0", {}, Chat(t, [t.eos_token_id]), engine, RolloutSettings(**{"max_turn_tokens": 512} | limits), context_length
        )
        played = collector.collect([Episode(Task(str(i))) for i in range(n)], seed=0, iteration=0)
        return played[0] if n == 1 else played

    play.engine = engine
    yield play
    del gymnasium.registry["test/TenTurns-v0"]


@pytest.mark.parametrize(
    ("final", "finish", "reward", "failure"),
    [
        ({"completion": 0.75, "success": False}, "length", 0.75, ""),
        ({"failed": "gone", "completion": 0.75}, "failed", 0.0, "environment: gone"),
    ],
)
def test_an_environment_scores_an_episode_that_ends_early(ten_turns, monkeypatch, final, finish, reward, failure):
    """One that scores at the end only is asked to when the tokens run out."""
    monkeypatch.setattr(TenTurns, "finish", lambda self: final, raising=False)
    t = ten_turns(max_trajectory_tokens=30)
    assert (t.finish_reason, t.reward, t.completion, t.failure) == (finish, reward, reward, failure)
    assert t.final_observation == "down " * 5
    assert ten_turns().completion == 1.0  # one that ends by itself is not


def test_a_whole_episode(ten_turns):
    t = ten_turns()
    assert (t.finish_reason, t.reward, t.completion, t.success, len(t.turns)) == ("done", 1.0, 1.0, True, 10)
    assert len(t.prompt_ids) == 6 and len(t.token_ids) == 10 * 3 + 9 * 6 and t.n_actions == 30
    assert [r.position for r in ten_turns.engine.requests] == [9 * i for i in range(10)]  # counted after the prompt
    assert TenTurns.asked[-1] == (0, {"task_id": "0"})


def test_the_answer_to_the_last_action_is_recorded(ten_turns, monkeypatch):
    """However the episode ends; where the last call gave no answer there is none. No token of it is in the record."""
    monkeypatch.setattr(TenTurns, "step", lambda self, action: (f"answer {self.turns(action)}", 0.0, self.turn == 10, self.turn == 3, {}))
    monkeypatch.setattr(TenTurns, "turns", lambda self, _: setattr(self, "turn", self.turn + 1) or self.turn, raising=False)
    t = ten_turns()
    assert (t.finish_reason, t.final_observation, t.turns[-1].observation) == ("horizon", "answer 3", "answer 2")
    assert t.action_mask[-1] and Trajectory.from_json(t.to_json()) == t
    t = ten_turns(max_prompt_tokens=5)
    assert (t.finish_reason, t.final_observation, t.turns) == ("length", "up " * 5, ())
    monkeypatch.setattr(TenTurns, "step", lambda self, action: 1 / 0 if self.turns(action) == 2 else ("down", 0.0, False, False, {}))
    t = ten_turns()
    assert (t.finish_reason, t.final_observation, len(t.turns)) == ("failed", None, 2)


@pytest.mark.parametrize("limits", [{"max_trajectory_tokens": 35}, {"context_length": 41}])
def test_out_of_tokens_keeps_the_completion_so_far(ten_turns, limits):
    """35 tokens after the prompt: three turns of 9, a fourth answer of 3, and its environment tokens do not fit."""
    t = ten_turns(**limits)
    assert (t.finish_reason, len(t.turns), len(t.token_ids)) == ("length", 4, 3 * 9 + 3)
    assert (t.reward, t.completion, t.success) == (0.4, 0.4, False)
    assert t.action_mask[-3:] == (True,) * 3 and t.final_observation == "down " * 5


@pytest.mark.parametrize("limits", [{"max_trajectory_tokens": 29}, {"context_length": 35}])
def test_the_last_answer_is_cut(ten_turns, limits):
    t = ten_turns(**limits)
    assert (t.finish_reason, len(t.turns), len(t.token_ids)) == ("length", 4, 29)
    assert t.turns[-1].action == "left left" and ten_turns.engine.requests[-1].limit == 2


def test_a_turn_is_cut_and_closed(ten_turns):
    """A cut answer is played as it is; its closing mark comes from the template and is not an action."""
    t = ten_turns(max_turn_tokens=2)
    end = build_tokenizer().eos_token_id
    assert t.finish_reason == "done" and t.n_actions == 20
    assert t.token_ids[:3] == (*ten_turns.engine.answer[:2], end) and t.action_mask[:3] == (True, True, False)


@pytest.mark.parametrize("limits", [{"max_prompt_tokens": 5}, {"context_length": 6}])
def test_a_prompt_that_is_too_long(ten_turns, limits):
    for t in ten_turns(n=3, max_rows=2, **limits):
        assert (t.finish_reason, t.token_ids, t.turns, t.reward) == ("length", (), (), 0.0)
        assert len(t.prompt_ids) == 6
    assert not ten_turns.engine.requests


def test_sampled_ids_are_kept_as_they_are(ten_turns):
    """`#`, newline, `#` encode to one id: had the answer been decoded and encoded again, the record would show it."""
    vocab = build_tokenizer()
    ids = vocab.convert_tokens_to_ids(["#", "\n", "#", "<|unk|>", "<|end|>"])
    assert vocab(vocab.decode(ids[:3]), add_special_tokens=False).input_ids != ids[:3]
    ten_turns.engine.answer = ids
    t = ten_turns()
    sampled = [i for i, a in zip(t.token_ids, t.action_mask, strict=True) if a]
    assert sampled == ids * 10
    assert [p for p, a in zip(t.logprobs, t.action_mask, strict=True) if a] == [-0.5] * 50
    assert not any(p for p, a in zip(t.logprobs, t.action_mask, strict=True) if not a)


@pytest.fixture(scope="module")
def policy() -> Policy:
    made = Policy(PolicySettings(model="nano-untrained", lora=LoraSettings(r=4, alpha=8)))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in made.adapter("student").values():
            p.normal_(0, 0.2)
    return made


def collect(policy, episodes, max_rows=64, **kwargs):
    chat = Chat(policy.tokenizer, policy.stop_ids)
    settings = RolloutSettings(max_turn_tokens=6, max_rows=max_rows)
    collector = Collector(SOKOBAN, KWARGS, chat, InProcessEngine(policy), settings, policy.context_length)
    return collector.collect(episodes, **{"seed": 1, "iteration": 2, **kwargs})


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    tasks = make_env(SOKOBAN, KWARGS).tasks("test")[:5]
    return [Episode(t, member) for t in tasks for member in range(3)]


def without_floats(t):
    return replace(t, logprobs=())


def test_same_seed_same_trajectories(policy, episodes):
    """Whatever the number of episodes at a time and their order."""
    want = collect(policy, episodes)
    assert [(t.task_id, t.member) for t in want] == [(r.task.task_id, r.member) for r in episodes]
    assert {t.finish_reason for t in want} <= {"horizon", "done"}
    assert len({t.token_ids for t in want}) == len(want)  # members differ
    for max_rows in (1, 3, 64):
        order = list(range(len(episodes)))
        random.Random(max_rows).shuffle(order)
        got = collect(policy, [episodes[i] for i in order], max_rows)
        for i, t in zip(order, got, strict=True):
            assert without_floats(t) == without_floats(want[i])
            close(t.logprobs, want[i].logprobs)


def test_another_seed_or_iteration_gives_others(policy, episodes):
    base, seed, iteration = (collect(policy, episodes[:3], **k) for k in ({}, {"seed": 5}, {"iteration": 9}))
    for a, b, c in zip(base, seed, iteration, strict=True):
        assert len({a.token_ids, b.token_ids, c.token_ids}) == 3 and a.prompt_ids == b.prompt_ids


def test_trajectories_score_as_recorded(policy, episodes):
    played = collect(policy, episodes, max_rows=4)
    with torch.no_grad():
        logp = policy.score("student", [TokenSequence(t.prompt_ids, t.token_ids, t.action_mask) for t in played]).logp
    for row, t in zip(logp, played, strict=True):
        close(row[: len(t.token_ids)], torch.tensor(t.logprobs))


def test_a_skill_heads_the_prompt_of_who_acts(policy, episodes):
    plain, skilled = collect(policy, [episodes[0], replace(episodes[0], skill="plan up up\n")])
    text = policy.tokenizer.decode(skilled.prompt_ids)
    assert "plan up up" in text and len(skilled.prompt_ids) > len(plain.prompt_ids)
    assert skilled.prompt_ids[0] == plain.prompt_ids[0]  # the system mark, then the skill


def test_progress_counts_finished_episodes(policy, episodes):
    seen = []
    collect(policy, episodes[:6], max_rows=2, progress=lambda n, of: seen.append(n))
    assert seen == sorted(seen) and seen[-1] == 6


def test_no_episodes(policy):
    assert collect(policy, []) == []


# -- environments that wait, fail, and are closed --------------------------------------------------------------------------------


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


def play(collector: Collector, *names: str) -> list[Trajectory]:
    return collector.collect([Episode(Task(n)) for n in names], seed=0, iteration=0)


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


def test_unknown_environment():
    with pytest.raises(ConfigError, match="no_such_module"):
        make_env("no_such_module:x/Y-v0", {})
    with pytest.raises(ConfigError, match="boxes"):
        make_env(SOKOBAN, {"boxes": -1})


@pytest.mark.parametrize("error", [FileNotFoundError, ValueError, PermissionError])
def test_an_environment_that_is_not_installed_says_so_in_one_line(error):
    """Without an errno, and with a tool's output in the message."""

    def create(**_):
        raise error("python: no interpreter at /x:\n  install it,\n  or set THE_PYTHON")

    gymnasium.register("test/Missing-v0", create)
    try:
        with pytest.raises(ConfigError) as caught:
            make_env("test/Missing-v0", {})
    finally:
        del gymnasium.registry["test/Missing-v0"]
    want = "data.env, env_kwargs: test/Missing-v0: python: no interpreter at /x: install it, or set THE_PYTHON"
    assert str(caught.value) == want


@pytest.mark.parametrize("key", ["max_turn_tokens", "max_trajectory_tokens", "max_prompt_tokens", "max_rows", "temperature"])
def test_bad_settings(key):
    with pytest.raises(ConfigError, match=rf"rollout\.{key} is 0"):
        RolloutSettings(**{key: 0})
    for bad in ({"env_workers": -1}, {"env_timeout": -1}, {"env_timeout": math.nan}, {"max_failed": 1.5}, {"max_observation_chars": 0}):
        with pytest.raises(ConfigError, match=rf"rollout\.{next(iter(bad))} is {next(iter(bad.values()))}"):
            RolloutSettings(**bad)
