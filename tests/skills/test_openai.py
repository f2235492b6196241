"""Against a real HTTP server that speaks the chat-completions format, well or badly."""

import gzip
import inspect
import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from skillsd.errors import ConfigError
from skillsd.skills import OpenAISummariser, Summariser
from skillsd.skills.summarisers import SYSTEM_PROMPT, USER_PROMPT
from skillsd.skills.summarisers.endpoint import _retry_after_s

pytest.importorskip("openai")

ANSWER = json.dumps({"success_analysis": "s", "mistake_analysis": "m", "golden_workflow": "w"})
CONTENTS = {
    "chat": "I cannot.",
    "empty": None,
    "fence": f"```json\n{ANSWER}\n```",
    "prose": f"The agent printed {{title, artist}} and then f'{{x}}'.\n\n{ANSWER}",
    "parts": [{"type": "thinking", "thinking": "{}"}, {"type": "text", "text": ANSWER[:9]}, {"type": "text", "text": ANSWER[9:]}],
    "thoughts": f"<think>A draft: {ANSWER}</think>\n<think>Another: {ANSWER}</think>{ANSWER}",
    "both": f"Here it is:\n```json\n{ANSWER}\n```\nI hope that {{it}} helps.",
}
"""What the server's model says at a step; at others it says ANSWER."""


class Server(ThreadingHTTPServer):
    """`plan[task]` is the list of what to do at each try of that task; the last entry repeats. A status may come with its Retry-After."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.tries, self.lock, self.stop = {}, {}, threading.Lock(), threading.Event()
        self.bodies, self.busy, self.most, self.refusal = [], 0, 0, "refused"
        self.hung_up = threading.Event()  # a client has closed a connection

    def shutdown_request(self, request):
        super().shutdown_request(request)
        self.hung_up.set()

    def step(self, body):
        text = body["messages"][-1]["content"]
        task = next((task for task in self.plan if f"task={task}." in text), "")
        with self.lock:
            self.bodies.append(body)
            count = self.tries[task] = self.tries.get(task, 0) + 1
        plan = self.plan.get(task, ["good"])
        return plan[min(count, len(plan)) - 1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self.send_error(404)
            return
        assert body["model"] == "m" and self.headers["Accept-Encoding"] == "identity"
        step, status, kind = self.server.step(body), 200, "application/json"
        step, retry_after = step if isinstance(step, tuple) else (step, None)
        message = {"role": "assistant", "content": CONTENTS.get(step, ANSWER)}
        if step == "reasoning":
            message |= {"content": None, "reasoning_content": "Let me see."}
        data = {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip
        if step == "cut":
            data["choices"][0] = {"finish_reason": "length", "message": {"content": ANSWER[:-9]}}
        elif step == "no choices":
            data["choices"] = []
        payload = json.dumps(data).encode()
        if isinstance(step, int):
            status, payload = step, json.dumps({"error": {"message": self.server.refusal}}).encode()
        elif step == "hang":
            self.server.stop.wait(20)
            return
        elif step == "html":
            payload, kind = b"<html>garbage</html>", "text/html"
        elif step == "broken":
            payload = b'{"choices": ['
        elif step == "stream":
            payload, kind = b'data: {"choices": []}\n\ndata: [DONE]\n\n', "text/event-stream"
        elif step == "packed":
            payload = gzip.compress(payload)
        elif step in ("full", "over"):  # 1 MiB, and a byte more
            payload = payload.ljust((1 << 20) + (step == "over"))
        elif step == "nap":
            with self.server.lock:
                self.server.busy += 1
                self.server.most = max(self.server.most, self.server.busy)
            time.sleep(0.05)
            with self.server.lock:
                self.server.busy -= 1
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(payload)))
        if step == "packed":
            self.send_header("Content-Encoding", "gzip")
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        if step == "drip":  # a byte now and then: no socket time-out ever fires
            for byte in payload:
                if self.server.stop.wait(0.1):
                    return
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
            return
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def make(server):
    made = []

    def make(**settings):
        settings = {"timeout_s": 5.0, "retries": 2, "backoff_s": 0.01, "max_workers": 4, **settings}
        made.append(OpenAISummariser("m", f"http://127.0.0.1:{server.server_port}/v1", **settings))
        return made[-1]

    yield make
    for summariser in made:
        summariser.close()


@pytest.fixture
def workers():
    """The summarisers' threads that this test began and that still live."""
    before = set(threading.enumerate())
    return lambda: [t for t in threading.enumerate() if t.name == "summariser" and t not in before]


def eventually(condition):
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def group(make_trajectory):
    def group(*tasks, members=1):
        return [make_trajectory(task, member, instruction=f"task={task}.") for task in tasks for member in range(members)]

    return group


def test_success_in_order(make, group):
    summariser = make()
    assert isinstance(summariser, Summariser) and summariser.asynchronous
    summariser.submit(4, group("b", "a", members=2)[::-1])
    summariser.submit(5, group("c"))
    assert len(summariser.collect(block=True)) == 2 and summariser.collect() == []
    summariser.submit(6, group("b", "a", members=2)[::-1])
    summariser.drain()
    ((iteration, skills, n_failed),) = summariser.collect()
    assert (iteration, n_failed) == (6, 0) and skills[0].texts == ("s", "m", "w")
    assert [(skill.task_id, skill.source_member) for skill in skills] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


@pytest.mark.parametrize("bad", [500, 429, 408, 409, "chat", "empty", "html", "broken", "packed", "reasoning", "no choices", "cut"])
def test_tries_again_then_counts_and_says_why(make, group, server, caplog, bad):
    server.plan = {"once": [bad, "good"], "ever": [bad]}
    summariser = make()
    assert summariser.last_error == ""
    once, ever = summariser.summarise(group("once", "ever"))
    assert once.task_id == "once" and ever is None and summariser.last_error
    assert server.tries == {"once": 2, "ever": 3}
    assert eventually(lambda: caplog.messages) == [f"no skill from ever, member 0: {summariser.last_error}"]


def test_a_response_has_at_most_a_mebibyte(make, group, server):
    server.plan = {"a": ["full"], "b": ["over"]}
    summariser = make(retries=0)
    assert [skill.task_id for skill in summariser.summarise(group("a"))] == ["a"] and not server.hung_up.is_set()
    assert summariser.summarise(group("b")) == [None] and server.hung_up.wait(5)  # no connection is left with bytes in it


def test_the_wait_doubles_and_is_the_own_one_where_the_server_asks_for_none(make, group, server, monkeypatch):
    server.plan = {"a": [500], "b": [(503, "0.5"), "broken"], "c": ["broken"]}
    for task, backoff_s, least in (("a", 0.08, [0.08, 0.16, 0.32]), ("b", 0.01, [0.5, 0.02, 0.04]), ("c", 0.01, [0.01, 0.02, 0.04])):
        summariser, waits = make(retries=3, backoff_s=backoff_s), []
        monkeypatch.setattr(summariser._closed, "wait", waits.append)
        assert summariser.summarise(group(task)) == [None] and waits == least


def test_as_many_requests_at_a_time_as_workers_which_end_on_close(make, group, server, workers):
    server.plan = {task: ["nap"] for task in "abcdef"}
    summariser = make(max_workers=2)
    summariser.submit(0, group("a", "b", "c"))
    summariser.submit(1, group("d", "e", "f"))
    summariser.drain()
    assert server.most == len(workers()) == 2 and all(t.daemon for t in workers())  # a hanging server keeps no process from ending
    assert not server.hung_up.is_set()
    summariser.close()
    assert eventually(lambda: not workers()) and server.hung_up.wait(5)


@pytest.mark.parametrize("step", ["fence", "prose", "both", "parts", "thoughts"])
def test_the_object_may_stand_in_a_fence_or_after_prose_or_thoughts_or_in_parts(make, group, server, step):
    server.plan = {"a": [step]}
    (skill,) = make(retries=0).summarise(group("a"))
    assert skill.texts == ("s", "m", "w")


def test_the_request_holds_rules_task_and_end_of_forty_turns(make, make_trajectory, server):
    rules = "RULES-BEGIN" + " one python block a turn;" * 160 + " RULES-END"
    page = json.dumps([{"song_id": i, "title": "{conversation}", "note": 'say "golden_workflow": {}'} for i in range(70)])
    answer = "I print a page.\n```python\nprint(apis.spotify.show_song_library(page_index={}))\n```"
    end = 'I am done.\n```python\napis.supervisor.complete_task(answer="Song {9}")\n```'
    pairs = [("TASK-BEGIN the most played song? TASK-END", answer), *[(page, answer)] * 38, (page, end)]
    assert 4_000 < len(rules) < 4_200 and 5_000 < len(page) <= 6_000
    (skill,) = make(max_chars=12_000, request={"temperature": 0.5, "max_tokens": 600}).summarise(
        [make_trajectory(pairs=pairs, instruction=rules, completion=0.25)]
    )
    (body,) = server.bodies
    system, user = (message["content"] for message in body["messages"])
    text = user.partition("<conversation>\n")[2].rpartition("\n</conversation>")[0]
    assert skill.texts == ("s", "m", "w") and (body["temperature"], body["max_tokens"]) == (0.5, 600) and "analyst" in system
    for part in (rules, "TASK-BEGIN the most played song? TASK-END", answer, end, "[Turn 40: agent]", "left out]"):
        assert part in text
    assert 10_000 < len(text) <= 12_000 and len(user) <= 12_000 + 1_800
    assert "Completion rate: 25%" in user and "Number of steps: 40" in user


def test_retry_after_is_waited_for(make, group, server):
    server.plan = {"a": [(429, "0.5"), "good"], "b": [(503, "0.5"), "good"], "c": [(429, "soon"), "good"]}
    summariser, start = make(), time.monotonic()
    assert [skill.task_id for skill in summariser.summarise(group("c"))] == ["c"] and time.monotonic() - start < 0.4
    start, used = time.monotonic(), time.thread_time()
    assert [skill.task_id for skill in summariser.summarise(group("a", "b"))] == ["a", "b"]
    assert 0.5 <= time.monotonic() - start < 2 and server.tries == {"a": 2, "b": 2, "c": 2}
    assert time.thread_time() - used < 0.1  # it does not wait busily


def test_retry_after_is_waited_for_no_longer_than_a_try_and_is_not_counted_as_lateness(make, group, server):
    server.plan = {"a": [(429, "3600"), (429, "3600"), "good"]}
    summariser, start = make(timeout_s=0.6), time.monotonic()
    summariser.limit_s = 0.5  # the two waits alone take longer
    (skill,) = summariser.summarise(group("a"))
    assert skill.task_id == "a" and 1.2 <= time.monotonic() - start < 3


def test_retry_after_as_text():
    read = {text: _retry_after_s({"retry-after": text}) for text in ("2", "1.5", "-3", "nan", "", "soon", formatdate(0, usegmt=True))}
    assert list(read.values()) == [2.0, 1.5, 0.0, 0.0, 0.0, 0.0, 0.0] and _retry_after_s({}) == 0.0
    assert 50 < _retry_after_s({"retry-after": formatdate(time.time() + 60, usegmt=True)}) <= 60


def test_a_wrong_key_is_not_tried_again(make, group, server):
    server.plan, server.refusal = {"a": [401]}, "x" * 600
    summariser = make()
    assert summariser.summarise(group("a")) == [None] and server.tries == {"a": 1} and "401" in summariser.last_error
    assert len(summariser.last_error) < 500  # a server may say more than a log should hold


def test_time_limit_and_whole_iterations(make, group, server):
    server.plan = {"slow": ["hang", "good"], "dead": ["hang"]}
    summariser = make(timeout_s=0.4, retries=1)
    start = time.monotonic()
    summariser.submit(0, group("slow", "dead", "fine"))
    summariser.submit(1, group("fine"))
    assert time.monotonic() - start < 0.3
    time.sleep(0.2)
    assert summariser.collect() == []  # iteration 1 is ready, but does not overtake
    summariser.drain()
    first, second = summariser.collect()
    assert [skill.task_id for skill in first.skills] == ["fine", "slow"] and first.n_failed == 1
    assert (second.iteration, second.n_failed) == (1, 0)
    assert time.monotonic() - start < 5


def test_a_dripping_server_is_given_up_and_does_not_block_the_rest(make, group, server):
    server.plan = {"a": ["drip"]}
    summariser = make(timeout_s=0.5, retries=0, max_workers=1)
    summariser.limit_s = 0.8
    summariser.submit(0, group("a", "b"))
    start = time.monotonic()
    ((_, skills, n_failed),) = summariser.collect(block=True)
    assert [skill.task_id for skill in skills] == ["b"] and n_failed == 1 and time.monotonic() - start < 4


def test_own_waits_do_not_move_the_limit_and_who_is_given_up_is_replaced(make, group, server, workers):
    server.plan = {"a": [500, "drip"]}
    summariser = make(timeout_s=0.3, retries=1, backoff_s=0.1, max_workers=1)
    summariser.limit_s = 0.45
    assert summariser.summarise(group("a")) == [None] and "given up" in summariser.last_error
    assert len(workers()) == 2
    server.stop.set()
    assert eventually(lambda: len(workers()) == 1)


def test_close_gives_up(make, group, server, caplog):
    server.plan = {"a": ["hang"]}
    summariser = make(max_workers=1)
    summariser.submit(0, group("a", "b"))
    summariser.close()
    summariser.close()
    assert summariser.collect() == [(0, [], 2)] and summariser.last_error == "closed" and not caplog.messages
    with pytest.raises(RuntimeError, match="closed"):
        summariser.submit(1, group("a"))


def test_no_server_is_a_failure_not_an_error(group):
    summariser = OpenAISummariser("m", "http://127.0.0.1:9/v1", retries=1, backoff_s=0.0)
    assert summariser.summarise(group("a")) == [None]
    summariser.close()


def test_what_cannot_pass_is_asked_once(make, group, server):
    server.plan = {"a": ["stream"], "b": [404]}
    summariser = make()
    assert summariser.summarise(group("a", "b")) == [None, None] and server.tries == {"a": 1, "b": 1}
    summariser = make(request={"temperatur": 1})  # no argument of the client's
    assert summariser.summarise(group("a")) == [None] and server.tries["a"] == 1
    assert "TypeError" in summariser.last_error and "temperatur" in summariser.last_error


def test_a_cut_answer_is_named_with_the_key_that_raises_the_limit(make, group, server):
    server.plan = {"a": ["cut"]}
    for request, key in (({}, "request.max_tokens"), ({"max_completion_tokens": 7}, "request.max_completion_tokens (it is 7)")):
        summariser = make(request=request, retries=0)
        assert summariser.summarise(group("a")) == [None] and key in summariser.last_error


# -- the request before a run -------------------------------------------------------------------------------------------------


def test_a_server_that_answers_is_asked_once_and_briefly(make, server):
    make(request={"max_tokens": 9}).check_ready()
    (body,) = server.bodies
    assert body["max_tokens"] == 9 and len(str(body)) < 1000


@pytest.mark.parametrize(
    ("step", "says", "tries"),
    [
        (401, "status 401", 1), (404, "status 404", 1), (429, "status 429", 3), (500, "status 500", 3), ("html", "<html>garbage</html>", 1),
        ("stream", "event stream", 1), ("no choices", "choices", 1), ("empty", "no text", 1), ("reasoning", "11 characters", 1),
        ("broken", "no JSON", 1), ("packed", "compressed", 1), ("over", "bytes", 1), ("hang", "timeout_s", 1),
    ],
)  # fmt: skip
def test_a_server_that_does_not_is_refused_with_the_reason(make, server, step, says, tries):
    server.plan = {"": [step]}
    with pytest.raises(ConfigError, match=r"skills\.summariser") as refused:
        make(timeout_s=0.5).check_ready()
    assert says in str(refused.value) and server.tries == {"": tries}
    assert "\n" not in str(refused.value) and f"127.0.0.1:{server.server_port}" in str(refused.value)


def test_a_server_that_drips_is_refused_in_the_time_of_a_try(make, server):
    server.plan = {"": ["drip"]}
    with pytest.raises(ConfigError, match="given up"):
        make(timeout_s=0.3, backoff_s=0.0).check_ready()


def test_the_reason_holds_no_key(make, server, monkeypatch):
    key = "sk-planted-Zq83hTnv0LxWm5RbYd2KcJ7u"
    monkeypatch.setenv("A_KEY", key)
    server.plan, server.refusal = {"": [401]}, "x" * 260 + f"no such key: {key}"  # the excerpt ends within it
    with pytest.raises(ConfigError, match="status 401") as refused:
        make(api_key_env="A_KEY").check_ready()
    assert not any(key[at : at + 8] in str(refused.value) for at in range(len(key) - 7))


def test_a_wrong_address_is_refused_at_once_with_every_cause(make, server):
    port = server.server_port
    for url, says in (
        ("http://127.0.0.1:9/v1", "Connection error.*ConnectError.*[Rr]efused"),
        (f"https://127.0.0.1:{port}/v1", "Connection error.*ConnectError.*SSL"),
        (f"http://127.0.0.1:{port}", "status 404.*/v1"),
    ):
        summariser = OpenAISummariser("m", url, backoff_s=60.0)
        with pytest.raises(ConfigError, match=says):
            summariser.check_ready()
        summariser.close()


def test_no_proxy_stands_before_a_loopback_address(make, server, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    make().check_ready()
    assert server.tries == {"": 1}


@pytest.mark.parametrize("key", ["sk-planted-key\n", " sk-planted-key", "sk planted-key", "sk-plänted-key"])
def test_a_key_that_no_header_carries_is_refused(monkeypatch, key):
    monkeypatch.setenv("A_KEY", key)
    with pytest.raises(ConfigError, match="A_KEY") as refused:
        OpenAISummariser("m", "http://127.0.0.1:9/v1", "A_KEY")
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/v1", "localhost/v1", "http:/x", "ftp://x/v1", "http://h:99999/v1", "http://[::1", "http://h /v1"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="base_url"):
        OpenAISummariser("m", url)


@pytest.mark.parametrize("request_", [{"stream": True}, {"model": "x"}, {"messages": []}])
def test_arguments_that_are_not_the_users_are_refused(request_):
    with pytest.raises(ValueError, match="request"):
        OpenAISummariser("m", "http://127.0.0.1:9/v1", request=request_)


def test_defaults():
    defaults = {name: p.default for name, p in inspect.signature(OpenAISummariser).parameters.items() if name != "model"}
    assert defaults == dict(
        base_url=None, api_key_env="OPENAI_API_KEY", max_workers=8, timeout_s=60.0, retries=3, backoff_s=1.0, template=USER_PROMPT,
        system=SYSTEM_PROMPT, max_chars=24_000, request=None,
    )  # fmt: skip
    summariser = OpenAISummariser("m", "http://127.0.0.1:9/v1")
    held = {name: getattr(summariser, name) for name in ("timeout_s", "retries", "backoff_s", "template", "system", "max_chars")}
    assert held.items() <= defaults.items()
    assert summariser.limit_s == 4 * 60 + (1 + 2 + 4) + 1  # all tries and waits, and a second
    summariser.close()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"max_workers": 0}, "max_workers must be >= 1"),
        ({"timeout_s": 0.0}, "timeout_s > 0"),
        ({"retries": -1}, "retries and backoff_s >= 0"),
        ({"backoff_s": -0.1}, "retries and backoff_s >= 0"),
        ({"template": "no conversation"}, "no {conversation}"),
    ],
)
def test_bad_settings_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        OpenAISummariser("m", "http://127.0.0.1:9/v1", **bad)


def test_set_up_errors_say_what_to_do(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        OpenAISummariser("m", api_key_env="NO_SUCH_KEY")
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ImportError, match=r"skillsd\[openai\]"):
        OpenAISummariser("m", "http://127.0.0.1:9/v1")
