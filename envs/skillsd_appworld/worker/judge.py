"""The child that scores an episode, on the full root: it makes the agent's API calls on a fresh world and lets AppWorld's own evaluator
look at that. So no state counts that API calls did not make, and the answer never is in a process that runs an agent's code.
"""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from appworld.ground_truth import GroundTruth

import channel
import engine
import sandbox


def warm_up() -> None:
    """Play and score one episode."""
    engine.warm_up(judge=True)


def serve(socks: list[socket.socket], request: dict[str, Any], parent: int) -> None:
    """Answer one question: {tasks: split}, {solution: task_id} or {evaluate: task_id, calls, digest, memory_mb}."""
    (sock,) = socks
    folder, data = request["folder"], request["data"]
    sandbox.confine(
        folder,
        # AppWorld's evaluator reads the source of every function on the stack when a test fails: this file's, too.
        [*sandbox.interpreter_paths(), data, os.path.dirname(os.path.abspath(__file__))],
        sandbox.Limits(**request["limits"]),
        [sock.fileno()],
        environ={"APPWORLD_ROOT": os.path.dirname(data), "APPWORLD_CACHE": folder, "HOME": folder, "PATH": ""},
        parent=parent,
        folder_mb=4 * request["limits"]["file_mb"],
        landlock=request["landlock"],
        namespace=request["namespace"],
    )
    question = channel.receive(sock)
    try:
        answer = _answer(question, request)
    except Exception as e:
        answer = {"error": f"{type(e).__name__}: {e}"}
    channel.send(sock, answer)


@contextmanager
def less_memory(mb: int) -> Iterator[None]:
    """For a while this process may have `mb` MiB of address space less: then calls cost no more here than where they were made first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (soft - (mb << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _answer(question: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    if "tasks" in question:
        return {"tasks": engine.tasks(question["tasks"])}
    if "solution" in question:
        truth = os.path.join(os.environ["APPWORLD_ROOT"], "data", "tasks", question["solution"], "ground_truth")
        if not os.path.exists(os.path.join(truth, "compiled_solution.py")):  # the official test splits have none
            return {"solution": None}
        return {"solution": GroundTruth.load(question["solution"], mode="full").compiled_solution_code}
    spare_mb = request["limits"]["memory_mb"] - question["memory_mb"]
    return _evaluate(question["evaluate"], question["calls"], question["digest"], spare_mb, request["folder"])


def _evaluate(task_id: str, record: list[list[Any]], digest: str, spare_mb: int, folder: str) -> dict[str, Any]:
    with less_memory(spare_mb):
        world = engine.open_world(task_id, folder, ground_truth=True)
        calls = engine.Calls(world, os.path.join(os.environ["APPWORLD_ROOT"], "data", "tasks", task_id, "dbs"))
        wrong = engine.replay(calls, record)
        if wrong is None and calls.digest() != digest:
            wrong = "the world's state is not what its API calls lead to"
    if wrong is not None:
        return {"failed": wrong}
    world._save_state(world.output_db_home_path_on_disk)
    result = world.evaluate().to_dict()
    passed, failed = result["passes"], result["failures"]
    effort = [len([t for t in tests if t["label"] == "no_op_fail"]) for tests in (passed, failed)]
    return {
        "failed": None,
        "success": bool(result["success"]),
        "tests": int(result["num_tests"]),
        "passed": [t["requirement"] for t in passed],
        "missed": [t["requirement"] for t in failed],
        "effort_passed": effort[0],
        "effort_tests": sum(effort),
    }
