"""Text environments: the contract that one keeps (`TextEnvironment`), and `TextEnv`, the one place where one is made and asked.

Rollouts, `skillsd play`, demonstrations, pictures and `skillsd.testing` all ask through `TextEnv`. Each answer is checked; nothing is
repaired. An observation is the record of what the policy saw, so one that cannot be written down as it is (a lone surrogate) is refused.
Control characters are legal text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import gymnasium
import numpy as np
from numpy.typing import NDArray

from skillsd.errors import ConfigError, no_module
from skillsd.tasks import label
from skillsd.timeouts import Failure
from skillsd.trajectory import FinishReason, Task

T = TypeVar("T")
STEP = "(observation, reward, terminated, truncated, info)"
MAX_REWARD = 1e37
"""The largest reward, of a step and of an episode: float32, in which losses are, holds ten times as much."""


class TextEnvironment(Protocol):
    """What an environment must offer: a `gymnasium.Env` of texts. `skillsd.testing.check_text_env` checks every rule.

    ## Action
    A str, any str. An action that cannot be read costs a turn, is answered with a text that says what is accepted (not with ""), and never
    raises.

    ## Observation
    A str without lone surrogates. Both spaces accept every str: a subclass of `gymnasium.spaces.Text` whose `contains` says so.

    ## Reward
    The completion at the end of the episode, 0 before. Shaping breaks this rule; a run accepts it, `check_text_env` does not.

    ## Episode end
    `terminated` where the task is over, `truncated` where the turns are. Every episode ends, whatever the actions are.

    ## Failed episodes
    An episode that the environment cannot carry on ends with info["failed"], a str that says why. Nothing else of that answer counts. The
    next `reset` starts afresh.

    ## Info
    From `reset`: task_id and instruction (str; the system text, possibly empty). At the end: success (bool) and completion (0 to 1; 1 with
    a success). Optional at each step: valid (bool), which says that the action could be read. A run warns when none ever could.

    ## Determinism
    `reset` and `step` depend on the task, the seed and the actions alone, whatever was played before.
    """

    def tasks(self, split: str) -> Sequence[Mapping[str, Any]]:
        """The tasks of a split, always the same in the same order: dicts with a task_id of its own each, split, difficulty and, where
        several tasks count together, scenario (str). KeyError or ValueError, which names the splits, for another split."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin the task options["task_id"]; observation and info. KeyError or ValueError for a task that does not exist. The other keys
        of a task in a tasks file come as options too."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play one turn: observation, reward, terminated, truncated, info."""

    def close(self) -> None:
        """Let go of processes and files."""


class TextEnvironmentExtras(TextEnvironment, Protocol):
    """What an environment may offer besides; each member is of use alone. `metadata["action_language"]` may name the language of actions
    that are code, such as "python"."""

    agents: Mapping[str, Callable[[], Any]]
    """Names of scripted agents and what makes one for an episode: an object with `act(observation) -> action`."""
    actions: Sequence[str]
    """The single moves, from which a noisy demonstration draws."""

    def solution(self) -> Sequence[str] | None:
        """The actions that lead from the present state to success; None or [] where none are known."""

    def finish(self) -> dict[str, Any]:
        """End the episode before its time and return its last info: for an environment that knows its completion only then."""

    def picture(self, observation: str) -> NDArray[np.uint8] | None:
        """What the observation shows, [H, W, 3] uint8; None, whatever the text, where it shows nothing."""

    def stream(self, split: str, index: int) -> Mapping[str, Any]:
        """Task `index` of an endless stream: a task_id and the other options of `reset`. Pre-training clones its solutions."""


class TimeStep(NamedTuple):
    """An answer of an environment, checked."""

    observation: str
    instruction: str = ""
    """After `reset`."""
    reward: float = 0.0
    finish: FinishReason | None = None
    """None while the episode goes on."""
    completion: float = 0.0
    """0 to 1, at the end."""
    success: bool = False
    valid: bool | None = None
    """After `step`: whether the action could be read; None where the environment does not say."""


class TextEnv:
    """A text environment, asked and checked.

    Every call that raises, or whose answer breaks the contract, raises a `Failure` (a ConfigError) whose line names the environment, the
    call and the cure. A rollout makes a failed episode of it; elsewhere it ends the command.

    Args:
        env: The environment.
        max_observation_chars: Characters of an observation or instruction beyond which it is refused; None is no limit.
    """

    def __init__(self, env: gymnasium.Env[str, str], max_observation_chars: int | None = None) -> None:
        self.env, self.max_observation_chars = env, max_observation_chars
        self.unwrapped = cast(TextEnvironmentExtras, env.unwrapped)
        self.info: Mapping[str, Any] = {}
        """The info of the last answer."""
        self._now = TimeStep("")

    @property
    def name(self) -> str:
        """Its Gymnasium id, or its class."""
        spec = getattr(self.unwrapped, "spec", None)
        return str(spec.id) if spec is not None else type(self.unwrapped).__name__

    def offers(self, method: str) -> bool:
        """True if the environment has this optional method."""
        return callable(getattr(self.unwrapped, method, None))

    def tasks(self, split: str, key: str = "split") -> list[Task]:
        """The tasks of a split, in order.

        Args:
            split: Its name.
            key: The configuration's key that names it, for errors.

        Raises:
            ConfigError: There is no such split, or no task in it; or an entry is no task.
        """
        try:
            tasks: dict[str, Task] = {}
            for raw in self.unwrapped.tasks(split):
                if not isinstance(raw, Mapping) or not isinstance(name := raw.get("task_id"), str) or not name:
                    raise TypeError(f"tasks() must give dicts with a task_id as str, not {raw!r:.80}")
                if name in tasks:
                    raise TypeError(f"tasks() lists the task_id {name!r:.80} twice: its episodes would be copies")
                tasks[name] = Task(name, split, label(raw, "difficulty"), scenario=label(raw, "scenario"))
        except (ValueError, KeyError, FileNotFoundError) as e:  # what it raises for a split that it does not know
            raise ConfigError(f"data.{key}: {e}") from e
        except Exception as e:
            raise self.failure(f"tasks({split!r})", e) from e
        if not tasks:
            raise ConfigError(f"data.{key}: the split {split} has no tasks: name another or enlarge it in env_kwargs.")
        return list(tasks.values())

    def reset(self, task: Task) -> TimeStep:
        """Begin an episode of a task."""
        try:
            # Always the same seed: a task is the same in every run and for every member of its group.
            answer = self.env.reset(seed=0, options={**task.options, "task_id": task.task_id})
            observation, info = _parts("reset", answer, "(observation, info)")
            if (played := info.get("task_id", task.task_id)) != task.task_id:
                raise Failure("observation", f"info['task_id'] is {played!r:.80}, so it plays another task")
            self.info = info
            self._now = TimeStep(self._text("the observation", observation), self._text("info['instruction']", info.get("instruction", "")))
        except Exception as e:
            raise self.failure(f"reset() to task {task.task_id}", e) from e
        return self._now

    def step(self, action: str) -> TimeStep:
        """Play one turn."""
        try:
            answer = self.env.step(action)
            observation, reward, terminated, truncated, info = _parts("step", answer, STEP)
            self.info = info
            finish: FinishReason | None = None
            if _flag("terminated", terminated):
                finish = "done"
            elif _flag("truncated", truncated):
                finish = "horizon"
            completion, success = (0.0, False) if finish is None else _outcome(info)  # first: if it failed, the rest does not count
            valid = info.get("valid")
            self._now = TimeStep(
                self._text("the observation", observation), "", _number("the reward", reward, -MAX_REWARD, MAX_REWARD), finish, completion,
                success, bool(valid) if isinstance(valid, bool | np.bool_) else None,
            )  # fmt: skip
        except Exception as e:
            raise self.failure(f"step({action!r:.60})", e) from e
        return self._now

    def finish(self) -> TimeStep:
        """Cut the episode: the environment's own `finish()` where it has one says what was reached, else its last info. The reward is the
        completion, as at any end."""
        try:
            if self.offers("finish"):
                (self.info,) = _parts("finish", (self.unwrapped.finish(),), "(info)")
            completion, success = _outcome(self.info)
        except Exception as e:
            raise self.failure("finish()", e) from e
        return self._now._replace(reward=completion, finish="length", completion=completion, success=success)

    def solution(self) -> list[str]:
        """The actions that lead from the present state to success; [] where none are known."""

        def read() -> list[str]:
            plan = self.unwrapped.solution()
            if plan is not None and not (isinstance(plan, list | tuple) and all(isinstance(action, str) for action in plan)):
                raise TypeError(f"it must give a list of actions as str, or None, not {plan!r:.80}")
            return list(plan or ())

        return self.call("solution()", read)

    def picture(self, observation: str) -> NDArray[np.uint8] | None:
        """What an observation shows, [H, W, 3]; None where it shows nothing, or the environment draws nothing."""

        def read() -> NDArray[np.uint8] | None:
            found = self.unwrapped.picture(observation)
            array = isinstance(found, np.ndarray) and found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.size
            if found is not None and not array:
                raise TypeError(f"it must give an array [H, W, 3] of uint8, or None, not {found!r:.80}")
            return found

        return self.call("picture()", read) if self.offers("picture") else None

    def stream(self, split: str, index: int) -> Task:
        """Task `index` of the endless stream of a split."""

        def read() -> Task:
            raw = self.unwrapped.stream(split, index)
            return Task(raw["task_id"], split, options=dict(raw))

        return self.call(f"stream({split!r}, {index})", read)

    def agents(self) -> dict[str, Callable[[], Any]]:
        """The scripted agents by name: each call makes one for an episode."""
        return dict(getattr(self.unwrapped, "agents", None) or {})

    def close(self) -> None:
        """Close the environment; what it raises comes as it is."""
        self.env.close()

    def call(self, name: str, work: Callable[[], T]) -> T:
        """The result of `work`, which runs code of the environment.

        Raises:
            Failure: It raised; `name` says what was called.
        """
        try:
            return work()
        except Exception as e:
            raise self.failure(name, e) from e

    def failure(self, call: str, error: Exception) -> Failure:
        """What a call that raised this comes to: a kind for the record, and a line for who reads the error."""
        found = Failure.of(error)
        cure = ": mend the environment" if not isinstance(error, OSError | MemoryError) else ""  # those may be the machine's
        if found.kind not in ("raised", "environment"):
            cure += "; skillsd.testing.check_text_env finds the rest"
        return Failure(found.kind, found.what, f"data.env: {self.name}: {call} failed ({found.text()}){cure}.")

    def _text(self, what: str, text: Any) -> str:
        if not isinstance(text, str):
            raise Failure("observation", f"{what} is a {type(text).__name__}, not a str")
        if self.max_observation_chars is not None and len(text) > self.max_observation_chars:
            raise Failure(
                "observation",
                f"{what} has {len(text):,} characters, more than {self.max_observation_chars:,} (data.rollout.max_observation_chars)",
            )
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as e:
                raise Failure("observation", f"{what} is no text: a lone surrogate at character {e.start}") from e
        return text if type(text) is str else str.__str__(text)  # a subclass, such as NumPy's


def make_env(env_id: str, kwargs: Mapping[str, Any], max_observation_chars: int | None = None) -> TextEnv:
    """`gymnasium.make` with a one-line error. `module:Id-v0` imports the module that registers the id.

    Raises:
        ConfigError: There is no such environment, or it refuses its arguments or cannot run here.
    """
    try:
        env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    except (ValueError, TypeError, OSError, gymnasium.error.Error, ModuleNotFoundError) as e:
        why = str(e).partition(" was raised from the environment creator")[0]
        if isinstance(e, ModuleNotFoundError) and isinstance(e.__cause__, ModuleNotFoundError) and e.__cause__.name:
            why = no_module(e.__cause__.name)
        raise ConfigError(f"data.env, env_kwargs: {env_id}: {' '.join(why.split())}") from e
    return TextEnv(env, max_observation_chars)


def _parts(call: str, answer: Any, form: str) -> tuple[Any, ...]:
    """The parts of an answer, of which the last is an info."""
    n = form.count(",") + 1
    if not isinstance(answer, tuple) or len(answer) != n:
        size = f" of {len(answer)}" if isinstance(answer, tuple) else ""
        raise Failure("observation", f"{call} returned a {type(answer).__name__}{size}, not {form}")
    if type(answer[-1]) is not dict and not isinstance(answer[-1], Mapping):
        raise Failure("observation", f"info is a {type(answer[-1]).__name__}, not a dict")
    return answer


def _outcome(info: Mapping[str, Any]) -> tuple[float, bool]:
    """Completion and success of a last info. A Failure of kind `environment` if it says that the episode failed."""
    if info.get("failed"):
        raise Failure("environment", str(info["failed"]))
    return _number("the completion", info.get("completion", 0.0), 0.0, 1.0), _flag("info['success']", info.get("success", False))


def _flag(what: str, value: Any) -> bool:
    """A bool, also NumPy's, or 0 or 1; anything else may not mean what its truth says ("False")."""
    if value is True or value is False:  # as nearly always
        return value
    if not isinstance(value, int | np.bool_ | np.integer) or value not in (0, 1):
        raise Failure("reward", f"{what} is {value!r:.80}, not a bool")
    return bool(value)


def _number(what: str, value: Any, low: float, high: float) -> float:
    """A finite number between two bounds, also NumPy's, as a float."""
    if type(value) is float and math.isfinite(value) and low <= value <= high:  # as nearly always
        return value
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise Failure("reward", f"{what} is a {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Failure("reward", f"{what} is {number}")
    if not low <= number <= high:
        raise Failure("reward", f"{what} is {number:g}, not between {low:g} and {high:g}")
    return number
