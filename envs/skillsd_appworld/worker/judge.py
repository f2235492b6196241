"""The child that scores an episode, on the full root: it makes the agent's API calls on a fresh world and lets AppWorld's own evaluator
look at that. So no state counts that API calls did not make, and the answer never is in a process that runs an agent's code.
"""

import os
import socket
from typing import Any

from appworld.ground_truth import GroundTruth

import channel
import engine
import sandbox


def serve(sock: socket.socket, request: dict[str, Any], parent: int) -> None:
    """Answer one question: {tasks: split}, {solution: task_id} or {evaluate: task_id, calls, digest}."""
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
        answer = _answer(question, folder)
    except Exception as e:
        answer = {"error": f"{type(e).__name__}: {e}"}
    channel.send(sock, answer)


def _answer(question: dict[str, Any], folder: str) -> dict[str, Any]:
    if "tasks" in question:
        return {"tasks": engine.tasks(question["tasks"])}
    if "solution" in question:
        truth = os.path.join(os.environ["APPWORLD_ROOT"], "data", "tasks", question["solution"], "ground_truth")
        if not os.path.exists(os.path.join(truth, "compiled_solution.py")):  # the official test splits have none
            return {"solution": None}
        return {"solution": GroundTruth.load(question["solution"], mode="full").compiled_solution_code}
    return _evaluate(question["evaluate"], question["calls"], question["digest"], folder)


def _evaluate(task_id: str, calls: list[list[Any]], digest: str, folder: str) -> dict[str, Any]:
    world = engine.open_world(task_id, folder, 1000, 1_000_000, ground_truth=True)
    log = engine.CallLog(world)
    wrong = engine.replay(world, calls)
    if wrong is None and log.digest() != digest:
        wrong = "the world's state is not what its API calls lead to"
    world._save_state(world.output_db_home_path_on_disk)
    result = world.evaluate().to_dict()
    passed, failed = result["passes"], result["failures"]
    effort = [len([t for t in tests if t["label"] == "no_op_fail"]) for tests in (passed, failed)]
    return {
        "failed": wrong,
        "success": bool(result["success"]),
        "tests": int(result["num_tests"]),
        "passed": [t["requirement"] for t in passed],
        "missed": [t["requirement"] for t in failed],
        "effort_passed": effort[0],
        "effort_tests": sum(effort),
    }
