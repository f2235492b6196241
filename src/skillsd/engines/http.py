"""HTTP to a server that may be gone, slow or hostile: with a deadline, a limit to what is read, and a way to hang up from outside."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from skillsd.bounded import visible
from skillsd.errors import causes, redacted

CONNECT_S = 5.0
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a machine that has lost its power is missed after 25 s
_ERROR_CHARS = 200  # characters of an error that a server words


class ServerError(Exception):
    """Why a server gave no usable answer, in one line. `status` is what it answered over HTTP, 0 for nothing."""

    def __init__(self, why: str, status: int = 0) -> None:
        super().__init__(why)
        self.status = status


def is_address(url: str) -> bool:
    """True for http(s)://host, maybe with a port and a path, and nothing else: settings are written to the run folder."""
    try:
        at = urlsplit(url)
        plain = at.scheme in ("http", "https") and at.hostname and at.port != 0 and not (at.query or at.fragment or "@" in at.netloc)
    except ValueError:
        return False
    return bool(plain) and not re.search(r"[\s\x00-\x20\x7f?#]|[^\x00-\x7f]", url)


def root(url: str) -> str:
    """A server's address without the /v1 that clients of its API are given."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


class HttpCall:
    """One or several requests, one after another, that share a deadline. The first call of `ask` starts the clock.

    Args:
        url: http(s)://host:port, and maybe a path in front of the requests' own.
        key: Sent as a bearer token if not empty.
        seconds: From the first request to the end of the last answer.

    Attributes:
        began: Monotonic seconds; 0 before the first request.
    """

    def __init__(self, url: str, key: str, seconds: float) -> None:
        self.url, self.key, self.seconds = url, key, seconds
        self.began = 0.0
        self.cut = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    @property
    def overdue(self) -> bool:
        return bool(self.began) and time.monotonic() > self.began + self.seconds

    def hang_up(self) -> None:
        """From any thread: what is being asked ends at once, and nothing else is."""
        with self._lock:
            self.cut = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def ask(self, path: str, max_bytes: int, body: dict[str, Any] | None = None) -> bytes:
        """GET, or POST of a JSON body. At most `max_bytes` bytes are read.

        Raises:
            ServerError: no connection, no answer in time, another status than 200, or a longer body.
        """
        self.began = self.began or time.monotonic()
        try:
            return self._ask(path, max_bytes, body)
        except (OSError, http.client.HTTPException, ValueError) as e:
            if self.overdue or isinstance(e, TimeoutError):
                raise ServerError(f"no answer in {self.seconds if self.overdue else CONNECT_S:g} s") from e
            raise ServerError(in_one_line(causes(e))) from e
        finally:
            self._socket = None

    def _ask(self, path: str, max_bytes: int, body: dict[str, Any] | None) -> bytes:
        at = urlsplit(self.url)
        kind = http.client.HTTPSConnection if at.scheme == "https" else http.client.HTTPConnection
        connection = kind(at.hostname or "", at.port, timeout=min(CONNECT_S, self._left()))
        try:
            connection.connect()
            sock: socket.socket = connection.sock
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            with self._lock:
                if self.cut:
                    raise ServerError("hung up")
                self._socket = sock
            sock.settimeout(self._left())
            headers = {"Connection": "close", "Accept-Encoding": "identity"}
            if self.key:
                headers["Authorization"] = f"Bearer {self.key}"
            if body is None:
                connection.request("GET", at.path + path, headers=headers)
            else:
                text = json.dumps(body, allow_nan=False).encode()
                connection.request("POST", at.path + path, text, {**headers, "Content-Type": "application/json"})
            with connection.getresponse() as response:
                parts, size = [], 0
                while not response.isclosed():  # newer Pythons close it, and the socket with it, when all is read
                    sock.settimeout(self._left())
                    part = response.read1(min(max_bytes - size, 1 << 16) + 1)
                    if not part:
                        break
                    parts.append(part)
                    size += len(part)
                    if size > max_bytes:
                        raise ServerError(f"its answer has more than {max_bytes} bytes")
                if response.length:  # read1 does not tell that the rest is missing
                    raise ServerError("its answer was cut short")
                text = b"".join(parts)
                if response.status != 200:
                    raise ServerError(
                        in_one_line(f"status {response.status}: {text[: 4 * _ERROR_CHARS].decode(errors='replace')}"), response.status
                    )
                return text
        finally:
            connection.close()

    def _left(self) -> float:
        left = self.began + self.seconds - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def in_one_line(text: str) -> str:
    """What a server said, fit for a log: one line, without keys and control characters."""
    return visible(redacted(" ".join(text.split())))[:_ERROR_CHARS]
