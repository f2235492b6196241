"""AppWorld's package as the workers use it: warm-up, a world, and the log of its API calls."""

import hashlib
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from appworld import AppWorld, load_task_ids, update_root
from appworld.apps import get_all_apps
from appworld.apps.model_lib import get_cached_db_engine, get_db_home_path, get_direct_cached_sqlite3_connection
from appworld.collections.api_docs import ApiDocCollection
from appworld.common.path_store import path_store
from appworld.common.safety_guard import ALLOWED_MODULE_NAMES
from appworld.common.utils import get_name_to_apis, import_apis_module, import_models_module

ALLOWED_MODULE_NAMES.discard("appworld")  # an agent has no business in the engine
PUBLIC_APPS = tuple(get_all_apps(skip_admin=True))


def lay_out(folder: str, data: str, task_id: str) -> str:
    """Make a root beneath `folder` that holds one task and no ground truth; its path."""
    own = os.path.join(folder, "root", "data", "tasks", task_id)
    os.makedirs(own)
    for name in ("api_docs", "base_dbs"):
        os.symlink(os.path.join(data, name), os.path.join(folder, "root", "data", name))
    shutil.copytree(os.path.join(data, "tasks", task_id, "dbs"), os.path.join(own, "dbs"))
    shutil.copy(os.path.join(data, "tasks", task_id, "specs.json"), own)
    return os.path.join(folder, "root")


def warm_up(judge: bool) -> None:
    """Import all apps and play one episode, so that no child has to; leaves no thread and no open database behind.

    Args:
        judge: On the full root, and score it, too. A world's template never sees more than one task without its ground truth.
    """
    folder, data, task_id = os.environ["SKILLSD_FOLDER"], os.environ["SKILLSD_DATA"], os.environ["SKILLSD_WARM_TASK"]
    update_root(os.path.dirname(data) if judge else lay_out(folder, data, task_id))
    for app in get_all_apps():
        import_apis_module(app)
        import_models_module(app)
        get_name_to_apis(app)
    ApiDocCollection.load(load_apps=PUBLIC_APPS, include_response_schemas=True)
    world = open_world(task_id, folder, 30, 100, ground_truth=judge)
    for code in ("print(apis.supervisor.show_profile())", "print(apis.api_docs.show_app_descriptions())", "1 / 0"):
        world.execute(code)
    if judge:
        world.evaluate()
    AppWorld.close_all()
    for remembered in (get_direct_cached_sqlite3_connection, get_cached_db_engine, get_db_home_path):  # paths of this root
        remembered.cache_clear()


def open_world(task_id: str, folder: str, turn_seconds: int, max_api_calls: int, ground_truth: bool = False) -> AppWorld:
    """A fresh world that writes beneath `folder` only. At most one a process: a second would take over the first one's database."""
    return AppWorld(
        task_id,
        experiment_name=folder,  # absolute, so it replaces AppWorld's own place for outputs
        max_interactions=1_000_000,
        max_api_calls_per_interaction=max_api_calls,
        timeout_seconds=turn_seconds,
        load_ground_truth=ground_truth,
    )


class CallLog:
    """Records every API call of a world, and notices changes of its databases that no call made.

    The random numbers of a call depend on its place on the log alone, not on what the agent drew in between: the judge, who plays the
    log on a fresh world, gets the same tokens and codes.
    """

    def __init__(self, world: AppWorld) -> None:
        self.world = world
        self.calls: list[list[Any]] = []
        self.tampered = False
        self.paused = False  # the environment's own questions are not recorded
        self._completed, self._looked = False, 0
        self._digest_of: list[tuple[int, int]] | None = None
        self._databases = [import_models_module(app).SQLModel.db for app in (*PUBLIC_APPS, "admin")]
        self._seen = self._marks()
        client = world.requester.client
        client.follow_redirects = False  # no API redirects, and where one leads is not looked at again
        self._send = client.send
        client.send = self._record

    def check(self) -> bool:
        """Whether the databases are as the last call left them; once not, never again."""
        if not self.tampered and self._marks() != self._seen:
            self.tampered = True
        return not self.tampered

    def digest(self) -> str:
        """Of all changes since the task's start, in order."""
        if self._digest_of != (marks := self._marks()):
            changes = json.dumps([d.tracker.changes for d in self._databases], default=str)
            self._digest_of, self._digest = marks, hashlib.sha256(changes.encode()).hexdigest()
        return self._digest

    def completed(self) -> bool:
        """Whether the agent has declared the task complete. The engine is asked only after a call that may have done so."""
        if not self._completed and any(call[0] == "POST" and call[1].startswith("/supervisor/") for call in self.calls[self._looked :]):
            self.paused = True
            self._completed = bool(self.world.task_completed())
            self.paused = False
        self._looked = len(self.calls)
        return self._completed

    def _marks(self) -> list[tuple[int, int]]:
        # Rows changed through the connection itself, and a number that moves when another connection writes.
        return [(d.connection.total_changes, d.connection.execute("PRAGMA data_version").fetchone()[0]) for d in self._databases]

    def _record(self, request: httpx.Request, **options: Any) -> httpx.Response:
        path = request.url.raw_path.decode()
        if path.lstrip("/").partition("/")[0] not in PUBLIC_APPS:
            raise PermissionError(f"{path} is not an API of the apps")
        self.check()
        if not self.paused:
            headers = {k: request.headers[k] for k in ("authorization", "content-type") if k in request.headers}
            self.calls.append([request.method, path, headers, request.read().decode("utf-8", "surrogateescape")])
        with undisturbed(), seeded(len(self.calls)):
            try:
                return self._send(request, **options)
            finally:
                self._seen = self._marks()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold the time limit's alarm back until a call is done: half a call is none that the judge could make."""
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


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """The generator that AppWorld's apps draw from, seeded for one call and given back as it was."""
    before = random.getstate()
    random.seed(100 + number)
    try:
        yield
    finally:
        random.setstate(before)


def replay(world: AppWorld, calls: list[list[Any]]) -> str | None:
    """Make the recorded calls on a fresh world with a log of its own. What is wrong with them, or None.

    A token that no login gave is not used: AppWorld signs tokens with a word that everybody can read in its code.
    """
    client = world.requester.client
    tokens: set[str] = set()
    for method, path, headers, body in calls:
        kept = {k: headers[k] for k in ("authorization", "content-type") if k in headers}
        if "authorization" in kept and kept["authorization"] not in tokens:
            kept["authorization"] = "Bearer none"
        request = client.build_request(method, path, headers=kept, content=body.encode("utf-8", "surrogateescape"))
        try:
            response = client.send(request)
        except PermissionError:
            return f"the agent's code called {method} {path}, which is no API of the apps"
        except Exception:  # an error of the API's own: the agent saw it too
            continue
        tokens |= _tokens_in(response.text)
    return None


def _tokens_in(text: str) -> set[str]:
    """The authorization that a login's answer gives; empty for another API's."""
    try:
        answer = json.loads(text) if '"access_token"' in text else None
    except ValueError:
        return set()
    return {f"Bearer {answer['access_token']}"} if isinstance(answer, dict) and "access_token" in answer else set()


def tasks(split: str) -> list[dict[str, str]]:
    """The tasks of a split by AppWorld's own loader, with difficulty and scenario."""
    listed = []
    for task_id in load_task_ids(split):
        with open(os.path.join(path_store.data, "tasks", task_id, "ground_truth", "metadata.json")) as file:
            difficulty = str(json.load(file)["difficulty"])
        listed.append({"task_id": task_id, "split": split, "difficulty": difficulty, "scenario": task_id.partition("_")[0]})
    return listed
