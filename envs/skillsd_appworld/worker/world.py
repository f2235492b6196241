"""The child that an episode lives in. It runs what the agent writes, so it is confined, and nothing that it says is believed: the judge
plays its API calls again elsewhere.
"""

import os
import random
import re
import shutil
import signal
import socket
from typing import Any

import channel
import engine
import sandbox


def serve(sock: socket.socket, request: dict[str, Any], parent: int) -> None:
    """Open the world of a task, then execute code until the other end closes.

    Messages in: {code, max_chars}. Out, first: {task, supervisor, datetime, confinement, digest}, or {error}; then for each: {output, cut,
    completed, calls, digest, tampered}.
    """
    try:
        world, log, confinement = _open(sock, request, parent)
    except Exception as e:
        channel.send(sock, {"error": f"{type(e).__name__}: {e}"})
        return
    supervisor, fields = world.task.supervisor, ("first_name", "last_name", "email", "phone_number")
    first = {
        "task": world.task.instruction,
        "supervisor": {field: str(supervisor[field]) for field in fields},
        "datetime": str(world.task.datetime),
        "confinement": {"network": confinement.network, "files": confinement.files, "hidden": confinement.hidden},
        "digest": log.digest(),
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
        output, cut = _shorten(_reproducible(output, request["folder"]), message["max_chars"])
        completed = log.completed()
        intact = log.check()
        calls, sent = log.calls[sent:], len(log.calls)
        channel.send(
            sock,
            {"output": output, "cut": cut, "completed": completed, "calls": calls, "digest": log.digest(), "tampered": not intact},
        )


def _open(sock: socket.socket, request: dict[str, Any], parent: int) -> tuple[engine.AppWorld, engine.CallLog, sandbox.Confinement]:
    """Confine this process, build the world in it, and seal it."""
    folder, data, task_id = request["folder"], request["data"], request["task_id"]
    paths, tasks = sandbox.interpreter_paths(), os.path.join(data, "tasks")
    if inside := next((p for p in paths if os.path.realpath(tasks).startswith(p + "/")), None):
        raise PermissionError(f"the tasks lie beneath {inside}, which the interpreter reads: move them elsewhere")
    confinement = sandbox.confine(
        folder,
        [*paths, os.path.join(data, "api_docs"), os.path.join(data, "base_dbs")],
        sandbox.Limits(**request["limits"]),
        [sock.fileno()],
        environ={"APPWORLD_ROOT": os.path.join(folder, "root"), "APPWORLD_CACHE": folder, "HOME": folder, "PATH": ""},
        parent=parent,
        hidden=[tasks],
        folder_mb=4 * request["limits"]["file_mb"],
        prepare=lambda: engine.lay_out(folder, data, task_id),
        landlock=request["landlock"],
        namespace=request["namespace"],
    )
    world = engine.open_world(task_id, folder, request["turn_seconds"], request["max_api_calls"])
    shutil.rmtree(os.path.join(folder, "root"))  # all is in memory now; the rows that belong to the task would stand out in its files
    world._save_state = world.save_logs = lambda *args: None  # nobody reads them: the judge makes its own
    log = engine.CallLog(world)
    # What an agent draws from the system is the same in every run, as what it draws from `random` is.
    os.urandom = random._urandom = random.Random(0).randbytes  # type: ignore[attr-defined]
    sandbox.seal(confinement)
    return world, log, confinement


def _reproducible(text: str, folder: str) -> str:
    """Without what differs from process to process: the addresses in an object's repr, and the name of the working folder."""
    return re.sub(r"\bat 0x[0-9a-f]{6,}\b", "at 0x0", text).replace(folder, "/home/agent")


def _shorten(text: str, limit: int) -> tuple[list[str], int]:
    """[text], or its head and tail, and the number of characters left out."""
    if len(text) <= limit:
        return [text], 0
    tail = limit // 4
    return [text[: limit - tail], text[len(text) - tail :] if tail else ""], len(text) - limit
