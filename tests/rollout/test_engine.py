"""The in-process engine: its recorded log-probs are those of `Policy.score`, whatever sits beside a row."""

import random

import pytest
import torch

from skillsd.errors import ConfigError
from skillsd.policy import TokenSequence
from skillsd.rollout import InProcessEngine, Request
from skillsd.rollout.engine import spans
from skillsd.rollout.noise import stream_key


def play(policy, adapter="student", temperature=1.0, rows=7, slots=3, longest_prompt=20, seed=0):
    """`rows` scripted conversations of 1 to 4 turns with random environment ids, at most `slots` at a time."""
    session = InProcessEngine(policy).open(temperature, adapter)
    scripts = []
    for row in range(rows):
        rng = random.Random(f"{seed} {row}")
        sizes = [rng.randint(2, longest_prompt), *(rng.randint(1, 9) for _ in range(rng.randint(0, 3)))]
        scripts.append([[rng.randrange(5, 60) for _ in range(n)] for n in sizes])
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    done, running = {}, {}
    while order or running:
        while order and len(running) < slots:
            running[order.pop()] = ([], [], [], 0)
        requests = []
        for row, (tokens, mask, _, turn) in running.items():
            requests.append(
                Request(row, scripts[row][turn], stream_key(seed, row), len(tokens) + (len(scripts[row][turn]) if turn else 0), 6)
            )
            if turn:
                tokens += scripts[row][turn]
                mask += [False] * len(scripts[row][turn])
        random.Random(len(done)).shuffle(requests)
        for request, c in zip(requests, session.turn(requests), strict=True):
            tokens, mask, logps, turn = running[request.row]
            assert 1 <= len(c.token_ids) <= 6 and c.stopped == (c.token_ids[-1] in policy.stop_ids)
            assert c.stopped or len(c.token_ids) == 6
            tokens += c.token_ids
            mask += [True] * len(c.token_ids)
            logps += c.logprobs
            running[request.row] = (tokens, mask, logps, turn + 1)
        for row in [row for row, (*_, turn) in running.items() if turn == len(scripts[row])]:
            tokens, mask, logps, _ = running.pop(row)
            done[row] = TokenSequence(scripts[row][0], tokens, mask), logps
    return [done[row] for row in range(rows)]


def assert_scored_alike(policy, adapter, played, atol, temperature=1.0):
    sequences = [s for s, _ in played]
    with torch.no_grad():
        scored = policy.score(adapter, sequences, temperature)[0]
    for i, (s, logps) in enumerate(played):
        torch.testing.assert_close(scored[i, : len(s.token_ids)][torch.tensor(s.action_mask)], torch.tensor(logps), atol=atol, rtol=0)


@pytest.mark.parametrize("prefill", [4096, 16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "mistral"])
def test_recorded_equals_scored(make_policy, monkeypatch, architecture, prefill):
    """Several turns, ragged, rows that join and leave in the middle; gemma2 and mistral with windows of 5 tokens."""
    monkeypatch.setattr("skillsd.rollout.engine.PREFILL", prefill)
    policy = make_policy(architecture)
    played = {}
    for adapter in ("student", "teacher"):
        played[adapter] = play(policy, adapter)
        assert_scored_alike(policy, adapter, played[adapter], 1e-5)
    assert max(len(s) for s, _ in played["student"]) > 30
    student, teacher = ([logps for _, logps in played[a]] for a in ("student", "teacher"))
    assert student != teacher


@pytest.mark.parametrize("architecture", ["gemma2", "mistral"])
def test_the_window_matters(make_policy, architecture):
    """The same weights without a window give other log-probs, so the test above does see it."""
    policy = make_policy(architecture)
    with_window = play(policy)
    policy.base.config.sliding_window = 1000
    for m in policy.base.modules():
        if getattr(m, "sliding_window", None):
            m.sliding_window = 1000
    with pytest.raises(AssertionError):
        assert_scored_alike(policy, "student", with_window, 1e-5)


def test_eager_equals_sdpa(make_policy):
    eager = make_policy(attention="eager")
    assert eager.base.config._attn_implementation == "eager"
    played = play(eager)
    assert_scored_alike(make_policy(attention="sdpa"), "student", played, 1e-5)


def test_cache_grows(make_policy):
    policy = make_policy()
    assert_scored_alike(policy, "student", play(policy, rows=5, longest_prompt=600), 1e-5)


def test_temperature_is_recorded(make_policy):
    policy = make_policy()
    assert_scored_alike(policy, "student", play(policy, temperature=0.6), 2e-5, temperature=0.6)


def test_the_untouched_base_acts(make_policy):
    policy, plain = make_policy(), make_policy(randomise=False)
    played = play(policy, adapter=None)
    assert_scored_alike(plain, "student", played, 1e-5)  # fresh adapters change nothing


def test_neighbours_do_not_matter(make_policy):
    policy = make_policy()
    a, b, c = (play(policy, slots=n) for n in (1, 3, 7))
    for x, y, z in zip(a, b, c, strict=True):
        assert x[0] == y[0] == z[0]


def test_a_finished_row_costs_nothing(make_policy, monkeypatch):
    """Every sampled token costs one forwarded row; a row that stopped or left is not forwarded again."""
    policy = make_policy()
    rows = []
    policy.backbone.register_forward_pre_hook(lambda m, a, k: rows.append(k["input_ids"].shape[0]), with_kwargs=True)
    played = play(policy, slots=4)
    assert sum(rows) == sum(len(logps) for _, logps in played)


def test_a_long_prompt_joins_alone(make_policy, monkeypatch):
    monkeypatch.setattr("skillsd.rollout.engine.PREFILL", 64)
    policy = make_policy()
    shapes = []
    policy.backbone.register_forward_pre_hook(lambda m, a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    session = InProcessEngine(policy).open(1.0)
    session.turn([Request(i, [5] * 4, i, 0, 1) for i in range(4)])
    session.turn([*(Request(i, [6], i, 2, 1) for i in range(4)), Request(9, [7] * 100, 9, 0, 1)])
    assert shapes == [(4, 4), (4, 2), (1, 100)]
    assert spans([3, 3, 3, 9, 1], 9) == [(0, 3), (3, 4), (4, 5)]


def test_turn_leaves_the_student_active(make_policy):
    policy = make_policy()
    session = InProcessEngine(policy).open(1.0, "teacher")
    session.turn([Request(0, [5, 6], 0, 0, 2)])
    assert policy.model.active_adapter == "student"
    assert all(p.requires_grad for p in policy.adapter("student").values())
    assert not any(p.requires_grad for p in policy.adapter("teacher").values())


def test_what_the_cache_cannot_hold_is_refused(make_policy):
    policy = make_policy()
    policy.base.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match=r"policy\.model: .*linear_attention"):
        InProcessEngine(policy).open(1.0)
