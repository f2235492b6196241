"""The child that holds an episode's databases. No agent's code runs in it: that is in a process of its own (agent.py), which asks for one
API call after another over a socket. What comes on that socket is hostile, so this process is confined, too.
"""

import os
import resource
import select
import shutil
import socket
from typing import Any

import channel
import engine
import sandbox

SENT_CHARS = 4 << 20
"""What the API calls of an episode may send, all together."""
ASK_SECONDS = 5.0
"""Time limit of one part of a message of the agent's process."""


def warm_up() -> None:
    """Play one episode."""
    engine.warm_up(judge=False)


def serve(socks: list[socket.socket], request: dict[str, Any], parent: int) -> None:
    """Open the world of a task, then make the API calls that the agent's process asks for, until the trainer's end closes.

    Out to the trainer's side, first: {task, supervisor, datetime, digest}, or {error}. Then, for each message, what happened since the last
    one: {calls, completed, digest, seconds} (CPU time in all), or {lost} with a reason why the episode cannot go on.
    """
    sock, wire = socks
    try:
        world, calls = _open(socks, request, parent)
    except Exception as e:
        channel.send(sock, {"error": f"{type(e).__name__}: {e}"})
        return
    supervisor, fields = world.task.supervisor, ("first_name", "last_name", "email", "phone_number")
    first = {
        "task": world.task.instruction,
        "supervisor": {field: str(supervisor[field]) for field in fields},
        "datetime": str(world.task.datetime),
        "digest": calls.digest(),
    }
    channel.send(sock, first)
    desk = Desk(calls, wire, request["max_api_calls"])
    poll, reported = select.poll(), 0
    for end in socks:
        poll.register(end, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if wire.fileno() in ready and not desk.answer():
            poll.unregister(wire)
            wire.close()  # who waits for an answer need not wait for ever
        if sock.fileno() not in ready:
            continue
        try:
            channel.receive(sock)
        except channel.Closed:
            return
        if desk.lost:
            channel.send(sock, {"lost": desk.lost})
            continue
        new, reported, desk.asked = calls.made[reported:], len(calls.made), 0
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = used.ru_utime + used.ru_stime
        channel.send(sock, {"calls": new, "completed": calls.completed(), "digest": calls.digest(), "seconds": seconds})


class Desk:
    """Answers the agent's process.

    Args:
        calls: The world's.
        wire: The socket to the agent's process.
        max_api_calls: So many are answered until `asked` is set back.

    Attributes:
        lost: Why the episode cannot go on; "" while it can.
    """

    def __init__(self, calls: engine.Calls, wire: socket.socket, max_api_calls: int) -> None:
        self.calls, self.wire, self.max_api_calls = calls, wire, max_api_calls
        self.asked = self.sent = 0
        self.lost = ""

    def answer(self) -> bool:
        """One call. False if none can follow: the other end is gone or says what no agent's process says, or the episode is lost."""
        try:
            call = channel.receive(self.wire, ASK_SECONDS, SENT_CHARS)
            if not _is_call(call):
                return False
            channel.send(self.wire, self._made(*call))
        except channel.Closed:
            return False
        except MemoryError:
            self.lost = self.lost or "ran out of memory"
        return not self.lost

    def _made(self, method: str, path: str, headers: dict[str, str], body: str) -> dict[str, Any]:
        self.asked += 1
        self.sent += len(path) + len(body) + sum(map(len, headers.values()))
        if self.sent > SENT_CHARS:
            self.lost = f"was sent more than {SENT_CHARS >> 20} MB by the agent's code"
        if self.lost or self.asked > self.max_api_calls:
            return {"error": ["builtins", "PermissionError", self.lost or f"more than {self.max_api_calls} calls"]}
        try:
            response = self.calls.make(method, path, headers, body)
        except MemoryError:  # half a call is none that the judge could make
            self.lost = "ran out of memory in an API call"
            return {"error": ["builtins", "MemoryError", ""]}
        except Exception as e:
            return {"error": [type(e).__module__, type(e).__qualname__, str(e)]}
        kept = {name: response.headers[name] for name in ("content-type", "location") if name in response.headers}
        return {"status": response.status_code, "headers": kept, "body": response.text}


def _is_call(call: Any) -> bool:
    """[method, path, headers, body], all of it text."""
    if type(call) is not list or len(call) != 4 or type(call[2]) is not dict or len(call[2]) > len(engine.HEADERS):
        return False
    return all(type(text) is str for text in (call[0], call[1], call[3], *call[2].values()))


def _open(socks: list[socket.socket], request: dict[str, Any], parent: int) -> tuple[engine.AppWorld, engine.Calls]:
    """Confine this process, build the world in it, and seal it."""
    folder, data, task_id = request["folder"], request["data"], request["task_id"]
    root, tasks = os.path.join(folder, "root"), os.path.join(data, "tasks")
    confinement = sandbox.confine(
        folder,
        [*sandbox.interpreter_paths(), os.path.join(data, "api_docs"), os.path.join(data, "base_dbs")],
        sandbox.Limits(**request["limits"]),
        [end.fileno() for end in socks],
        environ={"APPWORLD_ROOT": root, "APPWORLD_CACHE": folder, "HOME": folder, "PATH": ""},
        parent=parent,
        hidden=[tasks],
        folder_mb=4 * request["limits"]["file_mb"],
        prepare=lambda: engine.lay_out(folder, data, task_id),
        landlock=request["landlock"],
        namespace=request["namespace"],
    )
    world = engine.open_world(task_id, folder)
    calls = engine.Calls(world, os.path.join(root, "data", "tasks", task_id, "dbs"))
    shutil.rmtree(root)  # all is in memory now
    sandbox.seal(confinement)
    return world, calls
