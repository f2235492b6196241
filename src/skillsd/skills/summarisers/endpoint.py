"""One request to a chat-completions endpoint: the text of its answer, or the whole reason why there is none."""

from __future__ import annotations

import json
import os
import re
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from skillsd.errors import causes, chain, read_key, redacted

_MAX_BODY_BYTES = 1 << 20
"""Longest body of a response, in bytes: a skill has some hundred."""
_MAX_QUOTED_CHARS = 300
"""Longest part of a body that an error quotes, in characters."""
_KEY_NAME = re.compile(r"(?:^|[_-])(?:auth\w*|api-?key|key|token|secret|password|cookie)$", re.IGNORECASE)
_FIXED = ("model", "messages", "stream", "stream_options")
"""Arguments of the request that are not the user's to give."""
_PERMANENT = ("UnsupportedProtocol", "LocalProtocolError", "InvalidURL")
"""Errors of the HTTP client, by name, that come again whenever the same is sent."""
_LIMITS = ("max_completion_tokens", "max_tokens")


class NoAnswer(Exception):
    """Why there is no answer, with every cause, in one line without secrets.

    Args:
        why: The line.
        retryable: True if the same request may succeed later.
        busy: True if the server has said so itself.
        retry_after_s: How long the server asks to wait before the next try, in seconds.
    """

    def __init__(self, why: str, retryable: bool = True, busy: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(redacted(" ".join(why.split())))
        self.retryable, self.busy, self.retry_after_s = retryable, busy, retry_after_s


class Answer(NamedTuple):
    """What the model wrote. `truncated` is empty, or says that the length limit ended it and which key raises the limit."""

    text: str
    truncated: str = ""


class Endpoint:
    """A client of one model behind one address.

    A proxy that the environment names is not used for an address of this machine.

    Args:
        model, base_url, api_key_env, timeout_s, request: As for `OpenAISummariser`.

    Raises:
        ImportError: The `openai` package is not installed, or cannot be imported.
        ValueError: A setting cannot be right or holds a key, there is no key for the default endpoint, or the key cannot be sent.
    """

    def __init__(self, model: str, base_url: str | None, api_key_env: str, timeout_s: float, request: Mapping[str, Any]) -> None:
        _check_settings(api_key_env, base_url, request)
        try:
            import openai
        except Exception as error:  # a package that is broken raises anything
            raise ImportError(f'OpenAISummariser needs the openai package ({causes(error)}): pip install "skillsd[openai]"') from error
        key = read_key(api_key_env, "skills.summariser.init_args.api_key_env")
        if not key and base_url is None:
            raise ValueError(f"no API key: set the environment variable {api_key_env}, or give base_url for a server that needs none")
        url = base_url or os.environ.get("OPENAI_BASE_URL", "")
        direct = {f"all://{urlsplit(url).hostname}": None} if _is_loopback(url) else None
        try:
            plain = {"Accept-Encoding": "identity"}
            http = openai.DefaultHttpxClient(event_hooks={"response": [_bound]}, headers=plain, mounts=direct)
            self._client = openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=timeout_s, max_retries=0, http_client=http)
        except Exception as error:  # a proxy or a certificate that the environment names, as much as an address
            proxies = ", ".join(sorted({n.upper() for n in os.environ if n.upper().endswith("_PROXY") or n.startswith("SSL_CERT")}))
            about = f"; read from the environment: {proxies}" if proxies else ""
            raise ValueError(f"no client can be made for base_url {url or 'of openai'} ({causes(error)}{about})") from error
        self._openai, self.model, self.timeout_s, self.request = openai, model, timeout_s, dict(request)
        self.url = f"{str(self._client.base_url).rstrip('/')}/chat/completions"

    def ask(self, messages: Sequence[Mapping[str, str]]) -> Answer:
        """The answer to a conversation. Blocks, for at most `timeout_s` between two bytes.

        Raises:
            NoAnswer: There is none.
        """
        try:
            raw = self._client.chat.completions.with_raw_response.create(model=self.model, messages=messages, **self.request)
            response = raw.http_response
            body, kind = response.text, response.headers.get("content-type", "")
        except self._openai.APIStatusError as error:
            raise self._refused(error.response) from error
        except self._openai.APITimeoutError as error:
            raise NoAnswer(f"{self.url}: no answer in {self.timeout_s:g} s (timeout_s): {causes(error)}") from error
        except Exception as error:  # whatever a server sends back, training goes on
            raise NoAnswer(f"{self.url}: {causes(error)}", retryable=not any(map(_is_permanent, chain(error)))) from error
        try:
            return self._read(body, kind)
        except NoAnswer as error:
            raise NoAnswer(f"{self.url}: {error}", error.retryable) from None

    def close(self) -> None:
        """Give up what is being asked."""
        self._client.close()

    def _refused(self, response: Any) -> NoAnswer:
        status = response.status_code
        why = f"{self.url}: status {status}: {_excerpt(response.text)}"
        if status in (404, 405) and "/v1" not in self.url:
            why += "; most servers have it below /v1, and base_url has none"
        busy = (status >= 500 or status in (408, 409, 429)) and "insufficient_quota" not in response.text
        return NoAnswer(why, busy, busy, _retry_after_s(response.headers) if busy else 0.0)

    def _read(self, body: str, kind: str) -> Answer:
        """The answer in a response's body. Raises NoAnswer."""
        if "event-stream" in kind or body.startswith("data:"):
            raise NoAnswer(f"it answered a request for a whole answer with an event stream: {_excerpt(body)}", retryable=False)
        try:
            data = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise NoAnswer(f"its answer is no JSON (content-type {kind or 'not given'}): {_excerpt(body)}") from error
        choices = data.get("choices") if isinstance(data, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise NoAnswer(f"its answer has no message among its choices: {_excerpt(body)}")
        truncated = self._truncated() if isinstance(choice, dict) and choice.get("finish_reason") == "length" else ""
        text = _text(message.get("content"))
        if not text.strip():
            thoughts = [f"{len(x)} characters of {k}" for k, x in message.items() if k.startswith("reasoning") and isinstance(x, str) and x]
            said = ", ".join(thoughts) or _excerpt(json.dumps(message))
            raise NoAnswer(f"its message has no text in content, but {said}" + (f"; {truncated}" if truncated else ""))
        return Answer(text, truncated)

    def _truncated(self) -> str:
        name = next((k for k in _LIMITS if self.request.get(k)), "")
        limit = f"raise request.{name} (it is {self.request[name]})" if name else "the limit is the server's own: set request.max_tokens"
        return f"the answer was cut at the length limit (finish_reason length): {limit}"


def _text(content: object) -> str:
    """A message's content as text; of a list of parts, that of the text parts."""
    if isinstance(content, list):
        parts = [p if isinstance(p, dict) else {"text": p} for p in content]
        texts = [p.get("text") for p in parts if p.get("type", "text") in ("text", "output_text")]
        return "".join(t for t in texts if isinstance(t, str))
    return content if isinstance(content, str) else ""


def _excerpt(text: str) -> str:
    text = redacted(" ".join(text[: 1 << 16].split()))  # before it is cut: half a key is one too
    return repr(text if len(text) <= _MAX_QUOTED_CHARS else f"{text[:_MAX_QUOTED_CHARS]}...")


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _is_permanent(error: BaseException) -> bool:
    """What comes again whenever the same is sent: an argument, an address, a certificate that is not trusted, a server without TLS."""
    if isinstance(error, TypeError | UnicodeError | ssl.SSLCertVerificationError) or type(error).__name__ in _PERMANENT:
        return True
    return isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")


def _check_settings(api_key_env: str, base_url: str | None, request: Mapping[str, Any]) -> None:
    """Raises ValueError for what cannot be an address or an argument, and where a setting looks as if it held a key: settings are written
    to the run folder. Its text is not repeated then.
    """
    there = "a key in the configuration would be written to the run folder: put it into the environment variable that api_key_env names"
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", api_key_env):
        raise ValueError("api_key_env is the name of an environment variable, not a key: letters, digits and _ only")
    if base_url is not None:
        if re.search(r"//[^/]*@|[?&#]", base_url):
            raise ValueError(f"base_url holds a user or a query: {there}")
        try:
            at = urlsplit(base_url)
            good = at.scheme in ("http", "https") and bool(at.hostname) and at.port != 0 and not re.search(r"[^!-~]", base_url)
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"base_url is {base_url!r}: give http:// or https://, a host, maybe a port, and mostly /v1")
    for part, settings in (("", request), *((k, v) for k, v in request.items() if isinstance(v, Mapping))):
        for name in settings:
            if name != "prompt_cache_key" and _KEY_NAME.search(str(name)):
                raise ValueError(f"request{'.' * bool(part)}{part}: {name} looks like a key, and {there}")
    if fixed := [name for name in _FIXED if name in request]:
        raise ValueError(f"request: {', '.join(fixed)} cannot be set there: the request has its own")


class _Unreadable(Exception):
    """A response that is not read."""


def _bound(response: Any) -> None:
    """A hook of the HTTP client: no body is read beyond `_MAX_BODY_BYTES`, and none is unpacked: it could become a thousand times longer.

    Raises:
        _Unreadable: the body is compressed; on reading, it is too long.
    """
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _Unreadable("the response is compressed, which was not asked for")
    kind: Any = type(response.stream)  # the client's name differs between versions of the package

    class Bounded(kind):
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            left = _MAX_BODY_BYTES
            for chunk in self.stream:
                left -= len(chunk)
                if left < 0:
                    raise _Unreadable(f"the response has more than {_MAX_BODY_BYTES} bytes")
                yield chunk

        def close(self) -> None:
            self.stream.close()

    response.stream = Bounded(response.stream)


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """The seconds that a Retry-After header asks for, in numbers or as a date; 0 without a readable one."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if seconds > 0 else 0.0  # not a number: 0
