"""The memory plan: what it counts, what it shares out, and what it refuses."""

from heapq import heappush
from types import SimpleNamespace

import pytest
import torch
from tests.rollout.scripted import KWARGS, SOKOBAN

from skillsd.callbacks.memory import plan
from skillsd.engines.cache import SlotCache
from skillsd.engines.engine import CacheFull, Request, complete
from skillsd.engines.in_process import InProcessEngine, InProcessSession, _Row
from skillsd.engines.step import Stepper
from skillsd.environment import make_env
from skillsd.errors import ConfigError
from skillsd.policy import CacheBudget, Demand, Footprint
from skillsd.rollout import Chat, Collector, Episode, RolloutSettings

MIB = 2**20


def module(policy, micro_batch_tokens=64, **signal):
    objective = SimpleNamespace(signal=SimpleNamespace(distributional=False, **signal))
    return SimpleNamespace(
        policy=policy, learner=SimpleNamespace(micro_batch_tokens=micro_batch_tokens), objective=objective, grad_norm_every=0
    )


def test_what_lies_in_memory_is_counted(make_policy):
    """Against the storage of every tensor; nf4 with its scales."""
    for quantise in ("none", "nf4"):
        policy = make_policy(quantise=quantise)
        size, seen = Footprint(policy), {}
        for p in policy.base.parameters():
            seen[p.data_ptr()] = p.numel() * p.element_size()
        states = [s for p in policy.base.parameters() if (s := getattr(p, "quant_state", None)) is not None]
        assert len(states) == (14 if quantise == "nf4" else 0)
        scales = sum(s.absmax.numel() + 4 * s.state2.absmax.numel() + 4 * (16 + 256) for s in states)
        assert size.weights == sum(seen.values()) - 2 * size.student + scales
        assert size.student == sum(p.numel() * 4 for p in policy.adapter("student").values())
        cache = SlotCache(policy.base)
        assert size.token_cache == cache.token_bytes == 2 * 2 * 2 * 8 * policy.base.dtype.itemsize
    assert Footprint(make_policy(quantise="nf4")).weights < Footprint(make_policy()).weights


def test_a_demand_grows_with_what_it_names(make_policy):
    size = Footprint(make_policy())
    small = Demand(longest=100, micro_batch=100, chunk=16, checkpointing=True)
    assert size.update(small) < size.update(Demand(100, 200, 16, True)) == size.update(Demand(200, 100, 16, True))
    assert size.activations(small) < size.activations(Demand(100, 100, 16, False))
    assert size.logits(small) < size.logits(Demand(100, 100, 32, True)) <= size.logits(Demand(100, 100, 32, True, distributions=True))
    assert size.update(Demand(100, 100, 16, True, grad_norms=True)) == size.update(small) + 3 * size.student


def test_the_cache_gets_what_is_left(make_policy):
    policy, settings = (
        make_policy(gradient_checkpointing=True),
        RolloutSettings(max_rows=8, max_prompt_tokens=300, max_trajectory_tokens=700),
    )
    size, learner = Footprint(policy), module(policy)
    demand = Demand(1000, 64, policy.settings.head_chunk, True)
    update, episode = size.update(demand), 1000 * size.token_cache
    plenty = size.static + max(update, size.prefill(16384)) + 13 * episode
    text, budget = plan(learner, settings, plenty)
    assert budget.keep and budget.rows == 8 and budget.tokens == 1000 and "(8 x 1000 tokens)" in text
    assert text.startswith(f"memory plan, GiB of {plenty / 2**30:.2f}: weights ")
    text, budget = plan(learner, settings, size.static + update)
    assert not budget.keep and "given back before each update" in text
    assert 1 <= budget.rows <= 8 and budget.bytes(size.token_cache) + size.prefill(budget.prefill) <= update


def test_servers_have_a_cache_of_their_own(make_policy):
    """The update alone has to fit: there is no cache of ours, and no prompt is read by the policy."""
    policy = make_policy(gradient_checkpointing=True)
    settings = RolloutSettings(engine="servers", servers=["http://host:1"], max_prompt_tokens=300, max_trajectory_tokens=700)
    size = Footprint(policy, decodes=False)
    budget = size.static + size.update(Demand(1000, 64, policy.settings.head_chunk, True))
    text, _ = plan(module(policy), settings, budget)
    assert "cache" not in text
    with pytest.raises(ConfigError, match="the run needs"):
        plan(module(policy), settings, budget - 1)


def test_too_little_memory_names_what_would_fit(make_policy):
    policy = make_policy(head_chunk=2048)
    settings = RolloutSettings(max_rows=2, max_prompt_tokens=300, max_trajectory_tokens=700)
    size = Footprint(policy)
    wants = Demand(1000, 64, 2048, False)
    eased = Demand(1000, 64, 2048, True)
    assert size.update(eased) < size.update(wants)
    with pytest.raises(ConfigError) as e:
        plan(module(policy), settings, size.static + size.update(eased) + MIB // 2)
    assert "It would fit with: model.policy.gradient_checkpointing=true." in str(e.value)
    assert f"an update of 1000 tokens {size.update(wants) / 2**30:.2f}" in str(e.value)
    with pytest.raises(ConfigError, match=r"policy\.context_length=512, model\.micro_batch_tokens=512\.$"):
        plan(module(policy), settings, size.static + size.update(Demand(512, 512, 256, True)) + MIB // 8)
    small = Demand(1100, 64, 256, True)  # an update fits, an episode's cache does not
    (keys,) = size.fitting_settings(small, lambda e: e.longest <= 600)
    assert keys == {"model.policy.context_length": 512, "model.micro_batch_tokens": 512}
    with pytest.raises(ConfigError, match=r"No setting makes it fit: choose a smaller model\.policy\.model"):
        plan(module(policy), settings, size.static)


def test_a_stepper_stays_within_its_budget(make_policy):
    policy = make_policy()
    budget = CacheBudget(2, 200, False, 64)
    stepper = Stepper(policy, False, None, budget)
    stepper.plan(2, 30)
    first = stepper.cache.capacity
    assert 30 <= first < 200, "room to grow, while there is plenty"
    stepper.plan(3, 199)
    assert (stepper.cache.slots, stepper.cache.capacity) == (3, 256) and len(stepper.state) == 4
    stepper.plan(1, 20)
    with pytest.raises(CacheFull, match="4 rows of 199 tokens do not fit"):
        stepper.plan(4, 199)
    assert stepper.cache.bytes_for(3, 199) == budget.bytes(stepper.cache.token_bytes)


def test_static_shapes_need_whole_buckets(make_policy):
    """Without kernels rows are padded to a power of two: what is less than that is no static cache."""
    policy = make_policy()
    stepper = Stepper(policy, True, None, CacheBudget(3, 200, True, 64))  # 4 slots
    assert not stepper.plan(3, 30) and not stepper.static
    assert (stepper.cache.slots, stepper.cache.capacity) == (3, 64)
    stepper = Stepper(policy, True, None, CacheBudget(6, 300, True, 64))  # 9 slots
    assert stepper.plan(3, 30) and (stepper.cache.slots, stepper.cache.capacity) == (8, 256)
    assert not stepper.plan(9, 300), "16 slots of 512 tokens are more than there is"


def test_no_more_prompts_are_shared_than_the_budget_counts_on(make_policy, monkeypatch):
    """A row for each of two prompts that three others shared: they would take five slots with the two that begin now."""
    policy = make_policy()
    policy.stop_ids = ()
    engine = InProcessEngine(policy)
    session = engine.open(1.0)
    monkeypatch.setattr(session, "_forward", lambda rows, used=True: None)
    session.stepper.budget = CacheBudget(4, 200, True, 64)
    prompts = {name: list(range(5, 10 + i)) for i, name in enumerate("abc")}

    def rows(*names):
        made = [_Row(len(session.rows) + i, session._slot(), feed=list(prompts[n])) for i, n in enumerate(names)]
        session.rows |= {row.name: row for row in made}
        session._share(made)
        return made

    a, b = rows("a", "a"), rows("b", "b")
    assert all(row.prompt for row in (*a, *b)) and session.slots == 6
    session.forget([a[0].name, b[0].name])
    for row in (a[0], b[0]):
        heappush(session.free, row.slot)  # as with kernels
    late = rows("c", "c")
    assert not any(row.prompt for row in late) and session.slots == 6 == session.stepper.budget.slots


def test_what_another_session_left_is_no_reason_to_give_up(make_policy, caplog):
    policy = make_policy()
    policy.stop_ids = ()
    engine = InProcessEngine(policy)
    policy.cache_budget = CacheBudget(2, 250, True, 64)
    settings = RolloutSettings(max_rows=2, max_prompt_tokens=150, max_trajectory_tokens=100, max_turn_tokens=6)
    tasks = make_env(SOKOBAN, KWARGS).tasks("test")[:1]
    collector = Collector(SOKOBAN, KWARGS, Chat(policy.tokenizer, ()), engine, settings, policy.context_length)
    rows = [Episode(tasks[0], member) for member in range(2)]
    want = collector.collect(rows, seed=0, iteration=0)
    stepper, opened = Stepper(policy, False, None, policy.cache_budget), []
    stepper.plan(10, 60)  # many short rows

    def open_(temperature, adapter="student"):
        opened.append(True)
        return InProcessSession(
            policy, stepper if len(opened) == 1 else Stepper(policy, False, None, policy.cache_budget), temperature, adapter
        )

    engine.open = open_
    got = collector.collect(rows, seed=0, iteration=0)
    assert [t.token_ids for t in got] == [t.token_ids for t in want] and len(opened) == 2 and collector.max_rows == 2


def test_a_full_cache_begins_the_rollout_again_with_fewer(make_policy, caplog, monkeypatch):
    policy = make_policy()
    settings = RolloutSettings(max_rows=6, max_prompt_tokens=150, max_trajectory_tokens=100, max_turn_tokens=6)
    tasks = make_env(SOKOBAN, KWARGS).tasks("test")[:3]
    rows = [Episode(t, member) for t in tasks for member in range(2)]

    def collector():
        chat = Chat(policy.tokenizer, policy.stop_ids)
        return Collector(SOKOBAN, KWARGS, chat, InProcessEngine(policy), settings, policy.context_length)

    want, tight = collector().collect(rows, seed=0, iteration=0), collector()
    tight.engine.policy.cache_budget = CacheBudget(2, 250, True, 64)
    got = tight.collect(rows, seed=0, iteration=0)
    assert tight.max_rows == 2 and "begins again with 2 episodes at one time" in caplog.text
    assert [t.token_ids for t in got] == [t.token_ids for t in want]
    caplog.clear()
    tight.collect(rows, seed=0, iteration=1)
    assert not caplog.text
    step, left = InProcessSession.step, [2]  # out of memory with 2 at one time, not with 1

    def scarce(self):
        if len(self.rows) > 1 and (left.append(left.pop() - 1) or left[0] <= 0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self)

    monkeypatch.setattr(InProcessSession, "step", scarce)
    got = tight.collect(rows, seed=0, iteration=0)
    assert tight.max_rows == 1 and "out of memory in the rollout. It begins again with 1" in caplog.text
    assert [t.token_ids for t in got] == [t.token_ids for t in want]
    monkeypatch.setattr(InProcessSession, "step", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        tight.collect(rows, seed=0, iteration=0)
    monkeypatch.undo()
    tight.engine.policy.cache_budget = CacheBudget(1, 10, True, 64)  # less than a plan would allow
    with pytest.raises(CacheFull):
        tight.collect(rows, seed=0, iteration=0)


def test_many_turns_are_played_with_as_many_rows_as_fit(make_policy, monkeypatch):
    """The budget takes three rows of 64 tokens, one of 192, and none of 300; sessions end as they should in between."""
    policy, opened = make_policy(), []
    policy.stop_ids = ()
    requests = [Request(i, [5 + i] * n, i, 0, 4) for i, n in enumerate((10, 10, 150, 10, 10, 300, 10))]
    engine, close = InProcessEngine(policy), InProcessSession.close
    want = complete(engine, requests, 1.0, "student", 8)
    policy.cache_budget = CacheBudget(2, 64, True, 64)
    monkeypatch.setattr(InProcessSession, "close", lambda self, failed=False: (opened.append(failed), close(self, failed)))
    got = complete(engine, requests, 1.0, "student", 8)
    assert got[5] is None and [c and c.token_ids for c in got] == [c.token_ids if i != 5 else None for i, c in enumerate(want)]
    assert True in opened and opened[-1] is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_available_memory_follows_the_fraction():
    from skillsd.callbacks.memory import available

    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(0.05, device)
    try:
        assert available(device) == int(total * 0.05)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
