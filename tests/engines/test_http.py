"""What is read of an HTTP answer, under Pythons that close it with its last byte and under those that do not."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from skillsd.engines.http import HttpCall, ServerError

BODIES = {"/short": b"x" * 10, "/long": b"x" * 300_000, "/empty": b"", "/cut": b"x" * 10}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"4\r\nabcd\r\n" * 5 + b"0\r\n\r\n")
            return
        body = BODIES[self.path]
        self.send_header("Content-Length", str(len(body) + 5 * (self.path == "/cut")))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=["as it is", "closes"])
def python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since 3.11.8, 3.12.2 and 3.13 the last byte closes the answer, and with it the socket."""
    plain = http.client.HTTPResponse.read1

    def read1(self: Any, n: int = -1) -> bytes:
        part = plain(self, n)
        if self.length == 0 and self.fp is not None:
            self._close_conn()
        return part

    if request.param == "closes":
        monkeypatch.setattr(http.client.HTTPResponse, "read1", read1)


@pytest.mark.usefixtures("python")
def test_answers(url):
    line = HttpCall(url, "", 10)
    assert [len(line.ask(path, 1 << 20)) for path in ("/short", "/long", "/empty", "/chunked")] == [10, 300_000, 0, 20]
    with pytest.raises(ServerError, match="cut short"):
        line.ask("/cut", 100)
    with pytest.raises(ServerError, match="more than 1000 bytes"):
        line.ask("/long", 1000)
