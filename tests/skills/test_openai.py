"""Against a real HTTP server that speaks the chat-completions format, well or badly."""

import json
import threading
import time
from email.utils import formatdate

import pytest

from skillsd.skills import OpenAISummariser, Summariser
from skillsd.skills.summarisers.endpoint import _retry_after_s

pytest.importorskip("openai")


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


def test_skills_come_in_order_of_task_and_member(make_summariser, group):
    summariser = make_summariser()
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
def test_tries_again_then_counts_and_says_why(make_summariser, group, server, caplog, bad):
    server.plan = {"once": [bad, "good"], "ever": [bad]}
    summariser = make_summariser()
    assert summariser.last_error == ""
    once, ever = summariser.summarise(group("once", "ever"))
    assert once.task_id == "once" and ever is None and summariser.last_error
    assert server.tries == {"once": 2, "ever": 3}
    assert eventually(lambda: caplog.messages) == [f"no skill from ever, member 0: {summariser.last_error}"]


def test_a_response_has_at_most_a_mebibyte(make_summariser, group, server):
    server.plan = {"a": ["full"], "b": ["over"]}
    summariser = make_summariser(retries=0)
    assert [skill.task_id for skill in summariser.summarise(group("a"))] == ["a"] and not server.hung_up.is_set()
    assert summariser.summarise(group("b")) == [None] and server.hung_up.wait(5)  # no connection is left with bytes in it


@pytest.mark.parametrize(
    ("plan", "backoff_s", "waits"),
    [
        ([500], 0.08, [0.08, 0.16, 0.32]),
        (["broken"], 0.01, [0.01, 0.02, 0.04]),
        ([(503, "0.5"), "broken"], 0.01, [0.5, 0.02, 0.04]),
        ([(429, "soon"), "good"], 0.01, [0.01]),
        ([(429, "3600"), "good"], 0.01, [5.0]),  # no longer than a try
    ],
)
def test_the_wait_is_what_the_server_asks_for_or_doubles(make_summariser, group, server, monkeypatch, plan, backoff_s, waits):
    server.plan = {"a": plan}
    summariser, waited = make_summariser(retries=3, backoff_s=backoff_s), []
    monkeypatch.setattr(summariser._closed, "wait", waited.append)
    (skill,) = summariser.summarise(group("a"))
    assert waited == waits and (skill is not None) == (plan[-1] == "good")


def test_as_many_requests_at_a_time_as_workers_which_end_on_close(make_summariser, group, server, workers):
    server.plan = {task: ["nap"] for task in "abcdef"}
    summariser = make_summariser(max_workers=2)
    summariser.submit(0, group("a", "b", "c"))
    summariser.submit(1, group("d", "e", "f"))
    summariser.drain()
    assert server.max_busy == len(workers()) == 2 and all(t.daemon for t in workers())  # a hanging server keeps no process from ending
    assert not server.hung_up.is_set()
    summariser.close()
    assert eventually(lambda: not workers()) and server.hung_up.wait(5)


@pytest.mark.parametrize("step", ["fence", "prose", "both", "parts", "thoughts"])
def test_the_object_may_stand_in_a_fence_or_after_prose_or_thoughts_or_in_parts(make_summariser, group, server, step):
    server.plan = {"a": [step]}
    (skill,) = make_summariser(retries=0).summarise(group("a"))
    assert skill.texts == ("s", "m", "w")


def test_the_request_holds_rules_task_and_end_of_forty_turns(make_summariser, make_trajectory, server):
    rules = "RULES-BEGIN" + " one python block a turn;" * 160 + " RULES-END"
    page = json.dumps([{"song_id": i, "title": "{conversation}", "note": 'say "golden_workflow": {}'} for i in range(70)])
    answer = "I print a page.\n```python\nprint(apis.spotify.show_song_library(page_index={}))\n```"
    end = 'I am done.\n```python\napis.supervisor.complete_task(answer="Song {9}")\n```'
    pairs = [("TASK-BEGIN the most played song? TASK-END", answer), *[(page, answer)] * 38, (page, end)]
    assert 4_000 < len(rules) < 4_200 and 5_000 < len(page) <= 6_000
    (skill,) = make_summariser(max_chars=12_000, request={"temperature": 0.5, "max_tokens": 600}).summarise(
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


def test_a_wait_that_the_server_asks_for_is_not_counted_as_lateness(make_summariser, group, server):
    server.plan = {"a": [(429, "3600"), (429, "3600"), "good"]}
    summariser, start = make_summariser(timeout_s=0.6), time.monotonic()
    summariser.limit_s = 0.5  # the two waits alone take longer
    (skill,) = summariser.summarise(group("a"))
    assert skill.task_id == "a" and time.monotonic() - start >= 1.2


def test_retry_after_as_text():
    read = {text: _retry_after_s({"retry-after": text}) for text in ("2", "1.5", "-3", "nan", "", "soon", formatdate(0, usegmt=True))}
    assert list(read.values()) == [2.0, 1.5, 0.0, 0.0, 0.0, 0.0, 0.0] and _retry_after_s({}) == 0.0
    assert 50 < _retry_after_s({"retry-after": formatdate(time.time() + 60, usegmt=True)}) <= 60


def test_a_wrong_key_is_not_tried_again(make_summariser, group, server):
    server.plan, server.refusal = {"a": [401]}, "x" * 600
    summariser = make_summariser()
    assert summariser.summarise(group("a")) == [None] and server.tries == {"a": 1} and "401" in summariser.last_error
    assert len(summariser.last_error) < 500  # a server may say more than a log should hold


def test_a_request_that_hangs_is_given_up_and_iterations_stay_whole_and_in_order(make_summariser, group, server):
    server.plan = {"slow": ["hang", "good"], "dead": ["hang"]}
    summariser = make_summariser(timeout_s=0.4, retries=1)
    start = time.monotonic()
    summariser.submit(0, group("slow", "dead", "fine"))
    summariser.submit(1, group("fine"))
    assert summariser.collect() == []  # nothing waits for answers
    time.sleep(0.2)
    assert summariser.collect() == []  # iteration 1 is ready, but does not overtake
    summariser.drain()
    first, second = summariser.collect()
    assert [skill.task_id for skill in first.skills] == ["fine", "slow"] and first.n_failed == 1
    assert (second.iteration, second.n_failed) == (1, 0)
    assert time.monotonic() - start < 15  # the server hangs for 20 s


def test_a_dripping_server_is_given_up_and_does_not_block_the_rest(make_summariser, group, server):
    server.plan = {"a": ["drip"]}
    summariser = make_summariser(timeout_s=0.5, retries=0, max_workers=1)
    summariser.limit_s = 0.8
    summariser.submit(0, group("a", "b"))
    start = time.monotonic()
    ((_, skills, n_failed),) = summariser.collect(block=True)
    assert [skill.task_id for skill in skills] == ["b"] and n_failed == 1 and time.monotonic() - start < 4


def test_own_waits_do_not_move_the_limit_and_who_is_given_up_is_replaced(make_summariser, group, server, workers):
    server.plan = {"a": [500, "drip"]}
    summariser = make_summariser(timeout_s=0.3, retries=1, backoff_s=0.1, max_workers=1)
    summariser.limit_s = 0.45
    assert summariser.summarise(group("a")) == [None] and "given up" in summariser.last_error
    assert len(workers()) == 2
    server.stop.set()
    assert eventually(lambda: len(workers()) == 1)


def test_close_gives_up_what_is_open(make_summariser, group, server, caplog):
    server.plan = {"a": ["hang"]}
    summariser = make_summariser(max_workers=1)
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


def test_an_error_that_cannot_pass_is_asked_once(make_summariser, group, server):
    server.plan = {"a": ["stream"], "b": [404]}
    summariser = make_summariser()
    assert summariser.summarise(group("a", "b")) == [None, None] and server.tries == {"a": 1, "b": 1}
    summariser = make_summariser(request={"temperatur": 1})  # no argument of the client's
    assert summariser.summarise(group("a")) == [None] and server.tries["a"] == 1
    assert "TypeError" in summariser.last_error and "temperatur" in summariser.last_error


def test_a_cut_answer_is_named_with_the_key_that_raises_the_limit(make_summariser, group, server):
    server.plan = {"a": ["cut"]}
    for request, key in (({}, "request.max_tokens"), ({"max_completion_tokens": 7}, "request.max_completion_tokens (it is 7)")):
        summariser = make_summariser(request=request, retries=0)
        assert summariser.summarise(group("a")) == [None] and key in summariser.last_error
