"""What every engine does: the default one, vLLM where it is installed and there is a GPU, and vLLM's engine on a stand-in for vLLM."""

import gc
import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from tests.rollout.fake_vllm import Direction, install
from tests.rollout.test_collector import KWARGS, SOKOBAN
from tests.rollout.test_engine import assert_scored_alike, play
from tests.tolerance import ROUNDING
from transformers import AutoModelForCausalLM

from skillsd.data import RolloutData
from skillsd.errors import ConfigError
from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence
from skillsd.policy.nano import build_tokenizer
from skillsd.rollout import InProcessEngine, Request, RolloutSettings, VllmEngine, vllm_noise
from skillsd.rollout.noise import sample, uniforms
from skillsd.rollout.vllm_noise import Noise

VLLM = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available()
SHAPE = dict(hidden_size=128, intermediate_size=256, head_dim=64, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1)
REAL = {}
"""vLLM takes long to start: one of each for all tests."""


def randomise(policy, seed=7):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name in ("student", "teacher"):
            for p in policy.adapter(name).values():
                p.normal_(0, 0.1)


@pytest.fixture(params=["default", "stand-in", *(pytest.param(x, marks=pytest.mark.skipif(not VLLM, reason="needs vLLM and a GPU"))
                        for x in ("vllm", "vllm nf4"))])  # fmt: skip
def served(request, make_policy, tiny_model, tmp_path_factory, monkeypatch):
    """A policy with random adapters, an engine on it, and how close log-probs are in its precision."""
    if request.param.startswith("vllm"):
        if request.param not in REAL:
            folder, nf4 = tmp_path_factory.mktemp("bfloat16"), "nf4" if "nf4" in request.param else "none"
            AutoModelForCausalLM.from_pretrained(tiny_model("qwen3", SHAPE), dtype=torch.bfloat16).save_pretrained(folder)
            build_tokenizer().save_pretrained(folder)
            policy = Policy(PolicySettings(model=str(folder), lora=LoraSettings(r=4, alpha=8), quantise=nf4), "cuda")
            REAL[request.param] = policy, VllmEngine(policy, rows=8, memory=0.1, eager=True)
        policy, engine = REAL[request.param]
        randomise(policy)
        return SimpleNamespace(policy=policy, engine=engine, atol=0.1, exact=False)
    policy = make_policy()
    if request.param == "default":
        return SimpleNamespace(policy=policy, engine=InProcessEngine(policy), atol=ROUNDING, exact=True)
    install(monkeypatch)
    monkeypatch.setattr("skillsd.rollout.vllm_engine._gpu_bytes", lambda policy: 1 << 30)
    return SimpleNamespace(policy=policy, engine=VllmEngine(policy, rows=5), atol=ROUNDING, exact=True)


def same(served, a, b):
    """Equal draws. Where logits are rounded to bfloat16 one is decided otherwise now and then, and what follows it with it."""
    pairs = [(ids(x), ids(y)) for x, y in zip(a, b, strict=True)]
    if served.exact:
        assert all(x == y for x, y in pairs)
    agreed = sum(next((i for i, (u, v) in enumerate(zip(x, y, strict=False)) if u != v), len(x)) for x, y in pairs)
    assert agreed / (agreed + sum(x != y for x, y in pairs)) > 0.85


def ids(played):
    """Of a trajectory or a completion."""
    return list(getattr(played, "token_ids", None) or played[0].token_ids)


def test_recorded_equals_scored(served):
    for adapter in ("student", "teacher"):
        assert_scored_alike(served.policy, adapter, play(served.policy, adapter, engine=served.engine), served.atol)


def test_an_update_is_seen(served):
    """Each update of an adapter, in place, reaches the next session; nothing of the earlier ones is left in a cache."""
    before = play(served.policy, engine=served.engine)
    for seed in (1, 2, 3):
        randomise(served.policy, seed)
        after = play(served.policy, engine=served.engine)
        assert_scored_alike(served.policy, "student", after, served.atol)
    with pytest.raises(AssertionError):
        assert_scored_alike(served.policy, "student", before, served.atol)


@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_temperature_is_recorded(served, temperature):
    played = play(served.policy, temperature=temperature, engine=served.engine)
    assert_scored_alike(served.policy, "student", played, 2 * served.atol, temperature=temperature)


def test_the_untouched_base_acts(served):
    played = play(served.policy, adapter=None, engine=served.engine)
    with torch.no_grad():
        for p in served.policy.adapter("student").values():
            p.zero_()
    assert_scored_alike(served.policy, "student", played, served.atol)


def test_draws_are_those_of_the_default_engine(served):
    for temperature in (1.0, 0.0):
        wanted = {"temperature": temperature, "slots": 6, "rows": 16}
        ours = play(served.policy, engine=served.engine, **wanted)
        same(served, ours, play(served.policy, engine=InProcessEngine(served.policy, kernels=False), **wanted))


def test_neighbours_do_not_matter(served):
    a, b = (play(served.policy, slots=n, rows=12, engine=served.engine) for n in (1, 7))
    same(served, a, b)


def test_sessions_side_by_side(served):
    """Each with its own adapter, temperature and rows of the same names."""
    kinds = [("student", 1.0), ("teacher", 0.7), (None, 0.0)]

    def talk(sessions):
        for s in sessions:
            s.submit([Request(i, [5 + i, 6, 7], i, 0, 5) for i in range(3)])
        said = [{} for _ in sessions]
        while any(s.busy for s in sessions):
            for s, found in zip(sessions, said, strict=True):
                found.update(s.step())
        return [[found[i] for i in range(3)] for found in said]

    together = talk([served.engine.open(t, a) for a, t in kinds])
    alone = [talk([served.engine.open(t, a)])[0] for a, t in kinds]
    for x, y in zip(together, alone, strict=True):
        same(served, x, y)


def test_a_session_that_is_dropped(served):
    """In the middle of a turn, as after an error: the next one has the engine for itself."""
    session = served.engine.open(1.0)
    session.submit([Request(i, [5, 6, 7], i, 0, 50) for i in range(4)])
    session.step()
    del session
    gc.collect()
    assert served.engine.open(1.0) and not getattr(served.engine, "_asked", {})
    same(served, play(served.policy, engine=served.engine), play(served.policy, engine=served.engine))


def test_rows_that_are_forgotten(served):
    session = served.engine.open(1.0)
    session.turn([Request(i, [5, 6, 7], i, 0, 4) for i in range(4)])
    session.forget([0, 2])
    said = session.turn([Request(1, [8], 1, 5, 4), Request(0, [5, 6, 7], 0, 0, 12)])
    alone = served.engine.open(1.0)
    (again,) = alone.turn([Request(0, [5, 6, 7], 0, 0, 12)])
    same(served, [said[1]], [again])


# -- vLLM's alone --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("served", ["stand-in"], indirect=True)
def test_an_adapter_is_loaded_once(served):
    """For each update that changes it; its file is written for that, and those of earlier ones are removed."""
    llm, folder = served.engine.llm, served.engine.versions.folder
    for _ in range(3):
        served.engine.open(1.0)
    assert llm.reads == 1
    randomise(served.policy, 1)
    served.engine.open(1.0)
    served.engine.open(1.0, "teacher")
    assert llm.reads == 3 and len(llm.loaded) == 2 and llm.settings["max_lora_rank"] == 8
    assert len(list(folder.iterdir())) == 2


def test_what_vllm_needs(make_policy, monkeypatch):
    policy = make_policy()
    with monkeypatch.context() as m:
        m.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"rollout\.engine is vllm, which is not installed: pip install"):
            VllmEngine(policy)
    install(monkeypatch)
    with pytest.raises(ConfigError, match=r"rollout\.engine is vllm, which needs a GPU"):
        VllmEngine(policy)
    monkeypatch.setattr("skillsd.rollout.vllm_engine._gpu_bytes", lambda policy: 1 << 30)
    with pytest.raises(ConfigError, match=r"acts with adapters only"):
        VllmEngine(Policy(policy.settings, adapters=False))

    with pytest.raises(ConfigError, match=r"policy\.lora\.r is 1024: vLLM takes ranks up to 512"):
        VllmEngine(SimpleNamespace(device=policy.device, has_adapters=True, settings=PolicySettings(lora=LoraSettings(r=1024))))
    with pytest.raises(ConfigError, match=r"takes the first GPU, and the policy is on cuda:1: set trainer\.devices to 1"):
        VllmEngine(SimpleNamespace(device=torch.device("cuda:1"), has_adapters=True, settings=policy.settings))

    def refuse(**settings):
        raise ValueError("To serve max_model_len (1024), decrease it\nor increase gpu_memory_utilization")

    monkeypatch.setattr("vllm.LLM", refuse)
    said = r"vllm_memory 0\.4, policy\.context_length 1024\): To serve policy\.context_length .* increase rollout\.vllm_memory$"
    with pytest.raises(ConfigError, match=said):
        VllmEngine(policy)


@pytest.mark.parametrize("served", ["stand-in"], indirect=True)
def test_what_an_error_leaves(served):
    """A session that something still holds: its requests end before the adapter that they name, and a load that fails is tried again."""
    held, llm = served.engine.open(1.0), served.engine.llm
    held.submit([Request(0, [5, 6, 7], 0, 0, 50)])
    held.step()
    served.engine.release(everything=True)
    assert not served.engine._asked
    held.submit([Request(1, [5, 6, 7], 0, 0, 50)])
    randomise(served.policy, 1)  # as after an optimizer that counts nothing
    load, llm.add_lora = llm.add_lora, lambda request: 1 / 0
    with pytest.raises(ZeroDivisionError):
        served.engine.open(1.0)
    assert not served.engine._asked and llm.reads == 1
    llm.add_lora = load
    assert_scored_alike(served.policy, "student", play(served.policy, engine=served.engine), served.atol)
    served.engine.close()
    assert llm.closed and not served.engine.versions.folder.exists()


def test_rows_of_a_batch_that_move():
    """As vLLM tells of it: filled slots are not among the removed, a resumed row has another list, tokens may not be known yet (-1)."""

    def row(key, temperature=1.0):
        return SimpleNamespace(extra_args={"skillsd": {"key": key, "position": 10 * key, "temperature": temperature}})

    def update(removed=(), added=(), moved=()):
        return SimpleNamespace(removed=removed, added=added, moved=moved)

    def sits():
        return {i: (n["key"], n["position"] + len(y)) for i, (n, y) in noise.rows.items()}

    noise, sampled = Noise(), [[] for _ in range(6)]
    noise.update_state(update(added=[(i, row(i), None, sampled[i]) for i in range(3)]))
    sampled[0] += [7, -1]
    noise.update_state(None)
    assert sits() == {0: (0, 2), 1: (1, 10), 2: (2, 20)}
    noise.update_state(update(added=[(1, row(4), None, sampled[4])]))
    assert sits() == {0: (0, 2), 1: (4, 40), 2: (2, 20)}
    noise.update_state(update(moved=[(2, 0, Direction.UNIDIRECTIONAL)]))
    assert sits() == {0: (2, 20), 1: (4, 40)}
    noise.update_state(update(removed=[0], added=[(2, row(5, 0.0), None, [1, 2, 3])], moved=[(1, 0, Direction.SWAP)]))
    assert sits() == {0: (4, 40), 2: (5, 53)}
    noise.update_state(update(added=[(1, SimpleNamespace(extra_args=None), None, [])]))
    given = torch.randn(3, 11)
    out = noise.apply(given.clone())
    for i, temperature, key, position in ((0, 1.0, 4, 40), (2, 0.0, 5, 53)):
        ids, logp = sample(given[i : i + 1], uniforms(torch.tensor([key]), torch.tensor([position])), temperature)
        assert out[i].argmax() == ids and out[i].max() == logp and out[i].isfinite().sum() == 1
    assert torch.equal(out[1], given[1]), "somebody else's row"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_waits_for_nothing():
    """On a GPU nothing in it waits for what has been launched, and the draws are those of the CPU."""
    given, noise = torch.randn(5, 9000, generator=torch.Generator().manual_seed(0)), Noise()
    noise.rows = {i: ({"key": i, "position": 3, "temperature": 0.5 * (i % 2)}, [1, 2]) for i in (0, 1, 3, 4)}
    here, there = noise.apply(given.clone()), given.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        noise.apply(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(there.cpu(), here)


def test_noise_over_http(monkeypatch):
    """Flat keys, the 64-bit one as text, draw the same; nan, which JSON has not, is the least log-prob that a server tells."""
    nested, flat = Noise(), Noise()
    given = torch.randn(1, 11)
    key = -(2**63) + 5
    for noise, args in (
        (nested, {"skillsd": {"key": key, "position": 3, "temperature": 0.5}}),
        (flat, {"skillsd_key": str(key), "skillsd_position": 3, "skillsd_temperature": 0.5}),
    ):
        added = [(0, SimpleNamespace(extra_args=args), None, [1, 2])]
        noise.update_state(SimpleNamespace(removed=(), added=added, moved=()))
    assert torch.equal(nested.apply(given.clone()), flat.apply(given.clone()))
    broken = flat.apply(given * math.nan)
    assert broken.max() == -9999.0 and broken.isfinite().sum() == 1 and nested.apply(given * math.nan).isnan().sum() == 1
    install(monkeypatch)
    made = vllm_noise.NoiseProcessor  # as a server finds it by name
    assert issubclass(made, Noise) and made.__mro__[2].__name__ == "LogitsProcessor"
    with pytest.raises(AttributeError, match="no attribute Nothing"):
        vllm_noise.Nothing  # noqa: B018


def test_a_run_s_settings_reach_it(tiny_model, monkeypatch):
    """`rollout.engine: vllm` in a data module; an iteration of it is played and its log-probs are the policy's."""
    install(monkeypatch)
    monkeypatch.setattr("skillsd.rollout.vllm_engine._gpu_bytes", lambda policy: 1 << 30)
    policy = Policy(PolicySettings(model=tiny_model("qwen3"), lora=LoraSettings(r=4)))
    rollout = RolloutSettings(engine="vllm", vllm_memory=0.25, max_rows=6, max_turn_tokens=4, max_trajectory_tokens=200)
    data = RolloutData(env=SOKOBAN, env_kwargs=KWARGS, batch_tasks=2, group_size=2, rollout=rollout)
    data.trainer = SimpleNamespace(
        default_root_dir="run", lightning_module=SimpleNamespace(policy=policy, settings=policy.settings), callbacks=[]
    )
    data.setup("fit")
    groups = next(iter(data.train_dataloader()))
    engine = data.collector.engine
    assert isinstance(engine, VllmEngine) and engine.llm.settings["max_num_seqs"] == 6
    assert engine.llm.settings["gpu_memory_utilization"] == 0.25
    rows = [t for g in groups for t in g.trajectories]
    assert len(rows) == 4 and all(t.n_actions for t in rows)
    assert_scored_alike(policy, "student", [(TokenSequence(t.prompt_ids, t.token_ids, t.action_mask), recorded(t)) for t in rows])
    data.teardown("fit")
    assert engine.llm.closed


def recorded(t):
    return [x for x, acted in zip(t.logprobs, t.action_mask, strict=True) if acted]


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"rollout\.engine is sglang"):
        RolloutSettings(engine="sglang")
    with pytest.raises(ConfigError, match=r"rollout\.vllm_memory is 1\.5"):
        RolloutSettings(vllm_memory=1.5)
