"""Makes "tiny AppWorld-format tasks": `APPWORLD_CACHE=DIR python make_tiny.py ROOT [--seed N]`, with the interpreter that has appworld.

The people, texts and numbers are our own invention; the databases, API docs and task files are written by the installed package's own
classes, so that nothing of AppWorld is part of this project. They are no AppWorld tasks, and results on them are no AppWorld results:
ROOT/tiny.json, written last, says so to every reader. In a ROOT made earlier they are replaced whole; what
else lies there, outputs of experiments say, stays.

To add a family: copy the class in tiny/ that comes nearest, change what it says, and name it in FAMILIES. `build` adds rows with
world.add(...) and draws whatever a task asks or answers from `content`, which keeps the splits apart; the solution uses the APIs as an
agent would; every check says whether an agent that does nothing passes it. Then play it: solution, nothing, a wrong answer.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sqlite3
import sys
import time
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tiny import tier1, tier2, tier3
from tiny.content import Content
from tiny.family import Family

FAMILIES: tuple[type[Family], ...] = (
    tier1.NoteCreate,
    tier1.AlarmSet,
    tier1.TodoAdd,
    tier2.MostPlayed,
    tier2.MoneySent,
    tier2.BornOn,
    tier3.NoteToTodos,
    tier3.PayContact,
    tier3.MailFile,
    tier3.PlaylistToNote,
)
SCENARIOS = {"train": 3, "dev": 1, "test": 2}
"""Scenarios of each family."""
TASKS = 3
"""Tasks of each scenario, as in AppWorld: one phrasing, other people and things."""
KIND = "tiny AppWorld-format tasks"
VERSION = 1
"""Rises with every change of what is generated."""
POPULATION = 12
"""People of the base databases."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Make tiny AppWorld-format tasks in ROOT.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="other people, texts and numbers for another seed")
    parser.add_argument("--keep", action="store_true", help="leave a ROOT that this version made from this seed as it is")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    if arguments.keep and is_whole(root, arguments.seed):
        return 0
    if problem := refusal(root):
        print(f"make_tiny: {problem}", file=sys.stderr)
        return 2
    start = time.monotonic()
    building = root.with_name(f".{root.name}.{os.getpid()}.part")
    building.mkdir(parents=True)
    try:
        build(building, arguments.seed)
        replace(root, building)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    print(f"{root}: done in {time.monotonic() - start:.0f} s")
    return 0


def refusal(root: Path) -> str | None:
    """Why `root` cannot be written, or None."""
    if "memory" in str(root):
        return f"{root}: AppWorld takes any path that contains 'memory' for a database in memory; choose another ROOT"
    if root.exists() and not is_tiny(root):
        return f"{root} exists and holds no {KIND} (no tiny.json of that kind); choose another ROOT"
    if importlib.util.find_spec("appworld") is None:
        return f"{sys.executable} has no appworld; run this with the interpreter of an AppWorld install"
    return None


def is_whole(root: Path, seed: int) -> bool:
    """Return whether this version made `root` from `seed`, and all of its tasks are still there."""
    if not is_tiny(root):
        return False
    record = json.loads((root / "tiny.json").read_text(encoding="utf-8"))
    ids = [task_id for split in record["splits"].values() for task_id in split]
    whole = all((root / "data" / "tasks" / task_id / "ground_truth").is_dir() for task_id in ids) and (root / "data" / "base_dbs").is_dir()
    return whole and (record["version"], record["seed"]) == (VERSION, seed)


def is_tiny(root: Path) -> bool:
    try:
        return json.loads((root / "tiny.json").read_text(encoding="utf-8"))["kind"] == KIND
    except (OSError, ValueError, TypeError, KeyError):
        return False


def replace(root: Path, building: Path) -> None:
    """Puts `building` in the place of `root`; an older root is moved aside first, so that no moment shows a mixture."""
    old = building.with_suffix(".old")
    if root.exists():
        root.rename(old)
    building.rename(root)
    if old.exists():
        for entry in old.iterdir():
            if not (root / entry.name).exists():  # not ours: outputs of experiments, say
                entry.rename(root / entry.name)
        shutil.rmtree(old, ignore_errors=True)


def build(root: Path, seed: int) -> None:
    os.environ["APPWORLD_ROOT"] = str(root)  # read when appworld is imported
    import appworld.ground_truth
    from appworld import update_root
    from appworld.apps.api_lib import set_local_date_and_time
    from appworld.common.constants import DEFAULT_SYSTEM_DATETIME

    appworld.ground_truth.run_ruff = lambda *args, **kwargs: None  # it only formats, and would need a pinned ruff
    update_root(str(root))
    frozen = set_local_date_and_time(DEFAULT_SYSTEM_DATETIME)
    try:
        write_base(root, seed, write_api_docs(root))
        ids = write_tasks(seed)
    finally:
        frozen.stop()
    datasets = root / "data" / "datasets"
    datasets.mkdir()
    for split, task_ids in ids.items():
        (datasets / f"{split}.txt").write_text("\n".join(task_ids) + "\n", encoding="utf-8")
    families = {family.name: {"tier": family.tier, "apps": list(family.apps)} for family in FAMILIES}
    about = {"kind": KIND, "version": VERSION, "seed": seed, "splits": ids, "families": families}
    (root / "tiny.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def write_api_docs(root: Path) -> dict[str, dict[str, Any]]:
    """The API documentation of the installed apps, as files and as {app: {api: document}} for the database that agents search."""
    from appworld.apps import get_all_apps
    from appworld.collections.api_docs import ApiDocCollection
    from appworld.common.constants import CANARY_STRING

    folder = root / "data" / "api_docs" / "standard"
    folder.mkdir(parents=True)
    docs = ApiDocCollection.build(load_apps=tuple(get_all_apps(skip_admin=True)))
    for app, apis in docs.items():
        (folder / f"{app}.json").write_text(
            json.dumps({name: dict(doc, canary_string=CANARY_STRING) for name, doc in apis.items()}), encoding="utf-8"
        )
    print(f"API docs of {len(docs)} apps", flush=True)
    return docs


def write_base(root: Path, seed: int, docs: dict[str, dict[str, Any]]) -> None:
    """The databases that every task starts from: the API docs, and people of no split with their notes, songs and payments."""
    from appworld.apps import get_all_apps
    from appworld.collections.models import ModelCollection

    from tiny.base import populate

    home = ":memory:tiny_base"
    models = ModelCollection.load(to_db_home_path=home, from_db_home_path=home, load_apps=get_all_apps(), create_db=True)
    records = []
    for apis in docs.values():
        for doc in apis.values():
            fields = {key: value for key, value in doc.items() if key not in ("app_name", "canary_string")}
            records.append(models.api_docs.ApiDoc(**fields, app_name_=doc["app_name"]))
    models.api_docs.ApiDoc.save_all(records)
    populate(models, Content(seed, "base", "population"), POPULATION)
    models.save(str(root / "data" / "base_dbs"), format="full", app_names=list(get_all_apps()))
    models.close()
    print(f"base databases: {len(records)} documents, {POPULATION} people", flush=True)


def write_tasks(seed: int) -> dict[str, list[str]]:
    """All tasks: {split: ids}. Raises RuntimeError if two splits share a drawn value or two tasks an instruction or an id."""
    from appworld.apps import get_all_apps
    from appworld.apps.model_lib import get_db_home_path
    from appworld.collections.models import ModelCollection

    base = get_db_home_path(storage_type="disk", type="base")
    models = ModelCollection.load(to_db_home_path=":memory:tiny_task", from_db_home_path=base, load_apps=get_all_apps())
    ids: dict[str, list[str]] = {split: [] for split in SCENARIOS}
    drawn: dict[str, str] = {}
    instructions: set[str] = set()
    for family in (make() for make in FAMILIES):
        for split, scenarios in SCENARIOS.items():
            for scenario in range(scenarios):
                # The "t" is no hexadecimal digit: no id of an official task looks like this.
                name = "t" + blake2b(f"{seed} {family.name} {split} {scenario}".encode(), digest_size=3).hexdigest()
                for task_id in (f"{name}_{number}" for number in range(1, TASKS + 1)):
                    content = Content(seed, split, task_id)
                    reset(models, base)
                    instruction = write_task(models, task_id, family, scenario, content)
                    if instruction in instructions or any(task_id in known for known in ids.values()):
                        raise RuntimeError(f"{family.name}: two tasks with the id {task_id} or its instruction; choose another --seed")
                    for value in content.drawn:
                        if drawn.setdefault(value, split) != split:
                            raise RuntimeError(f"{value!r} is in {drawn[value]} and {split}: {family.name} must draw it from its Content")
                    instructions.add(instruction)
                    ids[split].append(task_id)
        print(f"{family.name}: {TASKS * sum(SCENARIOS.values())} tasks of tier {family.tier}", flush=True)
    models.close()
    return ids


def reset(models: Any, base: str) -> None:
    """Sets the databases back to the base ones and forgets the changes. (Loading them anew would compile every SQL statement again.)"""
    for app in models.app_names:
        with closing(sqlite3.connect(f"{base}/{app}.db")) as connection:
            connection.backup(models[app].SQLModel.db.connection)
    models.restart_db_tracker()


def write_task(models: Any, task_id: str, family: Family, scenario: int, content: Content) -> str:
    """One task's databases, specification and ground truth; returns the instruction."""
    from appworld.apps import get_all_apps
    from appworld.apps.admin.models import MainUserMunch
    from appworld.common.constants import DB_VERSION, DEFAULT_SYSTEM_DATETIME
    from appworld.ground_truth import GroundTruth
    from appworld.task import Task

    from tiny.world import World

    me = content.person()
    world = World(models, me)
    world.sign_up()
    draft = family.build(world, content)
    instruction = family.phrasings[scenario % len(family.phrasings)].format(**draft.public)
    world.add("supervisor.Task", [dict(supervisor_id=world.supervisor_id, instruction=instruction)])
    task = Task(
        id=task_id,
        instruction=instruction,
        supervisor=MainUserMunch(first_name=me.first_name, last_name=me.last_name, email=me.email, phone_number=me.phone_number),
        datetime=DEFAULT_SYSTEM_DATETIME,
        allowed_apps=get_all_apps(skip_admin=True),
        db_version=DB_VERSION,
        model_collection=models,
    )
    solution = family.solution_code(draft.public)
    task.ground_truth = GroundTruth(
        task_id=task_id,
        required_apps=list(family.apps),
        public_data=draft.public,
        private_data=draft.private,
        answer=draft.answer,
        evaluation_code=family.evaluation_code(),
        solution_code=solution,
        compiled_solution_code=solution,
        generator_code="",
        test_data=family.test_data(),
        # The number of lines is given because GroundTruth would count them with black.
        metadata=dict(difficulty=family.tier, mode="full", family=family.name, num_solution_code_lines=len(solution.splitlines()) - 1),
        api_calls=[],
    )
    task.save(ground_truth_mode="full", model_collection_format="changes")
    return instruction


if __name__ == "__main__":
    sys.exit(main())
