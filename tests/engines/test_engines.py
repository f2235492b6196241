"""What every engine does: the one in this process, and servers (fake ones, on the processor that real ones draw with)."""

from types import SimpleNamespace

import pytest
import torch
from tests.conftest import randomise_adapters
from tests.engines.fake_server import serving
from tests.engines.test_engine import assert_scored_alike, play
from tests.tolerance import ROUNDING

from skillsd.engines.engine import Request
from skillsd.engines.in_process import InProcessEngine
from skillsd.engines.vllm_server import VllmServers


@pytest.fixture(params=["in process", "servers"])
def served(request, make_policy):
    """A policy with random adapters, and an engine on it."""
    policy = make_policy()
    if request.param == "in process":
        yield SimpleNamespace(policy=policy, engine=InProcessEngine(policy))
        return
    with serving(policy.settings.model, 2) as servers:
        engine = VllmServers(policy, [s.url for s in servers], rows=5)
        yield SimpleNamespace(policy=policy, engine=engine)
        engine.close()


def same(a, b):
    """The same tokens, of trajectories or of completions."""
    assert [ids(x) for x in a] == [ids(x) for x in b]


def ids(played):
    return list(getattr(played, "token_ids", None) or played[0].token_ids)


def test_recorded_equals_scored(served):
    for adapter in ("student", "teacher"):
        assert_scored_alike(served.policy, adapter, play(served.policy, adapter, engine=served.engine))


def test_an_update_is_seen(served):
    """Each update of an adapter, in place, reaches the next session; nothing of the earlier ones is left in a cache."""
    before = play(served.policy, engine=served.engine)
    for seed in (1, 2, 3):
        randomise_adapters(served.policy, seed)
        after = play(served.policy, engine=served.engine)
        assert_scored_alike(served.policy, "student", after)
    with pytest.raises(AssertionError):
        assert_scored_alike(served.policy, "student", before)


@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_temperature_is_recorded(served, temperature):
    played = play(served.policy, temperature=temperature, engine=served.engine)
    assert_scored_alike(served.policy, "student", played, 2 * ROUNDING, temperature=temperature)


def test_the_untouched_base_acts(served):
    played = play(served.policy, adapter=None, engine=served.engine)
    with torch.no_grad():
        for p in served.policy.adapter("student").values():
            p.zero_()
    assert_scored_alike(served.policy, "student", played)


def test_draws_are_those_of_the_default_engine(served):
    for temperature in (1.0, 0.0):
        wanted = {"temperature": temperature, "slots": 6, "rows": 16}
        ours = play(served.policy, engine=served.engine, **wanted)
        same(ours, play(served.policy, engine=InProcessEngine(served.policy, kernels=False), **wanted))


def test_neighbours_do_not_matter(served):
    a, b = (play(served.policy, slots=n, rows=12, engine=served.engine) for n in (1, 7))
    same(a, b)


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
        same(x, y)


def test_a_session_that_fails(served):
    """In the middle of a turn: the next one has the engine for itself, though somebody still holds it."""
    with pytest.raises(ZeroDivisionError), served.engine.open(1.0) as session:
        session.submit([Request(i, [5, 6, 7], i, 0, 50) for i in range(4)])
        session.step()
        _ = 1 / 0
    same(play(served.policy, engine=served.engine), play(served.policy, engine=served.engine))


def test_rows_that_are_forgotten(served):
    session = served.engine.open(1.0)
    session.turn([Request(i, [5, 6, 7], i, 0, 4) for i in range(4)])
    session.forget([0, 2])
    said = session.turn([Request(1, [8], 1, 5, 4), Request(0, [5, 6, 7], 0, 0, 12)])
    alone = served.engine.open(1.0)
    (again,) = alone.turn([Request(0, [5, 6, 7], 0, 0, 12)])
    same([said[1]], [again])
