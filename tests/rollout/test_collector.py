"""The collector on the real Sokoban environment, and its limits on an environment of ten turns."""

import math
import random
from dataclasses import replace

import gymnasium
import pytest
import torch
from tests.rollout.scripted import KWARGS, SOKOBAN, Scripted
from tests.tolerance import close

from skillsd.engines.in_process import InProcessEngine
from skillsd.environment import make_env
from skillsd.errors import ConfigError
from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence
from skillsd.policy.nano import build_tokenizer
from skillsd.rollout import Chat, Collector, Episode, RolloutSettings
from skillsd.trajectory import Task, Trajectory


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
