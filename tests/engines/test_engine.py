"""The in-process engine: its recorded log-probs are those of `Policy.score`, whatever sits beside a row."""

import gc
import logging
import math
import random

import pytest
import torch
from tests.conftest import randomise_adapters
from tests.tolerance import ROUNDING, close

from skillsd.engines.engine import Request
from skillsd.engines.in_process import InProcessEngine, spans
from skillsd.engines.noise import stream_key
from skillsd.engines.step import Stepper, bucket
from skillsd.errors import ConfigError
from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence


def play(policy, adapter="student", temperature=1.0, rows=7, slots=3, longest_prompt=20, seed=0, engine=None, turns=4, limit=6):
    """`rows` scripted conversations of 1 to `turns` turns with random environment ids, at most `slots` at a time."""
    session = (engine or InProcessEngine(policy)).open(temperature, adapter)
    scripts = []
    for row in range(rows):
        rng = random.Random(f"{seed} {row}")
        sizes = [rng.randint(2, longest_prompt), *(rng.randint(1, 9) for _ in range(rng.randint(0, turns - 1)))]
        scripts.append([[rng.randrange(5, 60) for _ in range(n)] for n in sizes])
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    finished, running = {}, {}
    while order or running:
        while order and len(running) < slots:
            running[order.pop()] = ([], [], [], 0)
        requests = []
        for row, (tokens, mask, _, turn) in running.items():
            position = len(tokens) + (len(scripts[row][turn]) if turn else 0)
            requests.append(Request(row, scripts[row][turn], stream_key(seed, row), position, limit))
            if turn:
                tokens += scripts[row][turn]
                mask += [False] * len(scripts[row][turn])
        random.Random(len(finished)).shuffle(requests)
        for request, c in zip(requests, session.turn(requests), strict=True):
            tokens, mask, logps, turn = running[request.row]
            assert 1 <= len(c.token_ids) <= limit and c.stopped == (c.token_ids[-1] in policy.stop_ids)
            assert c.stopped or len(c.token_ids) == limit
            tokens += c.token_ids
            mask += [True] * len(c.token_ids)
            logps += c.logprobs
            running[request.row] = (tokens, mask, logps, turn + 1)
        for row in [row for row, (*_, turn) in running.items() if turn == len(scripts[row])]:
            tokens, mask, logps, _ = running.pop(row)
            session.forget([row])
            finished[row] = TokenSequence(scripts[row][0], tokens, mask), logps
    return [finished[row] for row in range(rows)]


def assert_scored_alike(policy, adapter, played, atol=ROUNDING, temperature=1.0):
    sequences = [s for s, _ in played]
    with torch.no_grad():
        scored = policy.score(adapter, sequences, temperature)[0].cpu()
    for i, (s, logps) in enumerate(played):
        torch.testing.assert_close(scored[i, : len(s.token_ids)][torch.tensor(s.action_mask)], torch.tensor(logps), atol=atol, rtol=0)


@pytest.mark.parametrize("prefill", [4096, 16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "mistral"])
def test_recorded_equals_scored(make_policy, monkeypatch, architecture, prefill):
    """Several turns, ragged, rows that join and leave in the middle; gemma2 and mistral with windows of 5 tokens."""
    monkeypatch.setattr("skillsd.engines.in_process.PREFILL", prefill)
    policy = make_policy(architecture)
    played = {}
    for adapter in ("student", "teacher"):
        played[adapter] = play(policy, adapter)
        assert_scored_alike(policy, adapter, played[adapter])
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
        assert_scored_alike(policy, "student", with_window)


def test_eager_equals_sdpa(make_policy):
    eager = make_policy(attention="eager")
    assert eager.base.config._attn_implementation == "eager"
    played = play(eager)
    assert_scored_alike(make_policy(attention="sdpa"), "student", played)


def test_cache_grows(make_policy):
    policy = make_policy()
    assert_scored_alike(policy, "student", play(policy, rows=5, longest_prompt=600))


def test_nan_does_not_stay_in_a_slot(make_policy):
    """The next row there is seen together with a longer one, so that what lies behind its own tokens is masked and not cut off."""
    policy = make_policy()
    session, fresh = (InProcessEngine(policy).open(1.0) for _ in range(2))
    session.turn([Request(0, [7, 8, 9], 1, 0, 6), Request(1, [9, 8, 7, 6, 5, 4, 3], 2, 0, 6)])
    for store in session.stepper.cache.values:
        store[session.rows[0].slot] = float("nan")
    (broken,) = session.turn([Request(0, [5], 1, 7, 1)])
    assert math.isnan(sum(broken.logprobs))
    session.forget([0])
    _, c = session.turn([Request(1, [4], 2, 7, 2), Request(2, [7, 8], 3, 0, 2)])
    (alone,) = fresh.turn([Request(2, [7, 8], 3, 0, 2)])
    assert c.token_ids == alone.token_ids and c.logprobs == pytest.approx(alone.logprobs, abs=ROUNDING)


def test_temperature_is_recorded(make_policy):
    policy = make_policy()
    assert_scored_alike(policy, "student", play(policy, temperature=0.6), temperature=0.6)


def test_the_untouched_base_acts(make_policy):
    policy, plain = make_policy(), make_policy(randomise=False)
    played = play(policy, adapter=None)
    assert_scored_alike(plain, "student", played)  # fresh adapters change nothing


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
    monkeypatch.setattr("skillsd.engines.in_process.PREFILL", 64)
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


# -- static shapes and what is recorded of them --------------------------------------------------------------------------------------


@pytest.fixture
def static(monkeypatch):
    """Makes engines with static shapes and counts the steps that took them."""
    calls, fixed = [], Stepper._fixed
    monkeypatch.setattr(Stepper, "_fixed", lambda self, kind, given, *a: calls.append(kind) or fixed(self, kind, given, *a))

    def make(policy):
        engine = InProcessEngine(policy)
        assert not engine.static  # on a CPU
        engine.static = True
        return engine

    make.calls = calls
    return make


@pytest.fixture
def graphs(monkeypatch):
    """Stands in for CUDA graphs: a recorded step is run again on its static input into its static result."""
    made, replayed = [], []

    def record(self, step):
        made.append(step)
        out = step()

        def replay():
            replayed.append(step)
            out.copy_(step())

        return replay, out

    monkeypatch.setattr(Stepper, "_record", record)
    monkeypatch.setattr("skillsd.engines.step.can_record", lambda given: True)
    return made, replayed


def assert_played_alike(a, b):
    for (x, x_logps), (y, y_logps) in zip(a, b, strict=True):
        assert x == y
        close(x_logps, y_logps)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "mistral"])
def test_static_shapes_change_nothing(make_policy, static, graphs, architecture):
    """Sessions in a row on one cache, ragged rows that join and leave, prompts of more ids than any static width, all adapters."""
    policy = make_policy(architecture)
    engine = static(policy)
    for seed, (adapter, temperature, longest) in enumerate(
        [("student", 1.0, 20), ("teacher", 1.0, 20), (None, 0.0, 20), ("student", 1.0, 90), ("student", 0.6, 9), ("student", 1.0, 300)]
    ):
        wanted = {"adapter": adapter, "temperature": temperature, "longest_prompt": longest, "seed": seed}
        assert_played_alike(play(policy, engine=engine, **wanted), play(policy, **wanted))
    made, replayed = graphs
    assert len(static.calls) > 60 and made and len(replayed) > len(static.calls) / 3


def test_graphs_outlive_a_session(make_policy, static, graphs):
    """The next rollout finds them, after an optimizer's step in place too; a cache or weights elsewhere make them void."""
    policy = make_policy()
    engine, (made, replayed) = static(policy), graphs
    play(policy, engine=engine)
    play(policy, engine=engine)
    count = len(made)
    assert count and len(replayed) > count
    with torch.no_grad():
        for p in policy.adapter("student").values():
            p.add_(0.05)
    steps = len(static.calls)
    before = len(replayed)
    assert_played_alike(play(policy, engine=engine), play(policy))
    assert len(made) <= count + 2 and len(replayed) - before > (len(static.calls) - steps) / 2
    stepper = engine._kept[0]
    cache, valid = stepper.cache, stepper.valid
    for p in policy.adapter("student").values():
        p.data = p.data.clone()
    assert_played_alike(play(policy, engine=engine, seed=1), play(policy, seed=1))
    assert stepper.valid != valid and stepper is engine._kept[0] and stepper.cache is cache
    version = cache.version
    assert_played_alike(play(policy, engine=engine, rows=20, slots=17), play(policy, rows=20, slots=17))
    assert cache.version > version and stepper.valid[0] == cache.version and cache.slots == 32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "mistral"])
def test_cuda_graphs_change_nothing(tiny_model, monkeypatch, caplog, architecture):
    """Real ones: replayed for sessions in a row, after an optimizer's step too, equal to the dynamic shapes and to the scores."""
    attention = "eager" if architecture == "gemma2" else None
    policy = Policy(PolicySettings(model=tiny_model(architecture), lora=LoraSettings(r=4, alpha=8), attention=attention), "cuda")
    engine, replayed = InProcessEngine(policy), []
    fixed = Stepper._fixed
    monkeypatch.setattr(Stepper, "_fixed", lambda self, *a: replayed.append(bool(self.graphs)) or fixed(self, *a))
    for seed, adapter in enumerate(("student", "teacher", None, "student", "student", "teacher")):
        randomise_adapters(policy, seed)
        got = play(policy, adapter, engine=engine, seed=seed)
        for (x, x_logps), (y, y_logps) in zip(got, play(policy, adapter, seed=seed, engine=InProcessEngine(policy, False)), strict=True):
            assert x == y
            torch.testing.assert_close(torch.tensor(x_logps), torch.tensor(y_logps), atol=1e-4, rtol=0)
        if adapter is not None:
            with torch.no_grad():
                scored = policy.score(adapter, [s for s, _ in got]).logp.cpu()
            for row, (s, logps) in zip(scored, got, strict=True):
                torch.testing.assert_close(row[: len(s.token_ids)][torch.tensor(s.action_mask)], torch.tensor(logps), atol=1e-4, rtol=0)
    assert engine.static and engine._kept[0].graphs and sum(replayed) > 30
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert not [r for r in caplog.records if "CUDA graphs" in r.message]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_capture_that_fails_on_a_gpu(tiny_model, caplog):
    """A copy to the host is not allowed in it: dynamic shapes go on, on the same stream."""
    policy = Policy(PolicySettings(model=tiny_model("qwen3")), "cuda")
    policy.backbone.register_forward_hook(lambda m, a, out: out.last_hidden_state.sum().item() and None)
    engine = InProcessEngine(policy)
    for seed in range(3):
        played, wanted = (play(policy, engine=e, seed=seed) for e in (engine, InProcessEngine(policy, False)))
        assert [x for x, _ in played] == [x for x, _ in wanted]
    assert not engine.static and torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.rand(1, device="cuda")  # torch's generator is not left in the capture
    assert len([r for r in caplog.records if "CUDA graphs are off" in r.message]) == 1


def test_a_step_that_cannot_be_recorded(make_policy, static, graphs, monkeypatch, caplog):
    """One warning, then dynamic shapes for good."""

    def refuse(self, step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Stepper, "_record", refuse)
    policy = make_policy()
    engine = static(policy)
    with caplog.at_level(logging.WARNING, "skillsd"):
        assert_played_alike(play(policy, engine=engine), play(policy))
        steps = len(static.calls)
        assert_played_alike(play(policy, engine=engine, seed=1), play(policy, seed=1))
    assert steps and len(static.calls) == steps and not engine.static and engine._kept is None
    (record,) = [r for r in caplog.records if "CUDA graphs" in r.message]
    assert "capturing" in record.message and "more" not in record.message


def test_a_cache_too_large_to_keep(make_policy, static, graphs, monkeypatch):
    policy = make_policy()
    engine = static(policy)
    session = engine.open(1.0)
    session.stepper.static_max_bytes = 8 * 300 * session.stepper.cache.token_bytes
    del session
    gc.collect()
    assert_played_alike(play(policy, engine=engine, longest_prompt=300), play(policy, longest_prompt=300))
    play(policy, engine=engine)
    assert not engine.static and engine._kept is None


def test_two_sessions_at_once(make_policy, static):
    """The second does not write into the cache of the first."""
    policy = make_policy()
    engine = static(policy)
    prompts = [5, 6, 7], [8, 9]

    def talk(*sessions):
        out = [s.turn([Request(0, p, k, 0, 4)])[0] for k, (s, p) in enumerate(zip(sessions, prompts, strict=True))]
        return out + [s.turn([Request(0, [9, 8], k, 6, 4)])[0] for k, s in enumerate(sessions)]

    a, b = engine.open(1.0), engine.open(1.0)
    assert a.stepper.cache is not b.stepper.cache and a.stepper.static and not b.stepper.static
    for x, y in zip(talk(a, b), talk(*(InProcessEngine(policy).open(1.0) for _ in prompts)), strict=True):
        assert x.token_ids == y.token_ids and x.logprobs == pytest.approx(y.logprobs, abs=ROUNDING)


@pytest.mark.parametrize("rows", [3, 8])
def test_a_turn_of_a_new_row_alone(make_policy, rows):
    """The others are neither in this turn nor forgotten: it takes the first slot from one of them."""
    policy = make_policy()
    session = InProcessEngine(policy).open(1.0)
    session.turn([Request(i, [5 + i, 6], i, 0, 3) for i in range(rows)])
    (new,) = session.turn([Request(20, [9, 8, 7], 20, 0, 4)])
    (old,) = session.turn([Request(0, [11], 0, 4, 4)])
    alone = InProcessEngine(policy).open(1.0)
    assert new.token_ids == alone.turn([Request(20, [9, 8, 7], 20, 0, 4)])[0].token_ids
    alone.turn([Request(0, [5, 6], 0, 0, 3)])
    assert old.token_ids == alone.turn([Request(0, [11], 0, 4, 4)])[0].token_ids


def test_a_bucket_is_a_power_of_two_times_the_smallest():
    assert [bucket(n, 8) for n in (1, 8, 9, 16, 17, 128)] == [8, 8, 16, 16, 32, 128]
