"""The child that an episode's code runs in. It holds no database, and can read none: each API call is a message to the world's process
(world.py), and what that answers is all there is to know. It runs what the agent writes, so it is confined, and nothing that it says is
believed.
"""

import builtins
import os
import random
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import appworld.collections.apis
import httpx
from appworld import AppWorld
from appworld.apps import get_all_apps
from appworld.apps.api_lib import set_local_date_and_time
from appworld.common.safety_guard import ALLOWED_MODULE_NAMES, SafetyGuard
from appworld.requester import Requester, RequestTracker, _get_api_name_to_doc
from IPython.terminal.embed import InteractiveShellEmbed
from traitlets.config.loader import Config

import channel
import engine
import sandbox

ALLOWED_MODULE_NAMES.discard("appworld")  # an agent has no business in the engine


def warm_up() -> None:
    """Import the apps' code and run some, so that no child has to. No database is ever opened in this process, so none can be left over."""
    engine.import_apps()
    for app in get_all_apps():
        _get_api_name_to_doc(app, include_private_apis=True)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Session(ours, 30, 100).execute("print(1)\n1 / 0")
    engine.freeze()


def serve(socks: list[socket.socket], request: dict[str, Any], parent: int) -> None:
    """Execute code until the trainer's end closes.

    Messages in: {code, max_chars}. Out, first: {confinement}, or {error}; then for each: {output, cut}.
    """
    sock, wire = socks
    try:
        session, confinement = _open(sock, wire, request, parent)
    except Exception as e:
        channel.send(sock, {"error": f"{type(e).__name__}: {e}"})
        return
    channel.send(sock, {"confinement": {"network": confinement.network, "files": confinement.files, "hidden": confinement.hidden}})
    while True:
        try:
            message = channel.receive(sock)
        except channel.Closed:
            return
        try:
            output = str(session.execute(message["code"]))
        except BaseException as e:  # KeyboardInterrupt and SystemExit escape execute()
            signal.alarm(0)
            session.safety_guard.disable()
            output = f"Execution failed. Traceback:\n{type(e).__name__}: {e}"
        output, cut = _shorten(_reproducible(output, request["folder"]), message["max_chars"])
        channel.send(sock, {"output": output, "cut": cut})


def _open(sock: socket.socket, wire: socket.socket, request: dict[str, Any], parent: int) -> tuple["Session", sandbox.Confinement]:
    """Confine this process, start a session in it, and seal it."""
    folder, data = request["folder"], request["data"]
    paths = sandbox.interpreter_paths()
    if inside := next((p for p in paths if os.path.realpath(data).startswith(p + "/")), None):
        raise PermissionError(f"the tasks lie beneath {inside}, which the interpreter reads: move them elsewhere")
    confinement = sandbox.confine(
        folder,
        paths,
        sandbox.Limits(**request["limits"]),
        [sock.fileno(), wire.fileno()],
        environ={"APPWORLD_ROOT": folder, "APPWORLD_CACHE": folder, "HOME": folder, "PATH": ""},
        parent=parent,
        hidden=[data],
        folder_mb=4 * request["limits"]["file_mb"],
        landlock=request["landlock"],
        namespace=request["namespace"],
    )
    session = Session(wire, request["turn_seconds"], request["max_api_calls"])
    set_local_date_and_time(datetime.fromisoformat(request["datetime"]))
    # What an agent draws is the same in every run.
    random.seed(session.random_seed)
    os.urandom = random._urandom = random.Random(0).randbytes  # type: ignore[attr-defined]
    sandbox.seal(confinement)
    return session, confinement


class Session(AppWorld):
    """AppWorld's way to execute code, with `apis` and `requester` that reach a world through a socket."""

    def __init__(self, wire: socket.socket, turn_seconds: int, max_api_calls: int) -> None:
        """Without AppWorld's own, which opens the databases."""
        vars(self).update(self.init_defaults.dict())
        self.timeout_seconds = turn_seconds
        self.max_interactions = 1_000_000
        self.max_api_calls_per_interaction = max_api_calls
        self.num_interactions, self.environment_io = 0, []
        self.output_db_home_path_on_disk = self.models_to_db_home_path = self.models_from_db_home_path = ""
        config = Config()
        config.HistoryManager.enabled = False
        self.shell = InteractiveShellEmbed(config=config)
        self.shell.ast_node_interactivity = "none"
        self.safety_guard = SafetyGuard()
        self.task = Nothing()
        requester = WireRequester(wire, max_api_calls)
        appworld.collections.apis.Requester = lambda **settings: requester
        try:
            self._execute_preamble()
        finally:
            appworld.collections.apis.Requester = Requester

    def _save_state(self, directory: str) -> None:
        """There is none here."""

    def save_logs(self) -> None:
        """Nobody reads them."""


class Nothing:
    """Stands for the task, of which this process knows nothing."""

    datetime = None
    allowed_apps = ()


class WireRequester(Requester):
    """AppWorld's requester; its client is a socket."""

    def __init__(self, wire: socket.socket, max_api_calls: int) -> None:
        """Without AppWorld's own, which opens the databases."""
        self.apps = tuple(sorted(get_all_apps()))
        self.client = httpx.Client(base_url="http://testserver", transport=Wire(wire))
        self.remote_apis_url = self.date_and_time = self.time_freezer_or_id = None
        self.request_tracker = RequestTracker(max_num_requests=max_api_calls)
        self.raise_on_failure = True
        self.raise_on_extra_parameters = self.parse_datetimes = self.munchify_response = False


class Wire(httpx.BaseTransport):
    """Makes requests in the world's process, one at a time, whatever thread asks."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire, self._lock = wire, threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """What the API answered, or an exception like the one that it raised."""
        headers = {name: request.headers[name] for name in engine.HEADERS if name in request.headers}
        body = request.read().decode("utf-8", "surrogateescape")
        with undisturbed(), self._lock:
            channel.send(self._wire, [request.method, request.url.raw_path.decode(), headers, body])
            answer = channel.receive(self._wire)
        if "error" in answer:
            raise _like(*answer["error"])
        return httpx.Response(answer["status"], headers=answer["headers"], content=answer["body"].encode("utf-8", "surrogatepass"))


def _like(module: str, name: str, text: str) -> Exception:
    """An exception that a traceback shows as that one."""
    known = getattr(builtins, name, None) if module == "builtins" else None
    if isinstance(known, type) and issubclass(known, OSError | MemoryError):
        return known(text)
    return type(name, (Exception,), {"__module__": module})(text)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold the time limit's alarm back until a call is done: the next answer would be that of this call."""
    if threading.current_thread() is not threading.main_thread():  # it strikes only there
        yield
        return
    late: list[tuple[int, Any]] = []
    handler = signal.signal(signal.SIGALRM, lambda number, frame: late.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
    if late and callable(handler):
        handler(*late[0])


def _reproducible(text: str, folder: str) -> str:
    """Without what differs from process to process: the addresses in an object's repr, and the name of the working folder."""
    return re.sub(r"\bat 0x[0-9a-f]{6,}\b", "at 0x0", text).replace(folder, "/home/agent")


def _shorten(text: str, limit: int) -> tuple[list[str], int]:
    """[text], or its head and tail, and the number of characters left out."""
    if len(text) <= limit:
        return [text], 0
    tail = limit // 4
    return [text[: limit - tail], text[len(text) - tail :] if tail else ""], len(text) - limit
