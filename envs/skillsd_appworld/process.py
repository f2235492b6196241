"""Warm processes and the children that they fork, seen from the trainer's side (worker/fork_server.py is the other)."""

import json
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from skillsd_appworld import channel

SCRIPT = Path(__file__).parent / "worker" / "fork_server.py"
START_SECONDS = 180.0
"""Time limit of a warm process's start; it takes seconds."""


class Lost(Exception):
    """A child is gone: killed at a limit, dead, or it sent rubbish. The text is half a sentence: which process, and what became of it."""


def remove(folder: Path) -> None:
    """Delete a folder that hostile code may have filled: rm, unlike shutil before Python 3.13, goes as deep as it has to."""
    try:
        folder.rmdir()
    except OSError:
        subprocess.run(["rm", "-rf", "--", str(folder)], stderr=subprocess.DEVNULL)


def _readable(fd: int, seconds: float) -> bool:
    """Wait until a descriptor can be read; a process's handle can when it has ended."""
    poll = select.poll()  # select.select knows no descriptor beyond 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


class Refused(Exception):
    """The machine did not give a new process. The text says why."""


class Child:
    """A forked process: its socket, a handle to kill it by, its working folder, and its name in an error."""

    def __init__(self, sock: socket.socket, pid: int, handle: int, server: "ForkServer", folder: Path) -> None:
        self.sock, self.pid, self.handle, self.server, self.folder = sock, pid, handle, server, folder
        self.name = f"the {server.role}'s process"
        self.closed = False

    def send(self, message: Any, seconds: float = 10.0) -> None:
        """Lost if it does not read for so long."""
        self.sock.settimeout(seconds)
        try:
            channel.send(self.sock, message)
        except channel.Closed as e:
            raise self.lost(self._why(str(e), seconds)) from e

    def receive(self, seconds: float, max_bytes: int = channel.MAX_BYTES) -> Any:
        """The next message. Lost after `seconds`, and if it is longer than `max_bytes`."""
        try:
            return channel.receive(self.sock, seconds, max_bytes)
        except channel.Closed as e:
            raise self.lost(self._why(str(e), seconds)) from e

    def lost(self, what: str) -> Lost:
        """The exception that says what became of it."""
        return Lost(f"{self.name} {what}")

    def close(self) -> None:
        """Kill it, wait for its end and remove its folder."""
        if self.closed:
            return
        self.closed = True
        try:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
                _readable(self.handle, 10)
            self.sock.close()
            os.close(self.handle)
            remove(self.folder)
        finally:
            self.server.release()

    def _why(self, what: str, seconds: float) -> str:
        if what == "the time limit":
            return f"ran past the time limit of {seconds:g} s and was killed"
        if what != "it is gone":
            return what.removeprefix("it ")
        _readable(self.handle, 1)
        code = self.server.exit_code(self.pid)
        if code == -signal.SIGKILL:
            return "was killed by the kernel: its CPU time is used up, or the machine's memory"
        return "ended" if code is None or code >= 0 else f"was killed by signal {-code}"


class ForkServer:
    """A warm process. It starts in the background: the first fork waits for it."""

    def __init__(self, python: Path, role: str, folder: Path, environ: dict[str, str], errors: Path) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(START_SECONDS)
        environ = {  # nothing of the host's
            "PATH": "/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1",
            **environ,
        }  # fmt: skip
        with errors.open("ab") as log:
            self.process = subprocess.Popen(
                [str(python), "-P", "-s", str(SCRIPT), str(theirs.fileno()), role], cwd=folder, env=environ, pass_fds=[theirs.fileno()],
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip
        theirs.close()
        self.role, self.folder = role, folder
        self.forks = self.live = 0
        self._ready = False
        self._lock = threading.Lock()

    def fork(self, request: dict[str, Any], folder: Path, *more: socket.socket) -> Child:
        """A child that serves `request`, with `more` sockets beside its own. Refused if there is none to be had, OSError or ValueError if
        this process is no more."""
        ours, theirs = socket.socketpair()
        try:
            with self._lock:
                self._wait()
                answer, fds = self._exchange(request, [end.fileno() for end in (theirs, *more)])
                if "error" in answer:
                    raise Refused(answer["error"])
                self.forks += 1
                self.live += 1
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Child(ours, answer["pid"], fds[0], self, folder)

    def release(self) -> None:
        """One child less."""
        with self._lock:
            self.live -= 1

    def exit_code(self, pid: int) -> int | None:
        """Exit code of an ended child, negative for a signal; None if unknown."""
        try:
            with self._lock:
                status = self._exchange({"status": pid}, [])[0]["status"]
                return None if status is None else int(status)
        except (OSError, ValueError):
            return None

    @property
    def warm(self) -> bool:
        """Return whether a fork need not wait."""
        return self._ready or _readable(self.control.fileno(), 0)

    def close(self) -> None:
        """End it; its children die with it."""
        self.control.close()
        self.process.kill()
        self.process.wait()
        remove(self.folder)

    def _exchange(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """One question and its answer. After an interruption between the two nobody could tell whose the next answer is: it ends."""
        try:
            socket.send_fds(self.control, [json.dumps(request).encode()], fds)
            data, got, _, _ = socket.recv_fds(self.control, 1 << 16, 1)
            answer = dict(json.loads(data))
            if "pid" in answer and not got:
                raise OSError("this process has no file descriptor left")
            return answer, got
        except BaseException:
            self.control.close()
            raise

    def _wait(self) -> None:
        if self._ready:
            return
        answer = json.loads(self.control.recv(1 << 16) or b"{}")
        if "pid" not in answer:
            raise ValueError(answer.get("error", "it ended while it started"))
        self._ready = True


class ForkServers:
    """The current warm process of one kind, its successor, and the former ones that still have children.

    Args:
        start: Makes one.
        forks: Children after which one is replaced, as soon as the next is warm.
    """

    def __init__(self, start: Callable[[], ForkServer], forks: int) -> None:
        self.start, self.forks = start, forks
        self.current, self.next = start(), None  # type: ForkServer, ForkServer | None
        self.former: list[ForkServer] = []
        self._lock = threading.Lock()

    def fork(self, request: dict[str, Any], folder: Path, *more: socket.socket) -> Child:
        """A child that serves `request`; a warm process that died is replaced. OSError, ValueError or Refused without one."""
        with self._lock:
            self._renew()
            try:
                return self.current.fork(request, folder, *more)
            except (OSError, ValueError):
                self.current.close()
                self.current = self.start()
                return self.current.fork(request, folder, *more)

    def pids(self) -> list[int]:
        """Process ids of the warm processes."""
        return [z.process.pid for z in (self.current, self.next, *self.former) if z is not None]

    def close(self) -> None:
        """End all."""
        with self._lock:
            for server in (self.current, self.next, *self.former):
                if server is not None:
                    server.close()

    def _renew(self) -> None:
        """Start the successor early enough to be warm when its time comes."""
        for server in [z for z in self.former if z.live == 0]:
            server.close()
            self.former.remove(server)
        if self.next is None and self.current.forks >= self.forks * 3 // 4:
            self.next = self.start()
        if self.next is not None and self.current.forks >= self.forks and self.next.warm:
            self.former.append(self.current)
            self.current, self.next = self.next, None
