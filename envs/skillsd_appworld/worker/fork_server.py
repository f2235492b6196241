"""A warm process in AppWorld's interpreter that forks one child an episode: `python fork_server.py FD world|agent|judge`.

It has imported what its children need and used it once, so a child starts in a tenth of a second and shares most of its memory with the
others. FD is a socket to the trainer's side. On it come messages with file descriptors: the sockets that the child will serve.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Warm up, then fork on demand until the socket closes. Children die with this process (sandbox.confine)."""
    control, role = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:0] = [here, os.path.dirname(here)]  # the second for channel, which both sides load
    try:
        module = importlib.import_module(role)
        module.warm_up()
    except Exception as e:
        control.send(json.dumps({"error": f"{type(e).__name__}: {e}"}).encode())
        raise
    del sys.path[:2]
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it shares
    control.send(json.dumps({"pid": os.getpid()}).encode())
    ended: dict[int, int] = {}
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1 << 16, 2)
        if not data:
            return
        _reap(ended)
        request: dict[str, Any] = json.loads(data)
        if "status" in request:  # why did it end?
            control.send(json.dumps({"status": ended.pop(request["status"], None)}).encode())
            continue
        try:
            pid, handle = _fork(control, fds, request, module.serve)
        except OSError as e:  # no memory, no process left: the others live on
            control.send(json.dumps({"error": f"{type(e).__name__}: {e}"}).encode())
            continue
        finally:
            for fd in fds:
                os.close(fd)
        socket.send_fds(control, [json.dumps({"pid": pid}).encode()], [handle])
        os.close(handle)


def _fork(control: socket.socket, fds: list[int], request: dict[str, Any], serve: Callable[..., None]) -> tuple[int, int]:
    """A child that serves `request` over `fds`: its pid, and a handle through which a kill can never hit another process."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            control.close()
            serve([socket.socket(fileno=fd) for fd in fds], request, parent)
            code = 0
        finally:
            os._exit(code)
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        raise


def _reap(ended: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        ended[pid] = os.waitstatus_to_exitcode(status)
        if len(ended) > 1000:
            del ended[next(iter(ended))]


if __name__ == "__main__":
    main()
