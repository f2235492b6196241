"""AppWorld's package as the workers use it: warm-up, a world, and the tape of its API calls."""

import hashlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import appworld
import httpx
from appworld import AppWorld, load_task_ids, update_root
from appworld.apps import get_all_apps
from appworld.apps.model_lib import get_cached_db_engine, get_direct_cached_sqlite3_connection
from appworld.collections.api_docs import ApiDocCollection
from appworld.common.path_store import path_store
from appworld.common.safety_guard import ALLOWED_MODULE_NAMES
from appworld.common.utils import get_name_to_apis, import_apis_module, import_models_module

ALLOWED_MODULE_NAMES.discard("appworld")  # an agent has no business in the engine
PUBLIC_APPS = tuple(get_all_apps(skip_admin=True))


def version() -> str:
    """AppWorld's."""
    return str(appworld.__version__)


def warm_up(judge: bool) -> None:
    """Import all apps and play one episode, so that no child has to; leaves no thread and no open database behind.

    Args:
        judge: Score it, too: this root holds the ground truth.
    """
    update_root(os.environ["APPWORLD_ROOT"])
    for app in get_all_apps():
        import_apis_module(app)
        import_models_module(app)
        get_name_to_apis(app)
    ApiDocCollection.load(load_apps=PUBLIC_APPS, include_response_schemas=True)
    folder, task_id = os.environ["SKILLSD_FOLDER"], os.environ["SKILLSD_WARM_TASK"]
    world = open_world(task_id, folder, 30, 100, ground_truth=judge)
    for code in ("print(apis.supervisor.show_profile())", "print(apis.api_docs.show_app_descriptions())", "1 / 0"):
        world.execute(code)
    if judge:
        world.evaluate()
    AppWorld.close_all()
    get_direct_cached_sqlite3_connection.cache_clear()
    get_cached_db_engine.cache_clear()


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


class Tape:
    """Records every API call of a world, and notices changes of its databases that no call made.

    The random numbers of a call depend on its place on the tape alone, not on what the agent drew in between: the judge, who plays the
    tape on a fresh world, gets the same tokens and codes.
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
        with seeded(len(self.calls)):
            response = self._send(request, **options)
        self._seen = self._marks()
        return response


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
    """Make the recorded calls on a fresh world with a tape of its own. What is wrong with them, or None."""
    client = world.requester.client
    for method, path, headers, body in calls:
        request = client.build_request(method, path, headers=headers, content=body.encode("utf-8", "surrogateescape"))
        try:
            client.send(request)
        except PermissionError:
            return f"the agent's code called {method} {path}, which is no API of the apps"
        except Exception:  # an error of the API's own: the agent saw it too
            continue
    return None


def tasks(split: str) -> list[dict[str, str]]:
    """The tasks of a split by AppWorld's own loader, with difficulty and scenario."""
    listed = []
    for task_id in load_task_ids(split):
        with open(os.path.join(path_store.data, "tasks", task_id, "ground_truth", "metadata.json")) as file:
            difficulty = str(json.load(file)["difficulty"])
        listed.append({"task_id": task_id, "split": split, "difficulty": difficulty, "scenario": task_id.partition("_")[0]})
    return listed
