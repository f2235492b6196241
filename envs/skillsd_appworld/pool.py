"""Worlds in other processes.

Three kinds of warm processes fork one child for each job: an episode's world, which holds its databases and makes its API calls; the
process that runs the agent's code, which reaches the world by API calls alone; and, on the full root, the judge that scores it. Whatever
happens to a child costs its own episode at most.
"""

import atexit
import fcntl
import json
import os
import socket
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
"""Longest reply of a process that runs an agent's code."""
JUDGE_SECONDS, JUDGE_FACTOR = 60.0, 2.0
"""CPU time that scoring an episode may take: so much, of which it needs less than one, and so many times what its API calls took."""


@dataclass(frozen=True)
class Settings:
    """What the environments of one pool share.

    Args:
        python: AppWorld's interpreter.
        root: Folder that holds data/.
        turn_seconds: Time limit of one piece of code.
        grace_seconds: So much later the host kills an episode that did not stop by itself.
        max_api_calls: API calls of one piece of code.
        memory_mb: Address space of each of an episode's two processes, and of the judge while it makes the API calls again; beyond the
            engine's own.
        cpu_seconds: CPU time of each of an episode's two processes.
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
    """One episode: the process that runs the agent's code and the one that holds its world. What the first says may come from that code: it
    is bounded, checked and shown, but never believed."""

    def __init__(self, child: Child, agent: Child, first: dict[str, Any], settings: Settings) -> None:
        self.child, self.agent, self.first, self.settings = child, agent, first, settings
        self.calls: list[Any] = []
        self.digest, self.seconds = str(first["digest"]), 0.0

    def execute(self, code: str, max_chars: int) -> tuple[list[str], int, bool]:
        """Run a piece of code.

        Returns:
            [output] or [its head, its tail], the number of characters left out, and whether the task is declared complete.

        Raises:
            Lost: a process did not survive it, or said what no such process says.
        """
        s = self.settings
        self.agent.send({"code": code, "max_chars": max_chars}, s.grace_seconds)
        reply = self.agent.receive(s.turn_seconds + s.grace_seconds, REPLY_BYTES)
        try:
            output, cut = reply["output"], reply["cut"]
            sound = (
                type(output) is list and 1 <= len(output) <= 2 and all(type(part) is str for part in output)
                and sum(map(len, output)) <= max_chars and type(cut) is int and 0 <= cut < 1 << 40
            )  # fmt: skip
        except (KeyError, TypeError) as e:
            raise self.agent.lost(f"sent rubbish ({type(e).__name__})") from e
        if not sound:
            raise self.agent.lost("sent rubbish")
        self.child.send({}, s.grace_seconds)
        made = self.child.receive(s.turn_seconds + s.grace_seconds)
        if "lost" in made:
            raise self.child.lost(made["lost"])
        self.calls += made["calls"]
        self.digest, self.seconds = made["digest"], made["seconds"]
        return output, cut, made["completed"]

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.agent.close()
        self.child.close()


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
            for role in ("world", "agent", "judge"):
                self._started.append(ForkServers(partial(self._server, role), settings.forks))
        except BaseException:
            self.close()
            raise
        self._worlds, self._agents, self._judges = self._started

    def world(self, task_id: str) -> World:
        """A fresh world of a task. ValueError for an unknown one, OSError if it does not start."""
        if Path(task_id).name != task_id or not (self.data / "tasks" / task_id / "specs.json").is_file():
            raise ValueError(f"task_id {task_id!r}: no such task in {self.settings.root}")
        for last in (False, True):
            try:
                return self._world(task_id)
            except Lost as e:
                if last:
                    raise OSError(f"AppWorld: task {task_id} does not start: {e}. {self._log('world') or self._log('agent')}") from e
        raise AssertionError

    def judge(self, task_id: str, world: World) -> dict[str, Any]:
        """Score the API calls of an episode, with the world's memory limit and a limit of CPU time that goes with what they took there.

        Returns:
            failed (a reason, or None), success, tests, passed and missed (requirements), effort_passed and effort_tests (of those that
            doing nothing fails); or {failed: reason} alone if the judge was lost.
        """
        question = {"evaluate": task_id, "calls": world.calls, "digest": world.digest, "memory_mb": self.settings.memory_mb}
        try:
            answer = self._ask(question, JUDGE_SECONDS + JUDGE_FACTOR * world.seconds)
        except (Lost, OSError) as e:
            return {"failed": str(e)}
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
        """Process ids of the warm processes, for measurements."""
        return [pid for servers in self._started for pid in servers.pids()]

    def close(self) -> None:
        """End every process and remove the working folders."""
        for servers in self._started:
            servers.close()
        remove(self.folder)
        os.close(self._lock_file)

    # Inside

    def _world(self, task_id: str) -> World:
        s = self.settings
        specs = json.loads((self.data / "tasks" / task_id / "specs.json").read_text(encoding="utf-8"))
        request = {"task_id": task_id, "datetime": specs["datetime"], "turn_seconds": s.turn_seconds, "max_api_calls": s.max_api_calls}
        limits = self._limits(s.memory_mb, s.cpu_seconds, s.file_mb)
        children: list[Child] = []
        try:
            for servers, end in zip((self._worlds, self._agents), wire := socket.socketpair(), strict=True):
                children.append(self._fork(servers, request, limits, end))
            child, agent = children
            first: dict[str, Any] = {}
            for one in children:
                first |= one.receive(START_SECONDS)
                if "error" in first:
                    raise one.lost(f"met {first['error']}")
            return World(child, agent, first, s)
        except BaseException:
            for one in children:
                one.close()
            raise
        finally:
            for end in wire:
                end.close()

    def _fetch(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._ask(question, START_SECONDS)
        except Lost as e:
            answer = {"error": str(e)}
        if "error" in answer:
            raise OSError(f"AppWorld: {answer['error']}. {self._log('judge')}")
        return answer

    def _ask(self, question: dict[str, Any], cpu_seconds: float) -> dict[str, Any]:
        with self._judging:
            child = self._fork(self._judges, {}, self._limits(max(4096, self.settings.memory_mb), int(cpu_seconds), 64))
            try:
                child.send(question)
                return dict(child.receive(5 * cpu_seconds))
            finally:
                child.close()

    def _fork(self, servers: ForkServers, request: dict[str, Any], limits: dict[str, int], *more: socket.socket) -> Child:
        s, folder, role = self.settings, self._workplace(), servers.current.role
        request = {
            **request, "folder": str(folder), "data": str(self.data), "limits": limits,
            "landlock": s.landlock, "namespace": s.namespace,
        }  # fmt: skip
        try:
            return servers.fork(request, folder, *more)
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
        lines = path.read_text(errors="replace", encoding="utf-8").strip().splitlines() if path.is_file() else []
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
