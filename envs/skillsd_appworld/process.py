"""Warm processes and the children that they fork, seen from the trainer's side (worker/zygote.py is the other)."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skillsd_appworld import channel

ZYGOTE = Path(__file__).parent / "worker" / "zygote.py"
START_SECONDS = 180.0
"""Time limit of a warm process's start; it takes seconds."""


class Lost(Exception):
    """A child is gone: killed at a limit, dead, or it sent rubbish. The text goes on after "the process"."""


class Child:
    """A forked process: its socket, a handle to kill it by, and its working folder."""

    def __init__(self, sock: socket.socket, pid: int, handle: int, zygote: "Zygote", folder: Path) -> None:
        self.sock, self.pid, self.handle, self.zygote, self.folder = sock, pid, handle, zygote, folder
        self.closed = False

    def send(self, message: Any) -> None:
        """Lost if it does not read."""
        self.sock.settimeout(30)
        try:
            channel.send(self.sock, message)
        except channel.Closed as e:
            raise Lost(self._why(str(e), 30)) from e

    def receive(self, seconds: float) -> Any:
        """The next message. Lost after `seconds`."""
        try:
            return channel.receive(self.sock, seconds)
        except channel.Closed as e:
            raise Lost(self._why(str(e), seconds)) from e

    def close(self) -> None:
        """Kill it, wait for its end and remove its folder."""
        if self.closed:
            return
        self.closed = True
        try:
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            select.select([self.handle], [], [], 10)  # readable when the process has ended
        except ProcessLookupError:
            pass
        self.sock.close()
        os.close(self.handle)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.zygote.release()

    def _why(self, what: str, seconds: float) -> str:
        if what == "the time limit":
            return f"ran past the time limit of {seconds:g} s and was killed"
        if what != "it is gone":
            return what.removeprefix("it ")
        select.select([self.handle], [], [], 1)
        code = self.zygote.exit_code(self.pid)
        if code == -signal.SIGKILL:
            return "was killed by the kernel: its CPU time is used up, or the machine's memory"
        return "ended" if code is None or code >= 0 else f"was killed by signal {-code}"


class Zygote:
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
                [str(python), "-P", "-s", str(ZYGOTE), str(theirs.fileno()), role], cwd=folder, env=environ, pass_fds=[theirs.fileno()],
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip
        theirs.close()
        self.forks = self.live = 0
        self._ready = False
        self._lock = threading.Lock()

    def fork(self, request: dict[str, Any], folder: Path) -> Child:
        """A child that serves `request`. OSError or ValueError if this process is no more."""
        ours, theirs = socket.socketpair()
        try:
            with self._lock:
                self._wait()
                socket.send_fds(self.control, [json.dumps(request).encode()], [theirs.fileno()])
                data, fds, _, _ = socket.recv_fds(self.control, 4096, 1)
                pid = json.loads(data)["pid"]
                self.forks += 1
                self.live += 1
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Child(ours, pid, fds[0], self, folder)

    def release(self) -> None:
        """One child less."""
        with self._lock:
            self.live -= 1

    def exit_code(self, pid: int) -> int | None:
        """Of an ended child, negative for a signal; None if unknown."""
        try:
            with self._lock:
                self.control.send(json.dumps({"status": pid}).encode())
                status = json.loads(self.control.recv(4096))["status"]
                return None if status is None else int(status)
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """End it; its children die with it."""
        self.control.close()
        self.process.kill()
        self.process.wait()

    def _wait(self) -> None:
        if self._ready:
            return
        told = json.loads(self.control.recv(1 << 16) or b"{}")
        if "pid" not in told:
            raise ValueError(told.get("error", "it ended while it started"))
        self._ready = True


class Herd:
    """The current warm process of one kind, its successor, and the former ones that still have children.

    Args:
        start: Makes one.
        forks: Children after which one is replaced.
    """

    def __init__(self, start: Callable[[], Zygote], forks: int) -> None:
        self.start, self.forks = start, forks
        self.current, self.next = start(), None  # type: Zygote, Zygote | None
        self.former: list[Zygote] = []
        self._lock = threading.Lock()

    def fork(self, request: dict[str, Any], folder: Path) -> Child:
        """A child that serves `request`; a warm process that died is replaced. OSError or ValueError if the new one does not run either."""
        with self._lock:
            self._renew()
            try:
                return self.current.fork(request, folder)
            except (OSError, ValueError):
                self.current.close()
                self.current = self.start()
                return self.current.fork(request, folder)

    def pids(self) -> list[int]:
        """Of the warm processes."""
        return [z.process.pid for z in (self.current, self.next, *self.former) if z is not None]

    def close(self) -> None:
        """End all."""
        with self._lock:
            for zygote in (self.current, self.next, *self.former):
                if zygote is not None:
                    zygote.close()

    def _renew(self) -> None:
        """Start the successor early enough to be warm when its time comes."""
        for zygote in [z for z in self.former if z.live == 0]:
            zygote.close()
            self.former.remove(zygote)
        if self.next is None and self.current.forks >= self.forks * 3 // 4:
            self.next = self.start()
        if self.next is not None and self.current.forks >= self.forks:
            self.former.append(self.current)
            self.current, self.next = self.next, None
