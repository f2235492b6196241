"""Time limits of calls that may raise or hang, of environments above all: each ends in an answer or in a `Failure`, and the run goes on."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from skillsd.bounded import visible
from skillsd.errors import ConfigError

MAX_CHARS = 500  # of a failure's text


class Failure(ConfigError):
    """Why a call has failed, as an error or as its result.

    Args:
        kind: One of `trajectory.FAILURES`.
        what: The rest in words.
        message: The error's line; by default `text()`.
    """

    def __init__(self, kind: str, what: str, message: str = "") -> None:
        self.kind, self.what = kind, what
        super().__init__(message or self.text())

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The failure of a call that raised this, without its traceback, which would keep what the call has used."""
        if isinstance(error, Failure):
            return cls(error.kind, error.what)
        try:
            return cls("raised", f"{type(error).__name__}: {error}")
        except Exception:  # an error that cannot even say what it is
            return cls("raised", type(error).__name__)

    def text(self) -> str:
        """One line for the record."""
        text = visible(f"{self.kind}: {' '.join(self.what[: 4 * MAX_CHARS].split())}")
        return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS - 3]}..."


class _Hung(BaseException):
    """Raised into a call that takes too long; no Exception, which an environment might catch."""


def attempt(call: Callable[[], Any]) -> Any:
    """The call's answer, or a `Failure`. KeyboardInterrupt and SystemExit are not the environment's to raise: they end the run."""
    try:
        return call()
    except Exception as e:
        return Failure.of(e)


def _hung(seconds: float) -> Failure:
    return Failure("hung", f"no answer in {seconds:g} s (data.rollout.env_timeout)")


class Alarm:
    """Calls in the main thread, broken off after so many seconds by a signal: no thread, so that calls of microseconds stay that fast.
    The signal comes ten times in that time and looks whether a call has begun too long ago.

    A context manager: inside it SIGALRM is its own. Sleeps, locks, sockets and Python code are broken off; what stays in C without looking
    at signals is not, nor is anything on Windows or outside the main thread: use `data.rollout.env_workers` there.

    Args:
        seconds: Time limit of a call; 0 for none.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._before: Any = None
        self._set = False
        self._since = math.inf  # when the call under way began

    def __enter__(self) -> Alarm:
        self._set = self.seconds > 0 and hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        if self._set:
            self._before = signal.signal(signal.SIGALRM, self._ring)
            self._arm(self.seconds / 10)
        return self

    def __exit__(self, *_: object) -> None:
        if self._set:
            self._arm(0.0)
            signal.signal(signal.SIGALRM, self._before or signal.SIG_DFL)
            self._set = False

    def __call__(self, call: Callable[[], Any]) -> Any:
        """As `attempt`."""
        if not self._set:
            return attempt(call)
        try:
            self._since = time.monotonic()
            try:
                return attempt(call)
            finally:
                self._since = math.inf
        except _Hung:
            self._since = math.inf
            self._arm(self.seconds / 10)
            return _hung(self.seconds)

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """As `Threads.submit`; the call is over when this returns."""
        future: Future[Any] = Future()
        future.set_result(self(work))
        return future

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._since >= self.seconds:
            self._arm(min(1.0, self.seconds / 10))  # and again: code may catch whatever is raised into it
            raise _Hung

    @staticmethod
    def _arm(every: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, every, every)


class Call(Future[Any]):
    """A call in a thread, queued or running since `began` (monotonic seconds). It may take so many `seconds`, 0 for any time."""

    def __init__(self, work: Callable[[], Any], seconds: float) -> None:
        super().__init__()
        self.work, self.seconds, self.began = work, seconds, 0.0

    def give_up(self, failure: Failure) -> bool:
        """End it with this failure; False if it has answered just now."""
        try:
            self.set_result(failure)
        except InvalidStateError:
            return False
        return True


class Threads:
    """A few daemon threads for calls, which hang without keeping the process. One that does not come back in time is left behind, and
    another takes its place.

    Args:
        n: How many threads; each begins when there is a call for it.
        seconds: Time limit of a call, from when it begins; 0 for none.
        name: The threads' name.
        failures: Make a `Failure` of what a call raises, as `attempt` does; otherwise its result raises it.
    """

    def __init__(self, n: int, seconds: float = 0.0, name: str = "environment", failures: bool = True) -> None:
        self.n, self.seconds, self.name, self.failures = n, seconds, name, failures
        self.queue: SimpleQueue[Call | None] = SimpleQueue()
        self.running: dict[threading.Thread, Call | None] = {}

    def submit(self, work: Callable[[], Any], seconds: float | None = None) -> Call:
        """Queue a call, with a time limit of its own if one is given."""
        call = Call(work, self.seconds if seconds is None else seconds)
        self.queue.put(call)
        if len(self.running) < self.n:
            self._start()
        return call

    def prolong(self, seconds: float) -> None:
        """In a call: it may take so much longer."""
        if (call := self.running.get(threading.current_thread())) is not None:
            call.seconds += seconds

    def wait(self, calls: Sequence[Future[Any]], everybody: bool = True) -> None:
        """Until one call is over, or all; those that run for too long end as hung."""
        when = futures.ALL_COMPLETED if everybody else futures.FIRST_COMPLETED
        while True:
            over, rest = futures.wait(calls, self.give_up(calls), when)
            if not rest or (over and not everybody):
                return

    def give_up(self, calls: Sequence[Future[Any]]) -> float | None:
        """End those of these calls that run for too long; the seconds until it may be another's turn, None without a limit."""
        now, left = time.monotonic(), None
        for call in calls:
            if not isinstance(call, Call) or call.done() or not call.seconds:
                continue
            rest = call.began + call.seconds - now if call.began else call.seconds
            if rest > 0:
                left = rest if left is None else min(left, rest)
                continue
            if call.give_up(_hung(call.seconds)):
                for thread in [t for t, c in list(self.running.items()) if c is call]:
                    del self.running[thread]
                self._start()
        return left

    def close(self, wait: bool = True) -> None:
        """Drop what has not begun, and end the threads. What has begun is waited for (within the limit), or else given up."""
        with suppress(Empty):
            while True:
                if (call := self.queue.get_nowait()) is not None and call.cancel():
                    call.set_running_or_notify_cancel()  # or who waits for it would not notice
        under_way = [c for c in self.running.values() if c is not None]
        if wait:
            self.wait(under_way)
        for call in under_way:
            call.give_up(Failure("raised", "closed"))
        threads = list(self.running)
        for _ in threads:
            self.queue.put(None)
        for thread in threads if wait else ():
            thread.join()

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self.running[thread] = None
        thread.start()

    def _work(self) -> None:
        me = threading.current_thread()
        while (call := self.queue.get()) is not None:
            if not call.set_running_or_notify_cancel():
                continue
            self.running[me], call.began = call, time.monotonic()
            answer: Any = None
            error: BaseException | None = None
            try:
                answer = attempt(call.work) if self.failures else call.work()
            except BaseException as e:
                error = e
            try:
                call.set_exception(error) if error is not None else call.set_result(answer)
            except InvalidStateError:
                return  # given up; another has this one's place
            self.running[me] = None
