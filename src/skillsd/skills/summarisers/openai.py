"""Skills from an OpenAI-compatible endpoint, in the background: training does not wait, and no failure stops it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from skillsd.bounded import one_line
from skillsd.errors import ConfigError, causes, redacted, without_keys
from skillsd.skills.skill import Skill
from skillsd.skills.summarisers.endpoint import Endpoint, NoAnswer
from skillsd.skills.summarisers.prompt import SYSTEM_PROMPT, USER_PROMPT, analyst_messages, check_prompt
from skillsd.skills.summarisers.protocol import Finished, finished, in_order
from skillsd.timeouts import Call, Failure, Threads
from skillsd.trajectory import Trajectory

log = logging.getLogger(__name__)
_MAX_ERROR_CHARS = 1000
"""Longest reason that is logged, in characters: a chain of causes and a piece of what the server has said."""
_TRIAL = 'This is a test of the connection. Answer with this JSON object and nothing else: {"ok": true}'


class OpenAISummariser:
    """Asks a chat-completions endpoint, several trajectories at a time.

    What may pass is tried again: connection errors, time-outs, status 408, 409, 429 and 5xx, and answers that are not the JSON asked for.
    What comes again whenever the same is sent fails at once: a wrong key, an unknown model, a wrong address or argument. Where the server
    says Retry-After, the next try waits as long as it asks, at most `timeout_s`. A trajectory that takes longer than all its tries and
    waits together may is given up. The key is held in memory and sent to the endpoint, and nowhere else: what the server says is stripped
    of it before it is logged or stored.

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
        ImportError: The `openai` package is not installed, or cannot be imported.
        ValueError: A setting is out of range or holds a key, the template cannot be filled, there is no key for the default endpoint, or
            the key cannot be sent.
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
        self._endpoint = Endpoint(model, base_url, api_key_env, timeout_s, request or {})
        self.model = model
        self.timeout_s = timeout_s
        self.retries = retries
        self.backoff_s = backoff_s
        self.template = template
        self.system = system
        self.max_chars = max_chars
        self.last_error = ""
        """Why the latest failed summary failed."""
        self._waits_s = backoff_s * (2**retries - 1) + 1.0
        self.limit_s = (retries + 1) * timeout_s + self._waits_s
        """After this many seconds a trajectory is given up, plus what the server asked it to wait."""
        self._threads = Threads(max_workers, name="summariser")
        self._pending: deque[tuple[int, list[Call]]] = deque()
        self._closed = threading.Event()

    def check_ready(self) -> None:
        """One small request, with the settings of all others, before a run starts. It is repeated only where the server says that it is
        busy.

        Raises:
            ConfigError: It gave no usable answer.
        """
        (trial,) = self._enqueue([None], self.timeout_s + self._waits_s)
        self._threads.wait([trial])
        if error := self._outcome(trial)[1]:
            raise ConfigError(f"skills.summariser: a request before the run failed: {error}")

    def summarise(self, trajectories: Sequence[Trajectory]) -> list[Skill | None]:
        """One skill per trajectory in the given order, None where it failed. Blocks."""
        calls = self._enqueue(trajectories, self.limit_s)
        self._threads.wait(calls)
        return [self._outcome(call)[0] for call in calls]

    def submit(self, iteration: int, trajectories: Sequence[Trajectory]) -> None:
        """Queues the trajectories and returns."""
        self._pending.append((iteration, self._enqueue(in_order(trajectories), self.limit_s)))

    def collect(self, block: bool = False) -> list[Finished]:
        """The submissions that are ready, in order; with `block`, all of them."""
        if block:
            self.drain()
        ready: list[Finished] = []
        while self._pending:
            iteration, calls = self._pending[0]
            self._threads.give_up(calls)
            if not all(call.done() for call in calls):
                break
            self._pending.popleft()
            ready.append(finished(iteration, [self._outcome(call)[0] for call in calls]))
        return ready

    def drain(self) -> None:
        """Waits until every submission is ready."""
        for _, calls in self._pending:
            self._threads.wait(calls)

    def close(self) -> None:
        """Gives up what is under way; it counts as failed if it is still collected."""
        self._closed.set()
        self._threads.close(wait=False)
        self._endpoint.close()

    # Inside

    def _enqueue(self, trajectories: Sequence[Trajectory | None], limit_s: float) -> list[Call]:
        """A call for each trajectory; None is the trial."""
        if self._closed.is_set():
            raise RuntimeError("the summariser is closed")
        calls = []
        for trajectory in trajectories:
            calls.append(self._threads.submit(partial(self._ask, trajectory), limit_s))
            calls[-1].add_done_callback(partial(self._report, trajectory))
        return calls

    def _ask(self, trajectory: Trajectory | None) -> tuple[Skill | None, str]:
        """The skill, or why there is none."""
        error, asked_s = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                own_s = self.backoff_s * 2 ** (attempt - 1)
                self._threads.prolong(max(0.0, asked_s - own_s))
                if self._closed.wait(max(own_s, asked_s)):
                    break
                asked_s = 0.0
            try:
                return self._skill(trajectory), ""
            except NoAnswer as failure:
                error = str(failure)
                if not failure.retryable or (trajectory is None and not failure.busy):
                    break
                asked_s = min(failure.retry_after_s, self.timeout_s)
            except Exception as failure:  # whatever a server sends back, training goes on
                error = causes(failure)
        return None, error

    def _outcome(self, call: Any) -> tuple[Skill | None, str]:
        """What a call that is over came to: the skill, or why there is none."""
        # A server that sends a byte now and then outlives every socket time-out: the clock decides.
        found = Failure("raised", "closed") if call.cancelled() else call.result()
        if isinstance(found, Failure):
            late = f"{self._endpoint.url}: given up, as no whole answer came in {call.seconds:.0f} s"
            return None, late if found.kind == "hung" else found.what
        skill, error = found
        return skill, redacted(error)[:_MAX_ERROR_CHARS]

    def _report(self, trajectory: Trajectory | None, call: Any) -> None:
        """Log why there is no skill, when a call is over."""
        _, error = self._outcome(call)
        if error:
            self.last_error = error
        if error and not self._closed.is_set() and trajectory is not None:
            log.warning("no skill from %s, member %d: %s", one_line(trajectory.task_id), trajectory.member, error)

    def _skill(self, trajectory: Trajectory | None) -> Skill | None:
        """Asked once; of the trial, whose answer may be any text, None.

        Raises:
            NoAnswer: There is none, or the length limit has cut it.
            ValueError: It is not what was asked for.
        """
        if trajectory is None:
            user = {"role": "user", "content": _TRIAL}
            self._endpoint.ask([{"role": "system", "content": self.system}, user] if self.system else [user])
            return None
        answer = self._endpoint.ask(analyst_messages(trajectory, self.template, self.system, self.max_chars))
        try:
            skill = Skill.parse(answer.text)
        except ValueError as error:
            if answer.truncated:
                raise NoAnswer(f"{answer.truncated}; {error}") from error
            raise
        return skill.with_texts(map(without_keys, skill.texts)).of(trajectory)
