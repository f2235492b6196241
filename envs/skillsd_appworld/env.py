"""The environment: text in, text out. The engine is elsewhere (pool.py)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
from gymnasium.error import ResetNeeded

from skillsd_appworld import paths
from skillsd_appworld.explorer import Explorer
from skillsd_appworld.pool import Settings, World, lease, release
from skillsd_appworld.process import Lost
from skillsd_appworld.prompts import check_prompts, code_of, printable
from skillsd_appworld.spaces import AnyText

COMPLETIONS = ("all", "effort")


class AppWorldEnv(gym.Env[str, str]):
    """Do a person's everyday task by writing code against the APIs of their apps (AppWorld, arXiv:2407.18901).

    ## Action
    A text; its last ```python block is run in a Python session that lives as long as the episode. One without code costs a turn, and the
    answer says so.

    ## Observation
    First the task and who asks; then what the code printed, or its error, shortened in the middle beyond `max_chars` characters with a
    notice.

    ## Reward
    At the end the completion, before it 0. Completion is passed tests / tests, by AppWorld's own evaluator on the state that the episode's
    API calls lead to; success is all passed.

    ## Episode end
    Terminated when the code has called apis.supervisor.complete_task(), or when the episode failed; truncated after `max_turns` turns, and
    scored as it stands. `step` after the end raises `ResetNeeded`.

    ## Failed episodes
    If one of the episode's processes is lost (time, memory or CPU limit, a crash), or it cannot be scored, info["failed"] says why; success
    is False, completion and reward are 0. The next reset starts afresh.

    ## Info
    Always task_id, success (bool), completion (0..1), turn, valid (whether the last action held code). From `reset` also instruction,
    split, difficulty, scenario, and confinement (what isolates the session). At the end completion_effort (passed / tests among those that
    doing nothing fails), tests_passed and tests_missed (the requirements, as text).

    ## reset options
    {"task_id": id} a task of any split; {"split": name} one of that split, picked by the seed. Without options the seed picks one of the
    first split. "instruction", if not empty, replaces the instruction in info; "difficulty" is passed on to info.

    ## Arguments (all keyword; a wrong value is a ValueError that names it, something that is not installed a FileNotFoundError)
    source: "tiny", generated tiny AppWorld-format tasks (splits train, dev, test), or "official", AppWorld's own data (splits train, dev,
        test_normal, test_challenge). Never one in place of the other.
    root: folder that holds data/; default: what `make appworld` made for tiny, $APPWORLD_ROOT for official.
    python: AppWorld's interpreter; default: $APPWORLD_PYTHON, else what `make appworld` made.
    difficulties: only tasks of these difficulties ("1", "2", "3"); default: all.
    limit: only the first so many tasks of each split; default: all.
    max_turns: turns until truncation.
    max_chars: characters of an output that are shown.
    completion: "all", over all tests, as in the paper, or "effort", over those that doing nothing fails.
    turn_seconds: time limit of one piece of code; beyond it an exception ends the code, and `grace_seconds` later the world is killed.
    grace_seconds: see there.
    max_api_calls: API calls of one piece of code.
    memory_mb, cpu_seconds, file_mb: limits of each of an episode's two processes.
    forks: episodes after which the warm process is replaced.
    prompts: replaces any of the templates instruction, task, output, cut and no_code (prompts.py).
    render_mode: None or "ansi"; `render` returns the last observation in both.
    """

    metadata = {"render_modes": ["ansi"], "action_language": "python"}

    def __init__(
        self,
        *,
        source: str = "tiny",
        root: str | None = None,
        python: str | None = None,
        difficulties: Sequence[str | int] | None = None,
        limit: int | None = None,
        max_turns: int = 40,
        max_chars: int = 6000,
        completion: str = "all",
        turn_seconds: int = 30,
        grace_seconds: int = 5,
        max_api_calls: int = 1000,
        memory_mb: int = 512,
        cpu_seconds: int = 300,
        file_mb: int = 16,
        forks: int = 500,
        prompts: Mapping[str, str] | None = None,
        render_mode: str | None = None,
    ) -> None:
        _one_of("source", source, paths.SOURCES)
        self._completion = _one_of("completion", completion, COMPLETIONS)
        self.render_mode = _one_of("render_mode", render_mode, (None, "ansi"))
        self._difficulties = None if difficulties is None else [str(d) for d in difficulties]
        self._limit = None if limit is None else _whole("limit", limit, 1, 1_000_000)
        self._max_turns = _whole("max_turns", max_turns, 1, 100_000)
        self._max_chars = _whole("max_chars", max_chars, 100, 1_000_000)
        self._prompts = check_prompts(prompts)
        root_folder = paths.find_root(source, root)
        self._settings = Settings(
            python=paths.find_python(python),
            root=root_folder,
            turn_seconds=_whole("turn_seconds", turn_seconds, 1, 86_400),
            grace_seconds=_whole("grace_seconds", grace_seconds, 1, 86_400),
            max_api_calls=_whole("max_api_calls", max_api_calls, 1, 1_000_000),
            memory_mb=_whole("memory_mb", memory_mb, 64, 1_000_000),
            cpu_seconds=_whole("cpu_seconds", cpu_seconds, 1, 1_000_000),
            file_mb=_whole("file_mb", file_mb, 1, 1_000_000),
            forks=_whole("forks", forks, 1, 1_000_000),
        )
        self._splits = paths.split_names(root_folder)
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._pool = lease(self._settings)
        self._closed = False
        self._world: World | None = None
        self._task: dict[str, str] = {}
        self._running = False
        self._turn = 0
        self._last = ""

    def tasks(self, split: str) -> list[dict[str, str]]:
        """The tasks of a split in AppWorld's order, each with task_id, split, difficulty and scenario. ValueError for an unknown split."""
        if split not in self._splits:
            raise ValueError(f"split = {split!r}: unknown; the splits are {', '.join(map(repr, self._splits))}")
        listed = [dict(t) for t in self._pool.tasks(split)]
        if self._difficulties is not None:
            listed = [t for t in listed if t["difficulty"] in self._difficulties]
        return listed[: self._limit]

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode. ValueError for an unknown option, task or split; OSError if AppWorld does not run."""
        if self._closed:
            raise ResetNeeded("the environment is closed; make a new one")
        super().reset(seed=seed)
        given = dict(options or {})
        task = self._pick(given)
        self._end_world()
        self._running = False
        self._world = self._pool.world(task["task_id"])
        self._task, self._turn, self._running = task, 0, True
        first = self._world.first
        fields = {**first["supervisor"], "datetime": first["datetime"], "task": first["task"]}
        self._last = printable(self._prompts["task"].format(**fields))
        instruction = given.get("instruction") or self._prompts["instruction"].format(turns=self._max_turns, max_chars=self._max_chars)
        extra = {"instruction": instruction, "confinement": first["confinement"]}
        return self._last, {**self._info(True), **{k: v for k, v in task.items() if k != "task_id"}, **extra}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """One turn. TypeError if the action is not a str, ResetNeeded outside an episode."""
        if not self._running or self._world is None:
            raise ResetNeeded("step() needs a running episode; call reset() first, and again after terminated or truncated")
        if not isinstance(action, str):
            raise TypeError(f"the action must be a str, not {type(action).__name__}")
        self._turn += 1
        counts = {"turn": self._turn, "turns_left": self._max_turns - self._turn}
        code = code_of(action)
        completed, failed = False, ""
        if code is None:
            self._last = self._prompts["no_code"].format(**counts)
        else:
            try:
                parts, cut, completed = self._world.execute(code, self._max_chars)
                notice = self._prompts["cut"].format(cut=cut, length=cut + sum(map(len, parts)))
                self._last = printable(self._prompts["output"].format(output=notice.join(parts).rstrip("\n"), **counts))
            except Lost as e:
                failed = str(e)
                self._last = printable(self._prompts["output"].format(output=f"The session is lost: {e}.", **counts))
        terminated = completed or bool(failed)
        truncated = not terminated and self._turn >= self._max_turns
        info = self._info(code is not None)
        if terminated or truncated:
            info |= self._score(failed)
        return self._last, float(info["completion"]), terminated, truncated, info

    def finish(self) -> dict[str, Any]:
        """End the episode before its time, for whoever has no room for another turn, and score it as it stands; the final info."""
        if not self._running:
            raise ResetNeeded("finish() needs a running episode; call reset() first")
        return self._info(True) | self._score("")

    def render(self) -> str:
        """The last observation."""
        return self._last

    def solution(self) -> list[str] | None:
        """The answers that do the task from its start, by the data's own compiled solution; None where there is none, [] once done."""
        if not self._running:
            return [] if self._turn else None
        code = self._pool.solution(self._task["task_id"])
        return None if code is None else [f"```python\n{code}\n\nsolution(apis, requester)\n```"]

    @property
    def agents(self) -> dict[str, Callable[[], Explorer]]:
        """Scripted agents, by name: each call makes one for an episode."""
        return {"explorer": Explorer}

    def close(self) -> None:
        """End the episode's process; the shared warm ones end when nobody uses them any more."""
        if not self._closed:
            self._closed, self._running = True, False
            self._end_world()
            release(self._settings)

    def _score(self, failed: str) -> dict[str, Any]:
        """End the episode: what that adds to info."""
        assert self._world is not None
        self._running = False
        verdict: dict[str, Any] = {}
        try:
            if not failed:
                verdict = self._pool.judge(self._task["task_id"], self._world)
                failed = verdict["failed"] or ""
        finally:
            self._end_world()
        if failed:
            return {"success": False, "completion": 0.0, "failed": printable(failed)[:300]}
        share = len(verdict["passed"]) / verdict["tests"]
        effort = verdict["effort_passed"] / verdict["effort_tests"] if verdict["effort_tests"] else share
        return {
            "success": verdict["success"],
            "completion": share if self._completion == "all" else effort,
            "completion_effort": effort,
            "tests_passed": verdict["passed"],
            "tests_missed": verdict["missed"],
        }

    def _info(self, valid: bool) -> dict[str, Any]:
        return {"task_id": self._task["task_id"], "success": False, "completion": 0.0, "turn": self._turn, "valid": valid}

    def _end_world(self) -> None:
        if self._world is not None:
            self._world.close()
            self._world = None

    def _pick(self, options: dict[str, Any]) -> dict[str, str]:
        if unknown := set(options) - {"task_id", "split", "difficulty", "instruction"}:
            raise ValueError(f"options: unknown key {sorted(unknown)[0]!r}; use task_id or split")
        task_id, split = options.get("task_id"), options.get("split")
        if task_id is None:
            listed = self.tasks(split if split is not None else self._splits[0])
            if not listed:
                raise ValueError(f"difficulties = {self._difficulties}: no task of the split has one of these; leave it out or name others")
            return dict(listed[int(self.np_random.random() * len(listed))])
        for name in self._splits if split is None else [split]:
            for task in self._pool.tasks(name) if name in self._splits else self.tasks(name):
                if task["task_id"] == task_id:
                    return {**task, "difficulty": options.get("difficulty") or task["difficulty"]}
        raise ValueError(f"options['task_id'] = {task_id!r}: not a task; take one from tasks({self._splits[0]!r}) or another split")


def _one_of(key: str, value: Any, known: Sequence[Any]) -> Any:
    if value not in known:
        raise ValueError(f"{key} = {value!r}: unknown; choose one of {', '.join(map(repr, known))}")
    return value


def _whole(key: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value <= high:
        raise ValueError(f"{key} = {value!r}: give a whole number from {low} to {high}")
    return int(value)
