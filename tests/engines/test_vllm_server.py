"""The engine on servers, against fake ones: the in-process engine's tokens and log-probs, whatever servers come, go and say."""

import gc
import json
import logging
import threading
import time
from pathlib import Path

import pytest
from tests.conftest import randomise_adapters
from tests.engines.fake_server import FakeServer, serving
from tests.engines.test_engine import assert_scored_alike, play
from tests.tolerance import ROUNDING

from skillsd.engines import vllm_server as module
from skillsd.engines.engine import Request
from skillsd.engines.in_process import InProcessEngine
from skillsd.engines.make_engine import make_engine
from skillsd.engines.vllm_noise import Noise
from skillsd.engines.vllm_server import VllmServers
from skillsd.errors import ConfigError
from skillsd.policy import Policy
from skillsd.rollout import RolloutSettings


@pytest.fixture
def policy(make_policy):
    return make_policy()


@pytest.fixture
def two(policy):
    with serving(policy.settings.model, 2) as servers:
        yield servers


@pytest.fixture
def engine(policy, two):
    made = VllmServers(policy, [s.url for s in two], rows=6)
    yield made
    made.close()


def alike(a, b):
    """The same tokens, and log-probs up to rounding."""
    for (x, p), (y, q) in zip(a, b, strict=True):
        assert x == y and p == pytest.approx(q, abs=ROUNDING)


def test_equals_the_default_engine(policy, two, engine):
    """Several turns, rows that join and leave, two servers, three adapters, temperatures."""
    for adapter, temperature in (("student", 1.0), ("teacher", 0.7), (None, 0.0)):
        alike(*(play(policy, adapter, temperature, engine=e, slots=4) for e in (engine, InProcessEngine(policy))))
    assert all(s.asked for s in two) and [s.loads for s in two] == [two[0].loads] * 2


def test_rows_stay_and_spread(two, engine):
    """New rows to who has fewest, ties in the list's order; a row's next turn to its own server."""

    def prompts(s):
        return sorted(b["prompt"][0] for b in s.asked if b["model"] != "base")

    session = engine.open(1.0)
    session.turn([Request(i, [10 + i, 6], i, 0, 2) for i in range(5)])
    assert [prompts(s) for s in two] == [[10, 12, 14], [11, 13]]
    session.forget([0, 2])
    session.turn([Request(7, [17, 6], 7, 0, 2), Request(3, [9], 3, 3, 2)])
    assert [prompts(s) for s in two] == [[10, 12, 14, 17], [11, 13, 13]]
    assert len(two[1].asked[-1]["prompt"]) == 5, "all that the row has seen and sampled"


def test_each_rank_begins_with_another_server(policy, two, monkeypatch):
    monkeypatch.setattr("skillsd.parallel.rank", lambda: 3)
    engine = VllmServers(policy, [s.url for s in two])
    engine.open(1.0).turn([Request(i, [10 + i, 6], i, 0, 2) for i in range(3)])
    assert [sorted(b["prompt"][0] for b in s.asked if b["model"] != "base") for s in two] == [[11], [10, 12]]
    engine.close()


def test_a_turn_sends_prompt_key_position_and_limits(policy, two, engine):
    key = -(2**63) + 1  # more than JSON's numbers hold elsewhere
    engine.open(0.7).turn([Request(0, [5, 6], key, 3, 2)])
    body = two[0].asked[-1]
    assert body["vllm_xargs"] == {"skillsd_key": str(key), "skillsd_position": 3, "skillsd_temperature": 0.7}
    assert body["stop_token_ids"] == sorted(policy.stop_ids) and body["max_tokens"] == 2 and body["prompt"] == [5, 6]


def test_an_update_is_pushed(policy, two, engine):
    """Once, under a new name; the version before goes when nobody uses it, from the servers and from the disk."""
    folder = engine.versions.folder
    held = engine.open(1.0)
    (first,) = two[0].adapters
    engine.open(1.0)
    randomise_adapters(policy, 1)
    alike(play(policy, engine=engine), play(policy, engine=InProcessEngine(policy)))
    assert [s.loads for s in two] == [two[0].loads] * 2 and len(two[0].loads) == 2 and first in two[0].adapters
    (old,) = held.turn([Request(0, [5, 6, 7], 0, 0, 6)])
    (new,) = engine.open(1.0).turn([Request(0, [5, 6, 7], 0, 0, 6)])
    assert old.logprobs != new.logprobs
    del held
    gc.collect()
    randomise_adapters(policy, 2)
    engine.open(1.0)
    assert all(first in s.unloads and len(s.adapters) == 1 for s in two)
    assert [p.name for p in folder.iterdir()] == list(two[0].adapters)
    engine.close()
    assert not any(s.adapters for s in two) and not folder.exists()


def test_a_snapshot_keeps_an_adapter_as_it_was(policy, engine):
    """In sessions of another thread, while it is learned on."""
    snapshot, before = engine.snapshot("student"), play(policy, engine=engine)
    randomise_adapters(policy, 3)
    after = []
    thread = threading.Thread(target=lambda: after.extend(play(policy, snapshot, engine=engine)))
    thread.start()
    now = play(policy, engine=engine)
    thread.join()
    alike(before, after)
    assert_scored_alike(policy, "student", now)
    with pytest.raises(AssertionError):
        assert_scored_alike(policy, "student", after)


def test_turns_of_a_killed_server_are_asked_of_another(policy, two, engine, caplog, monkeypatch):
    """In the middle of turns: they are asked again of the other, with the same tokens; one line; and it is welcome back."""
    dying, n = two[1], []

    def before(body):
        n.append(body)
        if len(n) == 3:
            threading.Thread(target=dying.kill).start()
            time.sleep(0.05)

    dying.before = before
    with caplog.at_level(logging.WARNING):
        played = play(policy, engine=engine, slots=4)
        alike(played, play(policy, engine=InProcessEngine(policy), slots=4))
        assert dying.dead and [f"{dying.url} is lost (" in r.message and "; 1 left" in r.message for r in caplog.records] == [True]
        monkeypatch.setattr(module, "RETRY_S", 0.0)
        engine.open(1.0)
        again = FakeServer(dying.model, port=dying.port)
        monkeypatch.setattr(module, "RETRY_S", 60.0)
        engine.open(1.0)
        assert not again.asked, "not so soon"
        monkeypatch.setattr(module, "RETRY_S", 0.0)
        try:
            alike(played, play(policy, engine=engine, slots=4))
        finally:
            again.kill()
        assert again.loads and again.asked and [r.message for r in caplog.records[1:]] == [f"data.rollout.servers: {dying.url} is back."]


def test_losing_all_servers_is_an_error(two, engine):
    session = engine.open(1.0)
    session.submit([Request(0, [5, 6], 0, 0, 2)])
    for s in two:
        s.kill()
        s.before = lambda body: (_ for _ in ()).throw(ConnectionAbortedError)
    with pytest.raises(ConfigError, match=rf"rollout\.servers: no server is left \({two[0].url}: .*; {two[1].url}: .*\): start one"):
        session.submit([Request(i, [5, 6], i, 0, 40) for i in range(1, 5)])
        while session.busy:
            session.step()


def test_none_is_left_for_a_moment(two, engine):
    """Then all are asked again, however short ago."""
    for s in engine.servers:
        engine.drop(s, s.joined, "test")
    engine.open(1.0).turn([Request(0, [5, 6], 0, 0, 2)])
    assert all(s.live for s in engine.servers)


def test_a_server_that_has_forgotten_the_adapter(policy, two, engine):
    """Started anew in no time, or unloaded by somebody else: the adapter is loaded once more."""
    session = engine.open(1.0)
    for s in two:
        s.adapters.clear()
    session.turn([Request(i, [5, 6], i, 0, 2) for i in range(4)])
    assert all(len(s.loads) == 2 and s.asked for s in two)


def test_adapters_that_a_killed_run_has_left(policy, two, tmp_path):
    """vLLM reads a folder again when other adapters have displaced it, and its engine dies of one that is gone: they are unloaded."""
    two[0].adapters |= {"skillsd-of-a-killed-run": str(tmp_path / "gone"), "somebody-elses": "/not/here"}
    engine = VllmServers(policy, [s.url for s in two])
    first = play(policy, engine=engine)
    assert two[0].unloads == ["skillsd-of-a-killed-run"] and "somebody-elses" in two[0].adapters
    name = next(n for n in two[0].adapters if n.startswith("skillsd-"))
    for server in engine.servers:  # one of the very name, of which this engine does not know
        server.loaded.clear()
    two[0].adapters[name] = str(tmp_path / "gone")
    alike(first, play(policy, engine=engine))
    assert two[0].unloads[1:] == [name] and Path(two[0].adapters[name]).is_dir()
    engine.close()


def test_ranks_share_servers_and_a_folder(policy, two, tmp_path):
    """Whoever is first writes and loads a version; the name is its content's."""
    a, b = (VllmServers(policy, [s.url for s in two], folder=str(tmp_path)) for _ in range(2))
    alike(play(policy, engine=a, rows=3), play(policy, engine=b, rows=3))
    assert all(len(s.loads) == 1 for s in two) and [p.name for p in tmp_path.iterdir()] == two[0].loads
    a.close(), b.close()


def test_a_rank_that_is_slow(policy, two, tmp_path):
    """Two updates ahead, a rank keeps what the slowest may still play with, and no more."""
    fast, slow = (VllmServers(policy, [s.url for s in two], folder=str(tmp_path), staleness=2) for _ in range(2))
    before, snapshot = play(policy, engine=fast, rows=3), slow.snapshot("student")
    for seed in (1, 2):
        randomise_adapters(policy, seed)
        fast.open(1.0)
    alike(play(policy, snapshot, engine=slow, rows=3), before)
    assert not any(s.unloads for s in two)
    for s in two:
        s.adapters.clear()  # one that was started anew needs the folder
    alike(play(policy, snapshot, engine=slow, rows=3), before)
    randomise_adapters(policy, 3)
    fast.open(1.0)
    assert not snapshot.folder.exists() and len(list(tmp_path.iterdir())) == 3
    fast.close(), slow.close()


def test_runs_share_servers_and_a_folder(make_policy, two, tmp_path):
    """With the same weights, too: what one removes at its end the others go on with. Another scale is another adapter."""
    policy, other = make_policy(), make_policy(lora={"alpha": 64})
    settings = RolloutSettings(engine="servers", servers=[s.url for s in two], servers_folder=str(tmp_path))
    a, b, c = (make_engine(p, settings, run) for p, run in ((policy, "a"), (policy, "b"), (other, "b")))
    snapshot, before = b.snapshot("student"), play(policy, engine=b, rows=3)
    assert len({e.snapshot("student").name for e in (a, b, c)}) == 3
    alike(play(policy, engine=a, rows=3), before)
    a.close(), c.close()
    for s in two:
        s.adapters.clear()
    alike(play(policy, snapshot, engine=b, rows=3), before)
    b.close()
    assert not list(tmp_path.iterdir())


def body(tokens, logprobs, n=1):
    return json.dumps({"choices": [{"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}] * n}).encode()


HOSTILE = {
    "fewer log-probs": (body([5, 6], [-1.0]), "2 tokens and 1 log-probs"),
    "too many tokens": (body([5] * 9, [-1.0] * 9), "9 tokens"),
    "too few": (body([5], [-1.0]), "ended a turn after 1 of 2 tokens"),
    "none": (body([], []), "0 tokens"),
    "no such id": (body([5, 10**9], [-1.0, -1.0]), "tokens that are none"),
    "ids that are true": (body([True, 5], [-1.0, -1.0]), "tokens that are none"),
    "past a stop": (body([4, 5], [-1.0, -1.0]), "2 tokens"),
    "nan": (b'{"choices": [{"token_ids": [5, 5], "logprobs": {"token_logprobs": [NaN, -1.0]}}]}', "log-probs that are none"),
    "null": (body([5, 5], [None, -1.0]), "log-probs that are none"),
    "above 0": (body([5, 5], [3.0, -1.0]), "log-probs that are none"),
    "two choices": (body([5, 5], [-1.0, -1.0], 2), "no completion"),
    "no JSON": (b"<html>", "no completion"),
    "deep": (b"[" * 60_000, "no completion"),
    "control characters": ((500, b"\x1b[2J\nfatal"), r"status 500: \\x1b\[2J fatal"),
    "huge": (b" " * (1 << 20), r"more than \d+ bytes"),
    "cut": ("cut", "IncompleteRead|cut short"),
    "no HTTP": ("garbage", "BadStatusLine"),
    "slow": ("slow", r"no answer in 0\.3 s"),
    "drip": ("drip", r"no answer in 0\.3 s"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_server(policy, two, caplog, kind, monkeypatch):
    """It is dropped, the log says why in one line, and the other one serves."""
    monkeypatch.setattr(module, "HANDSHAKE_S", 0.3)
    answer, why = HOSTILE[kind]
    over = threading.Event()

    def bad(handler):
        if answer == "cut":
            handler.raw(200, b"{", length=500)
            handler.close_connection = True
        elif answer == "garbage":
            handler.wfile.write(b"hello\r\n\r\n")
            handler.close_connection = True
        elif answer == "slow":
            over.wait(5)
        elif answer == "drip":
            handler.raw(200, b"", length=500)
            while not over.wait(0.05):
                handler.wfile.write(b" ")
        elif isinstance(answer, tuple):
            handler.raw(*answer)
        else:
            handler.raw(200, answer)

    engine = VllmServers(policy, [s.url for s in two], seconds=0.3 if kind in ("slow", "drip") else 60.0)
    two[0].broken["/v1/completions"] = bad
    requests = [Request(i, [5, 6], i, 0, 2) for i in range(2)]
    try:
        with caplog.at_level(logging.WARNING):
            said = engine.open(1.0).turn(requests)
        assert [c.token_ids for c in said] == [c.token_ids for c in InProcessEngine(policy).open(1.0).turn(requests)]
        (record,) = caplog.records
        assert record.message.startswith(f"data.rollout.servers: {two[0].url} is lost (") and record.message.isprintable()
        caplog.clear()
        with pytest.raises(ConfigError, match=why):
            two[1].broken["/v1/completions"] = bad
            engine.open(1.0).turn(requests)
    finally:
        over.set()
        engine.close()


def test_a_log_prob_that_is_nan(policy, two, engine):
    """Broken weights give such an answer, which the collector counts as the model's failure, and no server's fault."""
    logits, session = two[0].model.logits, engine.open(1.0)
    two[0].model.logits = lambda *a: logits(*a) * float("nan")
    (said,) = session.turn([Request(0, [5, 6], 0, 0, 1)])
    assert said.logprobs[0] != said.logprobs[0] and all(s.live for s in engine.servers)


def test_servers_that_are_started_otherwise(policy, two):
    """Without our noise, with other log-probs, with another vocabulary or too short rows: refused at the start, with the fix."""

    def refused(why, **settings):
        with pytest.raises(ConfigError, match=why):
            VllmServers(policy, [two[0].url], **settings)

    two[0].processor = lambda: type("None", (), {"update_state": lambda self, update: None})()
    refused("does not draw with our noise")
    two[0].mode = "raw_logprobs"
    refused("does not draw with our noise")
    two[0].processor, two[0].mode = Noise, "processed_logits"
    two[0].model.context = 100
    refused("its --max-model-len 100 is below model.policy.context_length 1024: change either")
    two[0].broken["/v1/models"] = lambda handler: handler.raw(200, b'{"data": [{"id": 3}]}')
    refused("no list of models")
    two[0].broken["/health"] = lambda handler: handler.raw(503, b"")
    refused("status 503")
    two[0].kill()
    refused("ConnectionRefusedError")


def test_an_adapter_that_a_server_refuses(policy, two, engine):
    two[0].broken["/v1/load_lora_adapter"] = lambda handler: handler.say(500, {"error": {"message": "LoRA rank 4 is greater than 2"}})
    engine.open(1.0).turn([Request(0, [5, 6], 0, 0, 2)])
    assert [s.live for s in engine.servers] == [False, True] and "LoRA rank 4 is greater than 2" in engine.servers[0].reason


def test_the_api_key_is_sent_and_never_shown(policy, monkeypatch):
    monkeypatch.setenv("SERVERS", "sesame-sesame")
    with serving(policy.settings.model, key="sesame-sesame") as (s,):
        VllmServers(policy, [s.url + "/v1/"], key_env="SERVERS").close()
        s.broken["/health"] = lambda handler: handler.raw(400, handler.headers["Authorization"].encode())
        with pytest.raises(ConfigError, match=r"status 400: Bearer \[SERVERS\]"):
            VllmServers(policy, [s.url], key_env="SERVERS")
        with pytest.raises(ConfigError, match="status 401"):
            del s.broken["/health"]
            VllmServers(policy, [s.url])
    monkeypatch.delenv("SERVERS")
    with pytest.raises(ConfigError, match=r"servers_key_env: the environment variable SERVERS is not set"):
        VllmServers(policy, [s.url], key_env="SERVERS")
    with pytest.raises(ConfigError, match="act with adapters only"):
        VllmServers(Policy(policy.settings, adapters=False), [s.url])


def test_a_session_that_ends_in_the_middle_of_a_turn_leaves_nothing(policy, two, engine):
    """A session that ends in the middle of a turn: nothing of it goes on, and `close` waits for nobody."""
    hold = threading.Event()
    for s in two:
        s.before = lambda body: hold.wait(5)
    with engine.open(1.0) as session:
        session.submit([Request(i, [5, 6, 7], i, 0, 5) for i in range(4)])
        session.step()
    for s in two:
        s.before = lambda body: None
    alike(play(policy, engine=engine, rows=3), play(policy, engine=InProcessEngine(policy), rows=3))
    assert not engine._turns and all(s.live for s in engine.servers)
    hold.set()
    held = engine.open(1.0)
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        held.submit([Request(0, [5], 0, 0, 1)])


def test_closing_with_turns_that_wait(policy, two, caplog):
    """For a thread that hears nothing, as while it connects: a session elsewhere ends, and nobody complains of it."""
    engine, said, over = VllmServers(policy, [s.url for s in two], rows=1), [], threading.Event()
    session = engine.open(1.0)
    engine.threads.submit(lambda: over.wait(3))
    session.submit([Request(i, [5, 6], i, 0, 2) for i in range(2)])

    def work():
        try:
            while session.busy and not over.is_set():
                session.step()
        except RuntimeError as e:
            said.append(str(e))
        over.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    engine.close()
    over.set()
    thread.join()
    assert said == ["the engine is closed"] and not caplog.records


@pytest.mark.parametrize(
    "said, settings",
    [
        (r"rollout\.servers is empty: give the servers' addresses", dict(engine="servers")),
        (r"rollout\.servers has addresses, and data\.rollout\.engine is default: set it to servers", dict(servers=["http://a:1"])),
        (r"rollout\.servers\[1\] is no http://host:port", dict(engine="servers", servers=["http://a:1", "http://me:secret@a:1"])),
        (r"names a server twice", dict(engine="servers", servers=["http://a:1"] * 2)),
        (r"names a server twice", dict(engine="servers", servers=["http://a:1", "http://a:1/v1/"])),
        (r"servers_key_env is the name", dict(engine="servers", servers=["http://a:1"], servers_key_env="sk-123")),
        (r"servers_timeout is 0", dict(engine="servers", servers=["http://a:1"], servers_timeout=0.0)),
        (r"staleness is -1", dict(staleness=-1)),
        (r"staleness is 1, and data\.rollout\.engine is default.*set data\.rollout\.engine to servers", dict(staleness=1)),
        (r"staleness is 1.*set data\.rollout\.env_workers to 1", dict(staleness=1, engine="servers", servers=["http://a:1"])),
    ],
)
def test_settings_are_checked(said, settings):
    with pytest.raises(ConfigError, match=said) as e:
        RolloutSettings(**settings)
    assert "secret" not in str(e.value) and "sk-123" not in str(e.value)
