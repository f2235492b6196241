"""Messages between the trainer's side and a worker: a length, then JSON. Standard library only; both sides load this file."""

import json
import socket
import struct
import time
from typing import Any

_HEAD = struct.Struct("!I")
MAX_BYTES = 64 * 1024 * 1024
"""Longest message that a worker takes from the trainer's side."""


class Closed(Exception):
    """The other end is gone, late, or sends rubbish. The text says which."""


def send(sock: socket.socket, message: Any) -> None:
    """Write one message. Closed if nobody reads it."""
    data = json.dumps(message).encode()
    try:
        sock.sendall(_HEAD.pack(len(data)) + data)
    except TimeoutError as e:
        raise Closed("it does not read") from e
    except OSError as e:
        raise Closed("it is gone") from e


def receive(sock: socket.socket, seconds: float | None = None, max_bytes: int = MAX_BYTES) -> Any:
    """Read one message. Closed after `seconds` in all, at the stream's end, and for anything but JSON of at most `max_bytes`."""
    end = None if seconds is None else time.monotonic() + seconds
    (length,) = _HEAD.unpack(_exactly(sock, _HEAD.size, end))
    if length > max_bytes:
        raise Closed(f"it sent a message of {length} bytes")
    try:
        return json.loads(_exactly(sock, length, end))
    except (ValueError, RecursionError) as e:
        raise Closed("it sent no JSON") from e


def _exactly(sock: socket.socket, n: int, end: float | None) -> bytearray:
    data = bytearray()
    while len(data) < n:
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            raise Closed("the time limit")
        try:
            sock.settimeout(left)
            part = sock.recv(min(n - len(data), 1 << 20))
        except TimeoutError as e:
            raise Closed("the time limit") from e
        except OSError as e:
            raise Closed("it is gone") from e
        if not part:
            raise Closed("it is gone")
        data += part
    return data
