"""`skillsd view`: runs in the browser, on this machine alone."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Sequence

from werkzeug.serving import make_server

from skillsd.analysis.pictures import TRUST
from skillsd.analysis.view.app import create_app
from skillsd.analysis.view.site import Site
from skillsd.errors import ConfigError, Parser
from skillsd.files.run_folder import folder_of

HOST = "127.0.0.1"


def view(args: Sequence[str]) -> None:
    """`skillsd view ARGS`: serve run folders until Ctrl-C.

    Raises:
        ConfigError: unknown arguments, no run folder, or the port is taken.
    """
    parser = Parser(
        prog="skillsd view", description=f"Show runs in the browser, live while they train. Only this machine can open the page. {TRUST}"
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders (trainer.default_root_dir); of several, two can be compared")
    parser.add_argument("--port", type=int, default=0, help="of 127.0.0.1; default: any that is free")
    parser.add_argument("--token", help="what the page's address holds, so that only those who know it can read; default: a new secret")
    parser.add_argument("--device", default="cpu", help="where tokens are scored for the heat maps")
    given = parser.parse_args(args)
    if not 0 <= given.port < 65536:
        raise ConfigError(f"--port is {given.port}: give 1 to 65535, or 0 for any that is free.")
    token = given.token or secrets.token_urlsafe(16)
    if not token.replace("-", "").replace("_", "").isalnum() or not token.isascii():
        raise ConfigError("--token: give letters, digits, - and _ alone, as it is part of an address.")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line a request
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a model is loaded for a page, not for the terminal
    with Site([str(folder_of(run)) for run in given.runs], given.device) as site:
        try:
            if given.port:
                socket.create_server((HOST, given.port)).close()  # werkzeug prints what it thinks of a port that is taken
        except OSError as e:
            raise ConfigError(f"--port: {given.port} cannot be used ({e.strerror}): name another, or leave it out.") from e
        server = make_server(HOST, given.port, create_app(site, token), threaded=True)
        server.daemon_threads = True  # type: ignore[attr-defined]  # Ctrl-C does not wait for a page that is being made
        print(f"http://{HOST}:{server.server_port}/{token}/  (Ctrl-C ends it; keys: ?)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
        finally:
            server.server_close()
