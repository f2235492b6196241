"""Decoding with the kernels: recorded log-probs are still those of the learner's forward, and nothing stays behind.

On a CPU the kernels are interpreted, on an nf4 base that computes in float32; on a GPU they are compiled, in bfloat16.
"""

import logging
import sys

import pytest
import torch
from tests.conftest import WIDE
from tests.engines.test_engine import assert_scored_alike, play
from tests.tolerance import ROUNDING

from skillsd.engines.engine import Request
from skillsd.engines.in_process import InProcessEngine
from skillsd.engines.step import Stepper
from skillsd.policy import DecodingKernels, TokenSequence, decoding_kernels

pytest.importorskip("triton")

from skillsd.kernels import projections

GPU = torch.cuda.is_available()
SETTINGS = dict(quantise="nf4", dtype="bfloat16" if GPU else "float32", device="cuda" if GPU else "cpu", shape=WIDE)
CLOSE = 0.1 if GPU else ROUNDING
SHORT = dict(rows=3, longest_prompt=8, turns=2, limit=3)
"""The interpreter takes seconds for a forward."""


@pytest.fixture
def always(monkeypatch):
    """Kernels, whatever the machine."""
    monkeypatch.setattr("skillsd.engines.in_process.decoding_kernels", lambda policy: DecodingKernels(policy.base))


SLOW = [pytest.param(a, marks=pytest.mark.torture) for a in ("qwen2", "mistral")]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", *SLOW])
def test_recorded_equals_scored(make_policy, always, architecture):
    """Several turns, ragged; biases (qwen2), norms of heads (qwen3), windows (gemma2, mistral), a soft cap (gemma2)."""
    policy = make_policy(architecture, **SETTINGS)
    engine = InProcessEngine(policy)
    played = {}
    for adapter in ("student", "teacher"):
        played[adapter] = play(policy, adapter, engine=engine, **SHORT)
        assert_scored_alike(policy, adapter, played[adapter], CLOSE)
    assert max(len(s) for s, _ in played["student"]) > 12
    student, teacher = ([logps for _, logps in played[a]] for a in ("student", "teacher"))
    assert student != teacher
    assert engine.fused.projections == 14
    assert engine.fused.norms == {"qwen3": 9, "gemma2": 0}.get(architecture, 5), "gemma2 has another RMSNorm, and keeps its own"
    assert engine.fused.gates == (0 if architecture == "gemma2" else 2) and len(engine.fused.rotary) == 1


def test_kernels_are_what_decodes(make_policy, always, monkeypatch):
    """Broken kernels break decoding: each is in use."""
    policy = make_policy("qwen3", **SETTINGS)
    for name in ("projections.project_all", "attention.attend", *(f"elementwise.{n}" for n in ("rms_norm", "rotate", "silu_mul", "write"))):
        with monkeypatch.context() as m:
            m.setattr(f"skillsd.kernels.{name}", lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                play(policy, engine=InProcessEngine(policy), rows=1, longest_prompt=4, turns=1, limit=2)
    play(policy, engine=InProcessEngine(policy), rows=1, longest_prompt=4, turns=1, limit=2)


def test_the_untouched_base_acts(make_policy, always):
    policy, plain = make_policy(**SETTINGS), make_policy(randomise=False, **SETTINGS)
    assert_scored_alike(plain, "student", play(policy, None, **SHORT), CLOSE)


def test_layers_without_adapter_and_unquantised_ones(make_policy, always):
    policy = make_policy("llama", lora={"targets": ["q_proj", "down_proj"]}, **SETTINGS)
    engine = InProcessEngine(policy)
    assert_scored_alike(policy, "student", play(policy, engine=engine, **SHORT), CLOSE)
    assert engine.fused.projections == 14  # q alone, k, v and the rest without an adapter
    policy = make_policy("llama", **(SETTINGS | {"quantise": "none"}))
    engine = InProcessEngine(policy)
    assert_scored_alike(policy, "student", play(policy, engine=engine, **SHORT), CLOSE)
    assert (engine.fused.projections, engine.fused.norms) == (0, 5)


def test_long_prompts_go_the_usual_way(make_policy, always, monkeypatch):
    monkeypatch.setattr("skillsd.kernels.projections.MOST_ROWS", 12)
    policy = make_policy(**SETTINGS)
    rows = []
    run = projections.project_all
    monkeypatch.setattr("skillsd.kernels.projections.project_all", lambda x, *a: (rows.append(len(x)), run(x, *a))[1])
    assert_scored_alike(policy, "student", play(policy, slots=4, **(SHORT | {"rows": 4})), CLOSE)
    assert rows and max(rows) <= 12


def test_rows_join_at_any_time_and_share_their_prompt(make_policy, always, monkeypatch):
    """Three rows of one prompt, two of another, one alone; turns begin while others are in the middle of theirs."""
    policy = make_policy(**SETTINGS)
    policy.stop_ids = ()
    monkeypatch.setattr("skillsd.engines.in_process.STRIDE", 1)
    session = InProcessEngine(policy).open(1.0)
    prompts = [[7, 8, 9, 10, 11]] * 3 + [[20] * 9] * 2 + [[30, 31]]
    tails, played = {}, {i: ([], [], []) for i in range(6)}
    due = {0: [0, 1, 3], 2: [2], 3: [4, 5]}  # step -> rows; 2 finds the prompt of 0 and 1, 4 finds nothing of 3's
    for step in range(60):
        session.submit([Request(i, prompts[i], i, 0, 2 + i) for i in due.pop(step, ())])
        said = session.step()
        if step == 3:
            (prompt,) = session.prompts.values()
            assert prompt.users == 3 and prompt.length == 4 and session.rows[4].prompt is None
        for i, c in said:
            ids, mask, logps = played[i]
            assert len(c.token_ids) == (2 + i if i not in tails else 2)
            ids += c.token_ids
            mask += [True] * len(c.token_ids)
            logps += c.logprobs
            if i not in tails:
                tails[i] = [40 + i] * (1 + i)
                ids += tails[i]
                mask += [False] * len(tails[i])
                session.submit([Request(i, tails[i], i, len(ids), 2)])
            else:
                session.forget([i])
        if not session.busy and not due:
            break
    assert not session.rows and not session.prompts and sorted(session.free) == list(range(session.slots))
    assert_scored_alike(policy, "student", [(TokenSequence(prompts[i], ids, mask), lp) for i, (ids, mask, lp) in played.items()], CLOSE)


def test_kernels_are_removed_after_an_error(make_policy):
    policy = make_policy(**SETTINGS)
    fused = DecodingKernels(policy.base)
    before, rotary = policy.base.config._attn_implementation, sys.modules[next(iter(fused.rotary))].apply_rotary_pos_emb
    with pytest.raises(KeyError), fused.installed():
        assert policy.base.config._attn_implementation != before
        assert sum("forward" in m.__dict__ for m in policy.base.modules()) == fused.projections + fused.norms + fused.gates
        assert sys.modules[next(iter(fused.rotary))].apply_rotary_pos_emb is not rotary
        raise KeyError
    assert policy.base.config._attn_implementation == before
    assert not any("forward" in m.__dict__ for m in policy.base.modules())
    assert sys.modules[next(iter(fused.rotary))].apply_rotary_pos_emb is rotary


def test_a_layer_with_another_input_is_run_alone(make_policy):
    policy = make_policy("llama", **SETTINGS)
    fused, attention = DecodingKernels(policy.base), policy.base.model.layers[0].self_attn
    x, y = (torch.randn(1, 3, 64, device=policy.device).to(policy.base.dtype) for _ in range(2))
    calls = [("q_proj", x), ("k_proj", y), ("v_proj", x), ("k_proj", x), ("q_proj", y), ("v_proj", y)]
    with torch.no_grad():
        want = [getattr(attention, name)(value) for name, value in calls]
        with fused.installed():
            got = [getattr(attention, name)(value) for name, value in calls]
    torch.testing.assert_close(got, want, atol=0.05 if GPU else ROUNDING, rtol=0)


def test_static_shapes_do_not_depend_on_the_length(make_policy, always):
    """Without a mask, a step's shapes are rows and new ids: one graph serves every length."""
    policy = make_policy(**SETTINGS)
    stepper = Stepper(policy, static=True, fused=DecodingKernels(policy.base))
    session = InProcessEngine(policy).open(1.0)
    session.stepper = stepper
    stepper.plan(2, 500)
    for turn, n in enumerate((20, 60, 300, 30)):  # up to 418 tokens, one prompt too long for a static shape
        session.turn([Request(i, [6 + i] * n, i, 100 * turn, 2) for i in range(2)])
    assert stepper.cache.capacity == 512
    assert stepper.met == {
        (kind, "student", 1.0, 8, shape, 512) for kind, shape in [("decode", ()), *(("feed", (7 + w,)) for w in (32, 64))]
    }


def test_where_kernels_cannot_serve_the_log_says_so(make_policy, caplog):
    with caplog.at_level(logging.INFO, logger="skillsd.policy.decoding_kernels"):
        assert decoding_kernels(make_policy()) is None
    assert "rollout.kernels: there is no NVIDIA GPU" in caplog.text or GPU


def test_a_rotation_of_half_a_head_goes_the_usual_way(make_policy):
    """Nemotron's function turns as much of a head as there is of cos and sin."""
    from transformers.models.nemotron.modeling_nemotron import apply_rotary_pos_emb

    from skillsd.policy.module_patching import rotation

    q, k, cos, sin = (torch.randn(1, 2, 3, d) for d in (16, 16, 8, 8))
    rotate = rotation(apply_rotary_pos_emb, lambda *a: 1 / 0)
    assert torch.equal(rotate(q, k, cos[:, 0], sin[:, 0])[0], apply_rotary_pos_emb(q, k, cos[:, 0], sin[:, 0])[0])
