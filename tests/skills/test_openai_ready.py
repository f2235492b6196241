"""What an OpenAISummariser refuses before a run: a server that does not answer, and settings that cannot work."""

import inspect

import pytest

from skillsd.errors import ConfigError
from skillsd.skills import OpenAISummariser
from skillsd.skills.summarisers import SYSTEM_PROMPT, USER_PROMPT

pytest.importorskip("openai")


def test_a_server_that_answers_is_asked_once_and_briefly(make_summariser, server):
    make_summariser(request={"max_tokens": 9}).check_ready()
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
def test_a_server_that_does_not_is_refused_with_the_reason(make_summariser, server, step, says, tries):
    server.plan = {"": [step]}
    with pytest.raises(ConfigError, match=r"skills\.summariser") as refused:
        make_summariser(timeout_s=0.5).check_ready()
    assert says in str(refused.value) and server.tries == {"": tries}
    assert "\n" not in str(refused.value) and f"127.0.0.1:{server.server_port}" in str(refused.value)


def test_a_server_that_drips_is_refused_in_the_time_of_a_try(make_summariser, server):
    server.plan = {"": ["drip"]}
    with pytest.raises(ConfigError, match="given up"):
        make_summariser(timeout_s=0.3, backoff_s=0.0).check_ready()


def test_the_reason_holds_no_key(make_summariser, server, monkeypatch):
    key = "sk-planted-Zq83hTnv0LxWm5RbYd2KcJ7u"
    monkeypatch.setenv("A_KEY", key)
    server.plan, server.refusal = {"": [401]}, "x" * 260 + f"no such key: {key}"  # the excerpt ends within it
    with pytest.raises(ConfigError, match="status 401") as refused:
        make_summariser(api_key_env="A_KEY").check_ready()
    assert not any(key[at : at + 8] in str(refused.value) for at in range(len(key) - 7))


def test_a_wrong_address_is_refused_at_once_with_every_cause(make_summariser, server):
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


def test_no_proxy_stands_before_a_loopback_address(make_summariser, server, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    make_summariser().check_ready()
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
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="base_url"):
        OpenAISummariser("m", url)


@pytest.mark.parametrize("request_", [{"stream": True}, {"model": "x"}, {"messages": []}])
def test_arguments_that_are_not_the_users_are_refused(request_):
    with pytest.raises(ValueError, match="request"):
        OpenAISummariser("m", "http://127.0.0.1:9/v1", request=request_)


def test_the_defaults_of_an_endpoint_are_these():
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
