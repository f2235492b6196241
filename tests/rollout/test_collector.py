"""The collector on the real Sokoban environment, and its limits on an environment of ten turns."""

import random
from collections.abc import Sequence
from dataclasses import replace

import gymnasium
import pytest
import torch

from skillsd.errors import ConfigError
from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence
from skillsd.policy.nano import build_tokenizer
from skillsd.rollout import Chat, Collector, Completion, InProcessEngine, Request, RolloutSettings, Row, make_env
from skillsd.trajectory import Task

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
        done = self.turn == 10
        return "down " * 5, float(done), done, False, {"completion": self.turn / 10, "success": done}


class Scripted:
    """An engine that gives the same answer each turn, cut at the limit, and keeps the requests."""

    def __init__(self, answer: Sequence[int], stop: int) -> None:
        self.answer, self.stop, self.requests = list(answer), stop, []

    def open(self, temperature: float, adapter: str | None = "student") -> "Scripted":
        return self

    def turn(self, requests: Sequence[Request]) -> list[Completion]:
        self.requests += requests
        cut = [self.answer[: r.limit] for r in requests]
        return [Completion(ids, [-0.5] * len(ids), ids[-1] == self.stop) for ids in cut]


@pytest.fixture
def ten_turns():
    """Plays one episode of TenTurns with given limits; a turn costs 3 sampled and 6 environment tokens, the prompt 6."""
    gymnasium.register("test/TenTurns-v0", TenTurns, disable_env_checker=True, order_enforce=False)
    t = build_tokenizer()
    engine = Scripted(t.convert_tokens_to_ids(["left", "left", "<|end|>"]), t.eos_token_id)

    def play(context_length=2048, n=1, **limits):
        collector = Collector("test/TenTurns-v0", {}, Chat(t, [t.eos_token_id]), engine, RolloutSettings(**limits), context_length)
        played = collector.collect([Row(Task(str(i))) for i in range(n)], seed=0, iteration=0)
        return played[0] if n == 1 else played

    play.engine = engine
    yield play
    del gymnasium.registry["test/TenTurns-v0"]


def test_a_whole_episode(ten_turns):
    t = ten_turns()
    assert (t.finish_reason, t.reward, t.completion, t.success, len(t.turns)) == ("done", 1.0, 1.0, True, 10)
    assert len(t.prompt_ids) == 6 and len(t.token_ids) == 10 * 3 + 9 * 6 and t.n_actions == 30
    assert [r.position for r in ten_turns.engine.requests] == [9 * i for i in range(10)]  # counted after the prompt
    assert TenTurns.asked[-1] == (0, {"task_id": "0"})


@pytest.mark.parametrize("limits", [{"max_trajectory_tokens": 35}, {"context_length": 41}])
def test_out_of_tokens_keeps_the_completion_so_far(ten_turns, limits):
    """35 tokens after the prompt: three turns of 9, a fourth answer of 3, and its environment tokens do not fit."""
    t = ten_turns(**limits)
    assert (t.finish_reason, len(t.turns), len(t.token_ids)) == ("length", 4, 3 * 9 + 3)
    assert (t.reward, t.completion, t.success) == (0.4, 0.4, False)
    assert t.action_mask[-3:] == (True,) * 3


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


def collect(policy, rows, max_rows=64, **kwargs):
    chat = Chat(policy.tokenizer, policy.stop_ids)
    settings = RolloutSettings(max_turn_tokens=6, max_rows=max_rows)
    collector = Collector(SOKOBAN, KWARGS, chat, InProcessEngine(policy), settings, policy.context_length)
    return collector.collect(rows, **{"seed": 1, "iteration": 2, **kwargs})


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    tasks = make_env(SOKOBAN, KWARGS).unwrapped.tasks("test")[:5]
    return [Row(Task(t["task_id"]), member) for t in tasks for member in range(3)]


def without_floats(t):
    return replace(t, logprobs=())


def test_same_seed_same_trajectories(policy, rows):
    """Whatever the number of rows at a time and their order."""
    want = collect(policy, rows)
    assert [(t.task_id, t.member) for t in want] == [(r.task.task_id, r.member) for r in rows]
    assert {t.finish_reason for t in want} <= {"horizon", "done"}
    assert len({t.token_ids for t in want}) == len(want)  # members differ
    for max_rows in (1, 3, 64):
        order = list(range(len(rows)))
        random.Random(max_rows).shuffle(order)
        got = collect(policy, [rows[i] for i in order], max_rows)
        for i, t in zip(order, got, strict=True):
            assert without_floats(t) == without_floats(want[i])
            torch.testing.assert_close(torch.tensor(t.logprobs), torch.tensor(want[i].logprobs), atol=1e-5, rtol=0)


def test_another_seed_or_iteration_gives_others(policy, rows):
    base, seed, iteration = (collect(policy, rows[:3], **k) for k in ({}, {"seed": 5}, {"iteration": 9}))
    for a, b, c in zip(base, seed, iteration, strict=True):
        assert len({a.token_ids, b.token_ids, c.token_ids}) == 3 and a.prompt_ids == b.prompt_ids


def test_trajectories_score_as_recorded(policy, rows):
    played = collect(policy, rows, max_rows=4)
    with torch.no_grad():
        logp, _ = policy.score("student", [TokenSequence(t.prompt_ids, t.token_ids, t.action_mask) for t in played])
    for row, t in zip(logp, played, strict=True):
        torch.testing.assert_close(row[: len(t.token_ids)], torch.tensor(t.logprobs), atol=2e-5, rtol=0)


def test_a_skill_heads_the_prompt_of_who_acts(policy, rows):
    plain, skilled = collect(policy, [rows[0], replace(rows[0], skill="plan up up\n")])
    text = policy.tokenizer.decode(skilled.prompt_ids)
    assert "plan up up" in text and len(skilled.prompt_ids) > len(plain.prompt_ids)
    assert skilled.prompt_ids[0] == plain.prompt_ids[0]  # the system mark, then the skill


def test_progress_counts_finished_episodes(policy, rows):
    seen = []
    collect(policy, rows[:6], max_rows=2, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 6


def test_no_rows(policy):
    assert collect(policy, []) == []


def test_unknown_environment():
    with pytest.raises(ConfigError, match="no_such_module"):
        make_env("no_such_module:x/Y-v0", {})
    with pytest.raises(ConfigError, match="boxes"):
        make_env(SOKOBAN, {"boxes": -1})


@pytest.mark.parametrize("key", ["max_turn_tokens", "max_trajectory_tokens", "max_prompt_tokens", "max_rows", "temperature"])
def test_bad_settings(key):
    with pytest.raises(ConfigError, match=rf"rollout\.{key} is 0"):
        RolloutSettings(**{key: 0})
