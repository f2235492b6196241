"""vLLM in processes of its own, on other GPUs or machines: an engine that asks running servers over HTTP (vLLM's completions API).

`skillsd serve` (`engines.serve`) starts a server with the noise of the engine in this process as its logits processor, so that a token is
the same function of (key, position) there, whichever server is asked, and again after one is lost.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from weakref import WeakSet

from skillsd import parallel
from skillsd.engines.engine import Adapter, Completion, Request, Session, Version
from skillsd.engines.http import HttpCall, ServerError, root
from skillsd.engines.settings import server_key
from skillsd.engines.versions import Versions
from skillsd.engines.vllm_api import VllmApi
from skillsd.errors import ConfigError
from skillsd.policy import Policy
from skillsd.timeouts import Failure, Threads

log = logging.getLogger(__name__)

HANDSHAKE_S, RETRY_HANDSHAKE_S, LOAD_S = 30.0, 5.0, 300.0
RETRY_S = 60.0  # a server that takes connections and says nothing costs everybody RETRY_HANDSHAKE_S
POLL_S = 0.02  # environments may have answered meanwhile


@dataclass(eq=False)
class _Server:
    url: str
    base: str = ""
    """Its name for the base model."""
    loaded: set[str] = field(default_factory=set)
    """The names of its adapters."""
    live: bool = False
    joined: int = 0
    """How often it has become live."""
    reason: str = ""
    """Why it is not live."""
    lost_at: float = -math.inf
    """Monotonic seconds."""


@dataclass(eq=False)
class _Turn:
    """A turn that a server was asked for."""

    request: Request
    server: _Server
    joined: int
    """The server's count when it was asked."""
    call: HttpCall

    @property
    def is_cut_by_us(self) -> bool:
        """True after a hang-up for another reason than that it took too long."""
        return self.call.cut and not self.call.overdue


class VllmServers:
    """An `Engine` on running servers. Every rank may use all of them.

    A row stays on its server, whose prefix cache has what it has seen; a new one goes where the fewest rows are in progress. A server that
    does not answer as it should is dropped, its turns are asked again of the others, and an `open` asks now and then whether it is back.

    Args:
        policy: Who acts.
        urls: The servers.
        folder: Where adapters are written for them to read, the same path on every machine; None is a temporary one on this machine.
        key_env: Environment variable with the servers' API key, if they want one.
        rows: Most turns asked for at one time.
        seconds: After so many without an answer to a turn a server is lost.
        staleness: Updates that rollouts lag behind: versions of other ranks that stay loaded.
        run: Which run asks, the same on all of its ranks and on no other run's, where several share the servers.

    Raises:
        ConfigError: a URL cannot be one, the key is not there, the policy has no adapters, or no server answers.
    """

    def __init__(
        self, policy: Policy, urls: Sequence[str], folder: str | None = None, key_env: str | None = None, rows: int = 64,
        seconds: float = 600.0, staleness: int = 0, run: str = "",
    ) -> None:  # fmt: skip
        if not policy.has_adapters:
            raise ConfigError("data.rollout.engine is servers, which act with adapters only: set it to default.")
        self.key = server_key(key_env)
        self.policy, self.seconds = policy, seconds
        self.api = VllmApi(int(policy.base.config.get_text_config().vocab_size), policy.stop_ids)
        first = parallel.rank() % len(urls)  # or all ranks' first rows would go to one server
        self.servers = [_Server(root(url)) for url in [*urls[first:], *urls[:first]]]
        self.threads, self.control_threads = Threads(rows), Threads(len(urls))
        self.versions = Versions(policy, folder, run, staleness)
        self.lock = threading.RLock()  # a rollout may go on in the background while the main thread plays a panel
        self.closed, self._closing = False, threading.Lock()  # a turn that begins before `close` is ended by it; held for no time
        self._sessions: WeakSet[ServersSession] = WeakSet()
        self._turns: set[_Turn] = set()
        try:
            self.join(None)
        except ConfigError:
            self.close()
            raise

    # -- what an engine does ---------------------------------------------------------------------------------------------------

    def open(self, temperature: float, adapter: Adapter = "student") -> ServersSession:
        """In any thread, for an adapter as it was."""
        with self.lock:
            version = self.snapshot(adapter) if isinstance(adapter, str) else adapter
            self.join(version)
            session = ServersSession(self, temperature, version)
            self._sessions.add(session)
            return session

    def snapshot(self, adapter: str) -> Version:
        """An adapter as it is now, on the disk. Those before it that no rank uses any more are unloaded."""
        with self.lock:
            version, unused = self.versions.now(adapter)
            self._unload(unused)
            return version

    def close(self) -> None:
        with self.lock:
            if self.closed:
                return
            with self._closing:
                self.closed = True
            self._hang_up(lambda turn: True)
            self._unload(self.versions.close())
        self.threads.close()
        self.control_threads.close()
        self.versions.cleanup()

    # -- adapters --------------------------------------------------------------------------------------------------------------

    def _unload(self, names: Sequence[str]) -> None:
        def unload(server: _Server, call: HttpCall) -> None:
            for name in names:
                if name in server.loaded:
                    server.loaded.discard(name)
                    with suppress(ServerError):  # it may have gone, or another rank was faster
                        self.api.unload(call, name)

        if names:
            self._each([s for s in self.servers if s.live], unload, HANDSHAKE_S)
        self.versions.remove(names)

    # -- servers ---------------------------------------------------------------------------------------------------------------

    def join(self, version: Version | None) -> None:
        """Servers that are back join; all get the adapter.

        A server that is away is tried again after RETRY_S, or at once if none is left.

        Raises:
            ConfigError: there is none.
        """
        with self.lock:
            since = time.monotonic() - (RETRY_S if any(s.live for s in self.servers) else 0.0)
            away = [s for s in self.servers if not s.live and s.lost_at <= since]
            self._each([s for s in away if not s.reason], self._handshake, HANDSHAKE_S)
            self._each([s for s in away if s.reason], self._handshake, RETRY_HANDSHAKE_S)
            if version is not None:
                name, folder = version.name, version.folder  # an idle thread holds on to its last call, which is not to hold the version
                lacking = [s for s in self.servers if s.live and name not in s.loaded]
                self._each(lacking, lambda server, call: self._load(server, call, name, folder), LOAD_S)
            self._check_left()

    def left(self, session: ServersSession) -> None:
        """A session has ended."""
        with self.lock:
            self._sessions.discard(session)

    def _check_left(self) -> None:
        if not any(s.live for s in self.servers):
            reasons = "; ".join(f"{s.url}: {s.reason}" for s in self.servers)
            raise ConfigError(
                f"data.rollout.servers: no server is left ({reasons}): start one (skillsd serve) and go on; the run's last "
                f"checkpoint stands."
            )

    def _handshake(self, server: _Server, call: HttpCall) -> None:
        base, loaded = self.api.handshake(call, self.policy.context_length)
        server.base, server.loaded, server.live, server.joined = base, loaded, True, server.joined + 1
        if server.reason:
            log.warning("data.rollout.servers: %s is back.", server.url)
        server.reason = ""

    def _load(self, server: _Server, call: HttpCall, name: str, folder: Path) -> None:
        self.api.load(call, name, folder)
        server.loaded.add(name)

    def _each(self, servers: Sequence[_Server], do: Callable[[_Server, HttpCall], None], seconds: float) -> None:
        """The same with several servers at one time. One that fails is dropped."""
        calls = [HttpCall(s.url, self.key, seconds) for s in servers]
        answers = [self.control_threads.submit(partial(do, s, call)) for s, call in zip(servers, calls, strict=True)]
        _, late = futures.wait(answers, seconds)
        for call, answer in zip(calls, answers, strict=True):
            if answer in late:
                call.hang_up()
        for s, answer in zip(servers, answers, strict=True):
            if isinstance(failed := answer.result(), Failure):
                self.drop(s, s.joined, f"no answer in {seconds:g} s" if answer in late else _reason(failed))

    def drop(self, server: _Server, joined: int, reason: str) -> None:
        """A server is lost, unless it has come back since. What it was asked for ends."""
        with self.lock:
            if server.joined != joined:
                return
            if server.live or not server.reason:
                left = sum(s.live for s in self.servers) - server.live
                log.warning("data.rollout.servers: %s is lost (%s); %d left.", server.url, reason, left)
            server.live, server.loaded, server.reason, server.lost_at = False, set(), reason, time.monotonic()
            self._hang_up(lambda turn: turn.server is server)

    def _hang_up(self, which: Callable[[_Turn], bool]) -> None:
        for turn in list(self._turns):
            if which(turn):
                turn.call.hang_up()

    # -- turns -----------------------------------------------------------------------------------------------------------------

    def least_busy(self) -> _Server:
        """The live server with the fewest rows in progress; of several, this rank's first.

        Raises:
            ConfigError: there is none.
        """
        with self.lock:
            self._check_left()
            rows = [server for session in self._sessions for server in list(session.server_of.values())]
            return min((s for s in self.servers if s.live), key=rows.count)

    def ask(self, session: ServersSession, server: _Server, ids: list[int], request: Request) -> _Turn:
        """Begin a turn. What comes of it goes to `session.arrived`. Raises RuntimeError if the engine is closed."""
        turn = _Turn(request, server, server.joined, HttpCall(server.url, self.key, self.seconds))
        arrived, version = session.arrived, session.version
        name, folder = (version.name, version.folder) if version is not None else (server.base, None)
        body = self.api.body(name, ids, request, session.temperature)
        max_bytes = self.api.max_bytes(ids, request)

        def work() -> Completion:
            try:
                answer = turn.call.ask("/v1/completions", max_bytes, body)
            except ServerError as e:
                if e.status != 404 or folder is None:
                    raise
                self._load(server, turn.call, name, folder)  # it was started anew, or somebody has unloaded it
                answer = turn.call.ask("/v1/completions", max_bytes, body)
            return self.api.completion(answer, request)

        def answered(future: Any) -> None:
            self._turns.discard(turn)
            arrived.put((turn, Failure("raised", "the engine is closed") if future.cancelled() else future.result()))

        with self._closing:
            if self.closed:
                raise RuntimeError("the engine is closed")
            self._turns.add(turn)
            self.threads.submit(work).add_done_callback(answered)
        return turn


class ServersSession(Session):
    """Rows by name; each turn is a request of its own, with all that the row has seen and sampled as its prompt."""

    continuous = True

    def __init__(self, engine: VllmServers, temperature: float, version: Version | None) -> None:
        self.engine, self.temperature, self.version = engine, temperature, version
        self.ids: dict[int, list[int]] = {}
        self.server_of: dict[int, _Server] = {}
        self.turns: dict[int, _Turn] = {}
        self.arrived: SimpleQueue[tuple[_Turn, Any]] = SimpleQueue()

    @property
    def busy(self) -> bool:
        return bool(self.turns)

    def submit(self, requests: Sequence[Request]) -> None:
        for r in requests:
            self.ids.setdefault(r.row, []).extend(r.new_ids)
            self._ask(r)

    def _ask(self, r: Request) -> None:
        server = self.server_of.get(r.row)
        if server is None or not server.live:
            server = self.server_of[r.row] = self.engine.least_busy()
        self.turns[r.row] = self.engine.ask(self, server, list(self.ids[r.row]), r)

    def step(self) -> list[tuple[int, Completion]]:
        """Waits a little. Turns that have ended come back in the order of their rows."""
        arrived = []
        with suppress(Empty):
            if self.turns:
                arrived.append(self.arrived.get(timeout=POLL_S))
            while True:
                arrived.append(self.arrived.get_nowait())
        for turn in self.turns.values():
            if turn.call.overdue:
                turn.call.hang_up()
        finished = []
        for turn, answer in sorted(arrived, key=lambda x: x[0].request.row):
            row = turn.request.row
            if self.turns.get(row) is not turn:
                continue  # forgotten
            if isinstance(answer, Failure):
                if turn.server.live and turn.server.joined == turn.joined and not turn.is_cut_by_us:
                    self.engine.drop(turn.server, turn.joined, _reason(answer))
                self._ask(turn.request)  # the same noise, so the same tokens
            else:
                del self.turns[row]
                self.ids[row] += answer.token_ids
                finished.append((row, answer))
        return finished

    def forget(self, rows: Iterable[int]) -> None:
        for row in rows:
            self.server_of.pop(row, None)
            self.ids.pop(row, None)
            if (turn := self.turns.pop(row, None)) is not None:
                turn.call.hang_up()

    def close(self, failed: bool = False) -> None:
        self.forget(list(self.ids))
        self.engine.left(self)


def _reason(failure: Failure) -> str:
    """Why a call of a server has failed, without the name of the exception that said so."""
    return failure.what.removeprefix("ServerError: ")
