"""AppWorld's package as the workers use it: warm-up, a world, and its API calls."""

import hashlib
import json
import os
import random
import shutil
from datetime import datetime
from typing import Any

import httpx
from appworld import AppWorld, load_task_ids, update_root
from appworld.apps import get_all_apps
from appworld.apps.api_lib import set_local_date_and_time
from appworld.apps.model_lib import get_cached_db_engine, get_db_home_path, get_direct_cached_sqlite3_connection
from appworld.collections.api_docs import ApiDocCollection
from appworld.common.path_store import path_store
from appworld.common.utils import get_name_to_apis, import_apis_module, import_models_module

PUBLIC_APPS = tuple(get_all_apps(skip_admin=True))
HEADERS = ("authorization", "content-type")
"""The headers of a request that an API may see."""


def lay_out(folder: str, data: str, task_id: str) -> str:
    """Make a root beneath `folder` that holds one task and no ground truth; its path."""
    own = os.path.join(folder, "root", "data", "tasks", task_id)
    os.makedirs(own)
    for name in ("api_docs", "base_dbs"):
        os.symlink(os.path.join(data, name), os.path.join(folder, "root", "data", name))
    shutil.copytree(os.path.join(data, "tasks", task_id, "dbs"), os.path.join(own, "dbs"))
    shutil.copy(os.path.join(data, "tasks", task_id, "specs.json"), own)
    return os.path.join(folder, "root")


def import_apps() -> None:
    """The code of all apps. It brings none of their data."""
    for app in get_all_apps():
        import_apis_module(app)
        import_models_module(app)
        get_name_to_apis(app)


def warm_up(judge: bool) -> None:
    """Import all apps and play one episode, so that no child has to; leaves no thread and no open database behind.

    Args:
        judge: On the full root, and score it, too. A world's template never sees more than one task without its ground truth.
    """
    folder, data, task_id = os.environ["SKILLSD_FOLDER"], os.environ["SKILLSD_DATA"], os.environ["SKILLSD_WARM_TASK"]
    update_root(os.path.dirname(data) if judge else lay_out(folder, data, task_id))
    import_apps()
    ApiDocCollection.load(load_apps=PUBLIC_APPS, include_response_schemas=True)
    world = open_world(task_id, folder, ground_truth=judge)
    for app, api in (("supervisor", "show_profile"), ("api_docs", "show_app_descriptions")):
        world.requester.request(app, api)
    if judge:
        world._save_state(world.output_db_home_path_on_disk)
        world.evaluate()
    AppWorld.close_all()
    for remembered in (get_direct_cached_sqlite3_connection, get_cached_db_engine, get_db_home_path):  # paths of this root
        remembered.cache_clear()
    freeze()


def freeze() -> None:
    """Stop the clock. The first time that freezegun does so it looks through every module, which costs a child the memory that it shares;
    a world then only sets another time."""
    set_local_date_and_time(datetime(2000, 1, 1))


def open_world(task_id: str, folder: str, ground_truth: bool = False) -> AppWorld:
    """A fresh world that writes beneath `folder` only. At most one a process: a second would take over the first one's database."""
    return AppWorld(
        task_id,
        experiment_name=folder,  # absolute, so it replaces AppWorld's own place for outputs
        max_api_calls_per_interaction=None,
        load_ground_truth=ground_truth,
    )


class Calls:
    """The API calls of a world: made one after another, and recorded.

    The judge makes the recorded calls on a fresh world and gets the same answers: what an API draws depends on the task and on the call's
    place in the record alone. An agent cannot draw it itself (the code that resets another person's password, say), as the key is made of
    files that it cannot read. A token that no login gave is not used: AppWorld signs tokens with a word that everybody can read.

    Args:
        world: An open world. Only calls made here may change it.
        dbs: The folder of the task's own rows, which the key is made of.

    Attributes:
        made: [method, path, headers, body] of each call.
    """

    def __init__(self, world: AppWorld, dbs: str) -> None:
        self.world = world
        self.made: list[list[Any]] = []
        self._key = _digest_of_files(dbs)
        self._tokens: set[str] = set()
        self._databases = [import_models_module(app).SQLModel.db for app in (*PUBLIC_APPS, "admin")]
        self._completed, self._looked = False, 0
        self._digest, self._digest_at = "", -1
        self._client = world.requester.client
        self._client.follow_redirects = False  # no API redirects, and where one leads is not looked at again

    def make(self, method: str, path: str, headers: dict[str, str], body: str) -> httpx.Response:
        """Make one call. PermissionError if it is to no API of the apps; whatever the API itself raises."""
        kept = {name: headers[name] for name in HEADERS if name in headers}
        if "authorization" in kept and kept["authorization"] not in self._tokens:
            kept["authorization"] = "Bearer none"
        request = self._client.build_request(method, path, headers=kept, content=body.encode("utf-8", "surrogateescape"))
        path = request.url.raw_path.decode()
        if path.lstrip("/").partition("/")[0] not in PUBLIC_APPS:
            raise PermissionError(f"{path} is not an API of the apps")
        self.made.append([method, path, kept, body])
        random.seed(f"{self._key} {len(self.made)}")
        response = self._client.send(request)
        if path.endswith("/auth/token"):
            self._tokens |= _tokens_in(response.text)
        return response

    def digest(self) -> str:
        """Digest of all changes since the task's start, in order."""
        if self._digest_at != len(self.made):
            changes = json.dumps([d.tracker.changes for d in self._databases], default=str)
            self._digest, self._digest_at = hashlib.sha256(changes.encode()).hexdigest(), len(self.made)
        return self._digest

    def completed(self) -> bool:
        """Return whether the agent has declared the task complete. The engine is asked only after a call that may have done so."""
        if not self._completed and any(call[0] == "POST" and call[1].startswith("/supervisor/") for call in self.made[self._looked :]):
            self._completed = bool(self.world.task_completed())
        self._looked = len(self.made)
        return self._completed


def replay(calls: Calls, record: list[list[Any]]) -> str | None:
    """Make recorded calls on a fresh world. What is wrong with them, or None."""
    for method, path, headers, body in record:
        try:
            calls.make(method, path, headers, body)
        except PermissionError:
            return f"the agent's code called {method} {path}, which is no API of the apps"
        except MemoryError:
            return "its API calls need more memory than a world has"
        except Exception:  # an error of the API's own: the agent saw it too
            continue
    return None


def _digest_of_files(folder: str) -> str:
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(name.encode() + hashlib.sha256(file.read()).digest())
    return digest.hexdigest()


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
        with open(os.path.join(path_store.data, "tasks", task_id, "ground_truth", "metadata.json"), encoding="utf-8") as file:
            difficulty = str(json.load(file)["difficulty"])
        listed.append({"task_id": task_id, "split": split, "difficulty": difficulty, "scenario": task_id.partition("_")[0]})
    return listed
