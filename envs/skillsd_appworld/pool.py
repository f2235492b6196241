"""Worlds in other processes.

Two kinds of warm processes fork one child for each job: one, which sees no ground truth, an episode's world; the other, on the full root,
the judge that scores it. Whatever happens to a child costs its own episode at most.
"""

import atexit
import fcntl
import os
import tempfile
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from skillsd_appworld.process import START_SECONDS, Child, ForkServer, ForkServers, Lost, Refused, remove

LINGER_SECONDS = 30.0
"""How long the processes stay when the last environment is closed."""
REPLY_BYTES = 8 << 20
"""Longest reply of a world."""
SENT_CHARS = 4 << 20
"""What the API calls of an episode may send, all together."""
JUDGE_SECONDS = 300.0
"""Time limit of scoring an episode; it takes less than one."""


@dataclass(frozen=True)
class Settings:
    """What the environments of one pool share.

    Args:
        python: AppWorld's interpreter.
        root: Folder that holds data/.
        turn_seconds: Time limit of one piece of code.
        grace_seconds: So much later the host kills a world that did not stop by itself.
        max_api_calls: API calls of one piece of code.
        memory_mb: Address space of an episode, beyond the engine's own.
        cpu_seconds: CPU time of an episode.
        file_mb: Longest file in an episode's folder.
        forks: Children after which a warm process is replaced.
        landlock: Use it for files if the kernel has it; otherwise a sealed world opens no file at all.
        namespace: Use a network namespace if the kernel allows; sockets are refused in either case.
    """

    python: Path
    root: Path
    turn_seconds: int = 30
    grace_seconds: int = 5
    max_api_calls: int = 1000
    memory_mb: int = 512
    cpu_seconds: int = 300
    file_mb: int = 16
    forks: int = 500
    landlock: bool = True
    namespace: bool = True


class World:
    """One episode's world. What it says may come from the agent's code: it is bounded, checked, shown and judged, but never believed."""

    def __init__(self, child: Child, first: dict[str, Any], settings: Settings) -> None:
        self.child, self.first, self.settings = child, first, settings
        self.calls: list[Any] = []
        self.sent = 0
        self.digest = str(first["digest"])
        self.tampered = False

    def execute(self, code: str, max_chars: int) -> tuple[list[str], int, bool]:
        """Run a piece of code.

        Returns:
            [output] or [its head, its tail], the number of characters left out, and whether the task is declared complete.

        Raises:
            Lost: the process did not survive it, or said what no world says.
        """
        s = self.settings
        self.child.send({"code": code, "max_chars": max_chars}, s.grace_seconds)
        reply = self.child.receive(s.turn_seconds + s.grace_seconds, REPLY_BYTES)
        try:
            output, cut, calls, digest = reply["output"], reply["cut"], reply["calls"], reply["digest"]
            sound = (
                type(output) is list and 1 <= len(output) <= 2 and all(type(part) is str for part in output)
                and sum(map(len, output)) <= max_chars and type(cut) is int and 0 <= cut < 1 << 40
                and type(digest) is str and len(digest) == 64 and len(calls) <= s.max_api_calls + 1 and all(map(_is_call, calls))
            )  # fmt: skip
            tampered, completed = bool(reply["tampered"]), bool(reply["completed"])
        except (KeyError, TypeError) as e:
            raise Lost(f"sent rubbish ({type(e).__name__})") from e
        if not sound:
            raise Lost("sent rubbish")
        self.sent += sum(len(call[1]) + len(call[3]) + sum(map(len, call[2].values())) for call in calls)
        if self.sent > SENT_CHARS:
            raise Lost(f"sent more than {SENT_CHARS >> 20} MB to the APIs")
        self.calls += calls
        self.digest, self.tampered = digest, self.tampered or tampered
        return output, cut, completed

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.child.close()


def _is_call(call: Any) -> bool:
    """[method, path, headers, body], as worker/engine.py records it."""
    if type(call) is not list or len(call) != 4 or type(call[2]) is not dict or len(call[2]) > 2:
        return False
    return all(type(text) is str for text in (call[0], call[1], call[3], *call[2].values()))


class Pool:
    """The warm processes of one setting. Its methods may be called from several threads."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.data = settings, settings.root / "data"
        self.folder, self._lock_file = _working_folder()
        self._warm_task = min(p.name for p in (self.data / "tasks").iterdir() if (p / "specs.json").is_file())
        self._tasks: dict[str, list[dict[str, str]]] = {}
        self._jobs = 0
        self._lock = threading.Lock()
        self._judging = threading.BoundedSemaphore(len(os.sched_getaffinity(0)))
        self._started: list[ForkServers] = []
        try:
            for role in ("world", "judge"):
                self._started.append(ForkServers(partial(self._server, role), settings.forks))
        except BaseException:
            self.close()
            raise
        self._worlds, self._judges = self._started

    def world(self, task_id: str) -> World:
        """A fresh world of a task. ValueError for an unknown one, OSError if it does not start."""
        if Path(task_id).name != task_id or not (self.data / "tasks" / task_id / "specs.json").is_file():
            raise ValueError(f"task_id {task_id!r}: no such task in {self.settings.root}")
        s = self.settings
        request = {"task_id": task_id, "turn_seconds": s.turn_seconds, "max_api_calls": s.max_api_calls}
        limits = self._limits(s.memory_mb, s.cpu_seconds, s.file_mb)
        for last in (False, True):
            child = self._fork(self._worlds, "world", request, limits)
            try:
                first = child.receive(START_SECONDS)
                if "error" in first:
                    raise Lost(f"met {first['error']}")
                return World(child, first, s)
            except BaseException as e:
                child.close()
                if not isinstance(e, Lost):
                    raise
                if last:
                    raise OSError(f"AppWorld: the world of task {task_id} does not start: it {e}. {self._log('world')}") from e
        raise AssertionError

    def judge(self, task_id: str, calls: list[Any], digest: str) -> dict[str, Any]:
        """Score the API calls of an episode.

        Returns:
            failed (a reason, or None), success, tests, passed and missed (requirements), effort_passed and effort_tests (of those that
            doing nothing fails); or {failed: reason} alone if the judge was lost.
        """
        try:
            answer = self._ask({"evaluate": task_id, "calls": calls, "digest": digest}, JUDGE_SECONDS)
        except (Lost, OSError) as e:
            return {"failed": f"the judge {e}"}
        return answer if "error" not in answer else {"failed": f"the judge met {answer['error']}"}

    def tasks(self, split: str) -> list[dict[str, str]]:
        """The tasks of a split by AppWorld's own loader: task_id, split, difficulty, scenario."""
        if split not in self._tasks:
            self._tasks[split] = self._fetch({"tasks": split})["tasks"]
        return self._tasks[split]

    def solution(self, task_id: str) -> str | None:
        """The compiled solution of a task; None where the data has none (the official test splits)."""
        code = self._fetch({"solution": task_id})["solution"]
        return None if code is None else str(code)

    def pids(self) -> list[int]:
        """Of the warm processes, for measurements."""
        return [pid for servers in self._started for pid in servers.pids()]

    def close(self) -> None:
        """End every process and remove the working folders."""
        for servers in self._started:
            servers.close()
        remove(self.folder)
        os.close(self._lock_file)

    # Inside

    def _fetch(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._ask(question, START_SECONDS)
        except Lost as e:
            answer = {"error": f"it {e}"}
        if "error" in answer:
            raise OSError(f"AppWorld: {answer['error']}. {self._log('judge')}")
        return answer

    def _ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        with self._judging:
            child = self._fork(self._judges, "judge", {}, self._limits(4096, int(seconds) + 60, 64))
            try:
                child.send(question)
                return dict(child.receive(seconds))
            finally:
                child.close()

    def _fork(self, servers: ForkServers, role: str, request: dict[str, Any], limits: dict[str, int]) -> Child:
        s, folder = self.settings, self._workplace()
        request = {
            **request, "folder": str(folder), "data": str(self.data), "limits": limits,
            "landlock": s.landlock, "namespace": s.namespace,
        }  # fmt: skip
        try:
            return servers.fork(request, folder)
        except BaseException as e:
            remove(folder)
            if not isinstance(e, OSError | ValueError | Refused):
                raise
            raise OSError(f"AppWorld's {role} process does not run: {e}. {self._log(role)}") from e

    def _server(self, role: str) -> ForkServer:
        folder = self._workplace()
        environ = {
            "APPWORLD_ROOT": str(folder), "APPWORLD_CACHE": str(folder), "SKILLSD_FOLDER": str(folder), "SKILLSD_DATA": str(self.data),
            "SKILLSD_WARM_TASK": self._warm_task,
        }  # fmt: skip
        return ForkServer(self.settings.python, role, folder, environ, self.folder / f"{role}.log")

    def _limits(self, memory_mb: int, cpu_s: int, file_mb: int) -> dict[str, int]:
        return {"memory_mb": memory_mb, "cpu_s": cpu_s, "file_mb": file_mb, "processes": 256, "open_files": 256}

    def _log(self, role: str) -> str:
        """The last line that the role's processes wrote to their error stream."""
        path = self.folder / f"{role}.log"
        lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
        return lines[-1] if lines else ""

    def _workplace(self) -> Path:
        """A new empty folder."""
        with self._lock:
            self._jobs += 1
            path = self.folder / "jobs" / str(self._jobs)
        path.mkdir(parents=True)
        return path


def _working_folder() -> tuple[Path, int]:
    """A new folder and the lock that says it is in use; those of runs that were killed are removed."""
    place = Path(tempfile.gettempdir()).resolve()
    if "memory" in str(place):
        raise ValueError(f"TMPDIR: {place} contains the word memory, which AppWorld cannot bear in a path: name another.")
    for old in place.glob("skillsd-appworld-*"):
        try:
            lock = os.open(old / "lock", os.O_RDWR)
        except OSError:  # another user's, or just being made
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(old)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix="skillsd-appworld-", dir=place))
    lock = os.open(folder / "lock.new", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(folder / "lock.new", folder / "lock")  # never seen without its lock
    return folder, lock


_pools: dict[Settings, Pool] = {}
_users: dict[Settings, int] = {}
_guard = threading.Lock()
_owner = os.getpid()


def lease(settings: Settings) -> Pool:
    """The pool of these settings, shared by all environments that have them. Give it back with `release`."""
    with _guard:
        if settings not in _pools:
            _pools[settings] = Pool(settings)
        _users[settings] = _users.get(settings, 0) + 1
        return _pools[settings]


def release(settings: Settings) -> None:
    """One user less. A pool without users ends after a while: listing tasks and then playing them should not start it twice."""
    with _guard:
        _users[settings] -= 1
        if not _users[settings]:
            timer = threading.Timer(LINGER_SECONDS, _close_idle, [settings])
            timer.daemon = True
            timer.start()


def _close_idle(settings: Settings) -> None:
    with _guard:
        if not _users.get(settings) and settings in _pools:
            _pools.pop(settings).close()


@atexit.register
def _close_all() -> None:
    while _pools and os.getpid() == _owner:  # not in a process that was forked from this one
        _pools.popitem()[1].close()
