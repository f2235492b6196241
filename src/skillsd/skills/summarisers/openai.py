"""Skills from an OpenAI-compatible endpoint, in the background: training does not wait, and no failure stops it."""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from skillsd.errors import hold_secret, redacted
from skillsd.skills.skill import Skill
from skillsd.skills.summarisers.prompt import SYSTEM_PROMPT, USER_PROMPT, analyst_messages, check_prompt
from skillsd.skills.summarisers.protocol import Finished, finished, in_order
from skillsd.trajectory import Trajectory

log = logging.getLogger(__name__)
_POLL_S = 0.02
_MOST_BYTES = 1 << 20
"""Longest body of a response, in bytes: a skill has some hundred."""
_KEY_NAME = re.compile(r"(?:^|[_-])(?:auth\w*|api-?key|key|token|secret|password|cookie)$", re.IGNORECASE)


@dataclass
class _Job:
    """One trajectory on its way. `done` is set once, by its worker or by whoever gave it up."""

    trajectory: Trajectory
    skill: Skill | None = None
    started: float | None = None
    asked_s: float = 0.0
    """What the server's Retry-After asked for beyond the own waits, in seconds."""
    done: bool = False


class OpenAISummariser:
    """Asks a chat-completions endpoint, several trajectories at a time.

    Connection errors, time-outs, status 408, 409, 429 and 5xx, and answers that are not the JSON asked for are tried again; other
    statuses (a wrong key, an unknown model) fail at once. Where the server says Retry-After, the next try waits as long as it asks, at most
    `timeout_s`. A trajectory that takes longer than all its tries and waits together may is given up. The key is held in memory and sent
    to the endpoint, and nowhere else: what the server says is stripped of it before it is logged or stored.

    Args:
        model: The endpoint's name of the model.
        base_url: The endpoint, e.g. `http://127.0.0.1:8000/v1`; None: the `openai` package's default.
        api_key_env: Environment variable that holds the key. It may be unset when `base_url` is given (local servers need none).
        max_workers: Requests at a time.
        timeout_s: Time limit of one try, in seconds.
        retries: Tries after the first.
        backoff_s: Wait before the first retry, in seconds; doubled for each further one.
        template: The request, see `prompt.USER_PROMPT`.
        system: The role; empty for none.
        max_chars: Budget of the conversation, in characters.
        request: Further arguments of the request, e.g. `{temperature: 0.7, max_tokens: 600}`.

    Raises:
        ImportError: The `openai` package is not installed.
        ValueError: A setting is out of range or holds a key, the template cannot be filled, or there is no key for the default endpoint.
    """

    asynchronous: bool = True

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_workers: int = 8,
        timeout_s: float = 60.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        template: str = USER_PROMPT,
        system: str = SYSTEM_PROMPT,
        max_chars: int = 24_000,
        request: dict[str, Any] | None = None,
    ) -> None:
        if max_workers < 1 or timeout_s <= 0 or retries < 0 or backoff_s < 0:
            raise ValueError("max_workers must be >= 1, timeout_s > 0, retries and backoff_s >= 0")
        check_prompt(template, max_chars)
        _without_keys(api_key_env, base_url, request or {})
        try:
            import openai
        except ImportError as error:
            raise ImportError('OpenAISummariser needs the openai package: pip install "skillsd[openai]"') from error
        key = os.environ.get(api_key_env, "")
        if not key and base_url is None:
            raise ValueError(f"no API key: set the environment variable {api_key_env}, or give base_url for a server that needs none")
        hold_secret(api_key_env, key)
        self._openai = openai
        http = openai.DefaultHttpxClient(event_hooks={"response": [_bound]}, headers={"Accept-Encoding": "identity"})
        self._client = openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=timeout_s, max_retries=0, http_client=http)
        self.model = model
        self.timeout_s = timeout_s
        self.retries = retries
        self.backoff_s = backoff_s
        self.template = template
        self.system = system
        self.max_chars = max_chars
        self.request = dict(request or {})
        self.last_error = ""
        """Why the latest failed summary failed."""
        self.limit_s = (retries + 1) * timeout_s + backoff_s * (2**retries - 1) + 1.0
        """After this many seconds a trajectory is given up, plus what the server asked it to wait."""
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._pending: deque[tuple[int, list[_Job]]] = deque()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._max_workers = max_workers
        self._n_workers = 0

    def summarise(self, trajectories: Sequence[Trajectory]) -> list[Skill | None]:
        """One skill per trajectory in the given order, None where it failed. Blocks."""
        jobs = self._enqueue(trajectories)
        self._wait(jobs)
        return [job.skill for job in jobs]

    def submit(self, iteration: int, trajectories: Sequence[Trajectory]) -> None:
        """Queues the trajectories and returns."""
        self._pending.append((iteration, self._enqueue(in_order(trajectories))))

    def collect(self, block: bool = False) -> list[Finished]:
        """The submissions that are ready, in order; with `block`, all of them."""
        if block:
            self.drain()
        ready: list[Finished] = []
        while self._pending and all(self._over(job) for job in self._pending[0][1]):
            iteration, jobs = self._pending.popleft()
            ready.append(finished(iteration, [job.skill for job in jobs]))
        return ready

    def drain(self) -> None:
        """Waits until every submission is ready."""
        for _, jobs in self._pending:
            self._wait(jobs)

    def close(self) -> None:
        """Gives up what is under way; it counts as failed if it is still collected."""
        self._closed.set()
        for _, jobs in self._pending:
            for job in jobs:
                self._finish(job, None, "closed")
        for _ in range(self._n_workers):
            self._jobs.put(None)
        self._client.close()

    # Inside

    def _enqueue(self, trajectories: Sequence[Trajectory]) -> list[_Job]:
        if self._closed.is_set():
            raise RuntimeError("the summariser is closed")
        jobs = [_Job(trajectory) for trajectory in trajectories]
        for job in jobs:
            self._jobs.put(job)
        new = min(len(jobs), self._max_workers - self._n_workers)
        self._n_workers += new
        for _ in range(new):
            self._start_worker()
        return jobs

    def _start_worker(self) -> None:
        # Daemons, not a pool: a hanging server must not keep the process from ending.
        threading.Thread(target=self._work, name="summariser", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.done:
                continue
            job.started = time.monotonic()
            skill, error = self._ask(job)
            if not self._finish(job, skill, error):
                return  # given up meanwhile, and this worker was replaced

    def _ask(self, job: _Job) -> tuple[Skill | None, str]:
        error, asked_s = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                own_s = self.backoff_s * 2 ** (attempt - 1)
                job.asked_s += max(0.0, asked_s - own_s)
                if self._closed.wait(max(own_s, asked_s)):
                    break
                asked_s = 0.0
            try:
                messages = analyst_messages(job.trajectory, self.template, self.system, self.max_chars)
                answer = self._client.chat.completions.create(model=self.model, messages=messages, **self.request)
                skill = Skill.parse(answer.choices[0].message.content or "")
                return skill.with_texts(map(redacted, skill.texts)).of(job.trajectory), ""
            except self._openai.APIStatusError as failure:
                error = f"status {failure.status_code}: {failure.message}"
                if failure.status_code < 500 and failure.status_code not in (408, 409, 429):
                    return None, error
                asked_s = min(_retry_after_s(failure.response.headers), self.timeout_s)
            except Exception as failure:  # whatever a server sends back, training goes on
                error = f"{type(failure).__name__}: {failure}"
        return None, error

    def _finish(self, job: _Job, skill: Skill | None, error: str) -> bool:
        error = redacted(error)[:500]
        with self._lock:
            if job.done:
                return False
            job.skill, job.done = skill, True
            if skill is None:
                self.last_error = error
        if skill is None and error != "closed":
            log.warning("no skill from %s, member %d: %s", job.trajectory.task_id, job.trajectory.member, error)
        return True

    def _over(self, job: _Job) -> bool:
        # A server that sends a byte now and then outlives every socket time-out: the clock decides.
        late = not job.done and job.started is not None and time.monotonic() - job.started > self.limit_s + job.asked_s
        if late and self._finish(job, None, f"given up after {self.limit_s + job.asked_s:.0f} s"):
            self._start_worker()  # in place of the one that hangs
        return job.done

    def _wait(self, jobs: Sequence[_Job]) -> None:
        while not all(self._over(job) for job in jobs):
            time.sleep(_POLL_S)


def _without_keys(api_key_env: str, base_url: str | None, request: Mapping[str, Any]) -> None:
    """Raises ValueError where a setting looks as if it held a key: settings are written to the run folder. Its text is not repeated."""
    there = "a key in the configuration would be written to the run folder: put it into the environment variable that api_key_env names"
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", api_key_env):
        raise ValueError("api_key_env is the name of an environment variable, not a key: letters, digits and _ only")
    if base_url is not None and re.search(r"//[^/]*@|[?&#]", base_url):
        raise ValueError(f"base_url holds a user or a query: {there}")
    for part, settings in (("", request), *((k, v) for k, v in request.items() if isinstance(v, Mapping))):
        for name in settings:
            if name != "prompt_cache_key" and _KEY_NAME.search(str(name)):
                raise ValueError(f"request{'.' * bool(part)}{part}: {name} looks like a key, and {there}")


def _bound(response: Any) -> None:
    """A hook of the HTTP client: no body is read beyond `_MOST_BYTES`, and none is unpacked, which could make it a thousand times longer.

    Raises:
        ValueError: the body is compressed; on reading, it is too long. The client makes a connection error of it.
    """
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ValueError("the response is compressed, which was not asked for")
    kind: Any = type(response.stream)  # the client's name differs between versions of the package

    class Bounded(kind):
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            left = _MOST_BYTES
            for chunk in self.stream:
                left -= len(chunk)
                if left < 0:
                    raise ValueError(f"the response has more than {_MOST_BYTES} bytes")
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
