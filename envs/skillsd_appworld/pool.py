"""Worlds in other processes.

Two kinds of warm processes fork one child for each job: one, which sees no ground truth, an episode's world; the other, on the full root,
the judge that scores it. Whatever happens to a child costs its own episode at most.
"""

import atexit
import fcntl
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillsd_appworld.process import START_SECONDS, Child, Herd, Lost, Zygote

LINGER_SECONDS = 30.0
"""How long the processes stay when the last environment is closed."""


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
    """One episode's world. What it says may come from the agent's code: it is never believed, only shown and judged."""

    def __init__(self, child: Child, first: dict[str, Any], seconds: float) -> None:
        self.child, self.first, self.seconds = child, first, seconds
        self.calls: list[Any] = []
        self.digest = str(first["digest"])
        self.tampered = False

    def execute(self, code: str, max_chars: int) -> tuple[list[str], int, bool]:
        """Run a piece of code.

        Returns:
            [output] or [its head, its tail], the number of characters left out, and whether the task is declared complete.

        Raises:
            Lost: the process did not survive it.
        """
        self.child.send({"code": code, "max_chars": max_chars})
        reply = self.child.receive(self.seconds)
        try:
            self.calls += list(reply["calls"])
            self.digest, self.tampered = str(reply["digest"]), self.tampered or bool(reply["tampered"])
            return [str(part) for part in reply["output"]], int(reply["cut"]), bool(reply["completed"])
        except (KeyError, TypeError, ValueError) as e:
            raise Lost(f"sent rubbish ({type(e).__name__})") from e

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.child.close()


class Pool:
    """The warm processes of one setting. Its methods may be called from several threads."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.data = settings, settings.root / "data"
        self.folder, self._lock_file = _working_folder()
        if "memory" in str(self.folder):
            raise ValueError(f"TMPDIR: {self.folder} contains the word memory, which AppWorld cannot bear in a path: name another.")
        self._warm_task = min(p.name for p in (self.data / "tasks").iterdir() if (p / "specs.json").is_file())
        self._tasks: dict[str, list[dict[str, str]]] = {}
        self._jobs = 0
        self._lock = threading.Lock()
        self._judging = threading.BoundedSemaphore(max(1, os.cpu_count() or 1))
        self.view = self.folder / "view"
        self._make_view()
        self._worlds = Herd(lambda: self._zygote("world", self.view), settings.forks)
        self._judges = Herd(lambda: self._zygote("judge", settings.root), settings.forks)

    def world(self, task_id: str) -> World:
        """A fresh world of a task. ValueError for an unknown one, OSError if it does not start."""
        self._show(task_id)
        s, own = self.settings, self.data / "tasks" / task_id
        readable = [self.view, self.data / "api_docs", self.data / "base_dbs", own / "dbs", own / "specs.json"]
        request = {
            "task_id": task_id, "turn_seconds": s.turn_seconds, "max_api_calls": s.max_api_calls, "hidden": [str(own / "ground_truth")],
        }  # fmt: skip
        limits = self._limits(s.memory_mb, s.cpu_seconds, s.file_mb)
        for last in (False, True):
            child = self._fork(self._worlds, "world", request, readable, limits)
            try:
                return World(child, child.receive(START_SECONDS), s.turn_seconds + s.grace_seconds)
            except Lost as e:
                child.close()
                if last:
                    raise OSError(f"AppWorld: the world of task {task_id} does not start: it {e}. {self._log('world')}") from e
        raise AssertionError

    def judge(self, task_id: str, calls: list[Any], digest: str) -> dict[str, Any]:
        """Score the API calls of an episode.

        Returns:
            failed (a reason, or None), success, tests, passed and missed (requirements), effort_passed and effort_tests (of those that
            doing nothing fails); or {failed: reason} alone if the judge was lost.
        """
        # Each thousand calls may take as long as the agent had for them.
        seconds = 60 + (1 + len(calls) / 1000) * self.settings.turn_seconds
        try:
            answer = self._ask({"evaluate": task_id, "calls": calls, "digest": digest}, seconds)
        except Lost as e:
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
        return [*self._worlds.pids(), *self._judges.pids()]

    def close(self) -> None:
        """End every process and remove the working folders."""
        self._worlds.close()
        self._judges.close()
        shutil.rmtree(self.folder, ignore_errors=True)
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
            child = self._fork(self._judges, "judge", {}, [self.data], self._limits(4096, int(seconds) + 60, 1024))
            try:
                child.send(question)
                return dict(child.receive(seconds))
            finally:
                child.close()

    def _fork(self, herd: Herd, role: str, request: dict[str, Any], readable: list[Path], limits: dict[str, int]) -> Child:
        s, folder = self.settings, self._workplace()
        request = {
            **request, "folder": str(folder), "readable": [str(p) for p in readable], "limits": limits,
            "landlock": s.landlock, "namespace": s.namespace,
        }  # fmt: skip
        try:
            return herd.fork(request, folder)
        except (OSError, ValueError) as e:
            raise OSError(f"AppWorld's {role} process does not run: {e}. {self._log(role)}") from e

    def _zygote(self, role: str, root: Path) -> Zygote:
        folder = self._workplace()
        environ = {
            "APPWORLD_ROOT": str(root), "APPWORLD_CACHE": str(folder), "SKILLSD_FOLDER": str(folder), "SKILLSD_WARM_TASK": self._warm_task,
        }  # fmt: skip
        return Zygote(self.settings.python, role, folder, environ, self.folder / f"{role}.log")

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

    def _make_view(self) -> None:
        """The root that worlds see: links to the docs and databases, and no ground truth."""
        (self.view / "data" / "tasks").mkdir(parents=True)
        for name in ("api_docs", "base_dbs"):
            (self.view / "data" / name).symlink_to(self.data / name)
        self._show(self._warm_task)

    def _show(self, task_id: str) -> None:
        source, target = self.data / "tasks" / task_id, self.view / "data" / "tasks" / task_id
        if target.is_dir():
            return
        if source.parent != self.data / "tasks" or not (source / "specs.json").is_file():
            raise ValueError(f"task_id {task_id!r}: no such task in {self.settings.root}")
        staged = self._workplace()
        for name in ("dbs", "specs.json"):
            (staged / name).symlink_to(source / name)
        try:
            staged.rename(target)
        except OSError:  # another thread was first
            shutil.rmtree(staged)


def _working_folder() -> tuple[Path, int]:
    """A new folder and the lock that says it is in use; those of runs that were killed are removed."""
    place = Path(tempfile.gettempdir()).resolve()
    for old in place.glob("skillsd-appworld-*"):
        try:
            lock = os.open(old / "lock", os.O_RDWR)
        except OSError:  # another user's, or just being made
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
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
    with _guard:
        while _pools:
            _pools.popitem()[1].close()
