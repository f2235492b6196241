"""The child that an episode lives in. It runs what the agent writes, so it is confined, and nothing that it says is believed: the judge
plays its API calls again elsewhere.
"""

import os
import signal
import socket
from typing import Any

import channel

import engine
import sandbox


def serve(sock: socket.socket, request: dict[str, Any], parent: int) -> None:
    """Open the world of a task, then execute code until the other end closes.

    Messages in: {code, max_chars}. Out, first: {task, supervisor, datetime, confinement, digest}; then for each: {output, cut,
    completed, calls, digest, tampered}.
    """
    folder, paths = request["folder"], sandbox.interpreter_paths()
    for truth in request["hidden"]:
        if inside := next((p for p in paths if os.path.realpath(truth).startswith(p + "/")), None):
            raise PermissionError(f"the tasks lie beneath {inside}, which the interpreter reads: move them elsewhere")
    confinement = sandbox.confine(
        folder,
        [*paths, *request["readable"]],
        sandbox.Limits(**request["limits"]),
        [sock.fileno()],
        environ={"APPWORLD_ROOT": os.environ["APPWORLD_ROOT"], "APPWORLD_CACHE": folder, "HOME": folder, "PATH": ""},
        parent=parent,
        hidden=request["hidden"],
        landlock=request["landlock"],
        namespace=request["namespace"],
    )
    world = engine.open_world(request["task_id"], folder, request["turn_seconds"], request["max_api_calls"])
    world._save_state = world.save_logs = lambda *args: None  # nobody reads them: the judge makes its own
    tape = engine.Tape(world)
    sandbox.seal(confinement)
    supervisor, fields = world.task.supervisor, ("first_name", "last_name", "email", "phone_number")
    first = {
        "task": world.task.instruction,
        "supervisor": {field: str(supervisor[field]) for field in fields},
        "datetime": str(world.task.datetime),
        "confinement": {"network": confinement.network, "files": confinement.files, "hidden": confinement.hidden},
        "digest": tape.digest(),
    }
    channel.send(sock, first)
    sent = 0
    while True:
        try:
            message = channel.receive(sock)
        except channel.Closed:
            return
        try:
            output = str(world.execute(message["code"]))
        except BaseException as e:  # KeyboardInterrupt and SystemExit escape execute()
            signal.alarm(0)
            world.safety_guard.disable()
            output = f"Execution failed. Traceback:\n{type(e).__name__}: {e}"
        output, cut = _shorten(output, message["max_chars"])
        completed = tape.completed()
        intact = tape.check()
        calls, sent = tape.calls[sent:], len(tape.calls)
        channel.send(
            sock,
            {"output": output, "cut": cut, "completed": completed, "calls": calls, "digest": tape.digest(), "tampered": not intact},
        )


def _shorten(text: str, limit: int) -> tuple[list[str], int]:
    """[text], or its head and tail, and the number of characters left out."""
    if len(text) <= limit:
        return [text], 0
    tail = limit // 4
    return [text[: limit - tail], text[len(text) - tail :] if tail else ""], len(text) - limit
