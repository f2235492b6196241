"""The collector: many environments and one engine session, from tasks to trajectories. Token in, token out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import gymnasium

from skillsd.errors import ConfigError
from skillsd.rollout.chat import Chat
from skillsd.rollout.engine import Engine, Request, Session
from skillsd.rollout.noise import stream_key
from skillsd.trajectory import FinishReason, Task, Trajectory, Turn

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class RolloutSettings:
    """How episodes are played. Limits are in tokens."""

    temperature: float = 1.0
    """Sampling temperature in training; evaluation is greedy. The loss uses the same one."""
    max_turn_tokens: int = 512
    """Most tokens of one answer; a longer one is cut there and played as it is."""
    max_trajectory_tokens: int = 20480
    """Most tokens after the prompt, all turns together (the paper's response length)."""
    max_prompt_tokens: int = 8192
    """Longest first prompt of the student."""
    max_rows: int = 64
    """Trajectories in progress at one time; the next one starts as soon as one ends."""
    env_workers: int = 0
    """Threads that reset and step environments at the same time; 0: one after another, best for environments that take microseconds."""
    cuda_graphs: bool = True
    """On a GPU, decode with CUDA graphs (small models become much faster; several runs can share the GPU); elsewhere of no effect."""

    def __post_init__(self) -> None:
        for key in ("max_turn_tokens", "max_trajectory_tokens", "max_prompt_tokens", "max_rows"):
            if getattr(self, key) < 1:
                raise ConfigError(f"rollout.{key} is {getattr(self, key)}: give at least 1.")
        if self.env_workers < 0:
            raise ConfigError(f"rollout.env_workers is {self.env_workers}: give 0 (no threads) or more.")
        if self.temperature <= 0:
            raise ConfigError(f"rollout.temperature is {self.temperature}: give a value above 0 (training samples, evaluation is greedy).")


@dataclass(frozen=True)
class Row:
    """One episode to play: a task, the member index in its group, and a skill for the prompt of whoever acts (normally none)."""

    task: Task
    member: int = 0
    skill: str = ""


def make_env(env_id: str, kwargs: Mapping[str, Any]) -> gymnasium.Env[str, str]:
    """`gymnasium.make` with a one-line error. `module:Id-v0` imports the module that registers the id."""
    try:
        return gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    except (ValueError, TypeError, OSError, gymnasium.error.Error, ModuleNotFoundError) as e:
        told = str(e).partition(" was raised from the environment creator")[0]
        raise ConfigError(f"data.init_args.env, env_kwargs: {env_id}: {' '.join(told.split())}") from e


@dataclass
class _Episode:
    """A row in progress."""

    index: int
    row: Row
    env: gymnasium.Env[str, str]
    key: int
    instruction: str
    observation: str
    prompt_ids: list[int]
    info: dict[str, Any]
    new_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    reward: float = 0.0
    finish: FinishReason | None = None

    def check_failed(self) -> None:
        """If the environment calls the episode failed, nothing else that it says counts."""
        if self.info.get("failed"):
            self.finish, self.reward, self.info = "failed", 0.0, {"failed": str(self.info["failed"])}


class Collector:
    """Plays episodes of one environment with one policy.

    Environments are made when first needed and kept until `close`. With `settings.env_workers` they wait in threads, each environment in
    one at a time; what comes back is handled in the order of the rows, so the trajectories are the same as without threads.

    Args:
        env_id: Gymnasium id, `module:Id-v0`.
        env_kwargs: Its keyword arguments.
        chat: The conversation format.
        engine: Where tokens come from.
        settings: Limits.
        context_length: Longest sequence of the model, in tokens.
    """

    def __init__(
        self, env_id: str, env_kwargs: Mapping[str, Any], chat: Chat, engine: Engine, settings: RolloutSettings, context_length: int
    ) -> None:
        self.make = lambda: make_env(env_id, env_kwargs)
        self.chat, self.engine, self.settings, self.context_length = chat, engine, settings, context_length
        self.envs: list[gymnasium.Env[str, str]] = []
        self.threads: ThreadPoolExecutor | None = None

    def collect(
        self, rows: Sequence[Row], *, seed: int, iteration: int, temperature: float | None = None, adapter: str | None = "student",
        progress: Callable[[int], object] | None = None,
    ) -> list[Trajectory]:  # fmt: skip
        """Play `rows`; the trajectories come back in their order.

        Args:
            rows: What to play.
            seed: Run seed; with `iteration`, the task and the member it fixes the sampling noise.
            iteration: Optimizer step the trajectories belong to.
            temperature: None takes the settings'; 0 is greedy.
            adapter: Which adapter acts; None is the untouched base.
            progress: Called with the number of finished episodes.
        """
        temperature = self.settings.temperature if temperature is None else temperature
        session = self.engine.open(temperature, adapter)
        waiting = iter(enumerate(rows))
        free = self._pool(min(len(rows), self.settings.max_rows))
        running: list[_Episode] = []
        done: dict[int, Trajectory] = {}
        while True:
            running += self._start(waiting, free, seed, iteration)
            for e in [e for e in running if e.finish]:
                done[e.index] = self._finish(e, seed, iteration)
                free.append(e.env)
            running = [e for e in running if not e.finish]
            if progress is not None:
                progress(len(done))
            if not running and len(done) == len(rows):
                return [done[i] for i in range(len(rows))]
            if running:
                self._turn(session, running)

    def close(self) -> None:
        """Close the environments, all of them even if one raises, and end the threads. The next `collect` makes new ones."""
        envs, threads = self.envs, self.threads
        self.envs, self.threads = [], None
        with ExitStack() as stack:
            for env in envs:
                stack.callback(env.close)
            if threads is not None:  # comes first: after an interruption a step may still be running
                stack.callback(threads.shutdown, cancel_futures=True)

    def _each(self, call: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`call` of every item, in their order. Of several errors the first in that order is raised, once all calls have ended."""
        if not self.settings.env_workers:
            return [call(x) for x in items]
        threads = self.threads = self.threads or ThreadPoolExecutor(self.settings.env_workers, "environment")
        futures = [threads.submit(call, x) for x in items]
        for f in futures:
            f.exception()  # waits
        return [f.result() for f in futures]

    def _pool(self, n: int) -> list[gymnasium.Env[str, str]]:
        while len(self.envs) < n:
            self.envs.append(self.make())
        return self.envs[:n]

    def _start(self, waiting: Iterator[tuple[int, Row]], free: list[gymnasium.Env[str, str]], seed: int, iteration: int) -> list[_Episode]:
        def reset(item: tuple[int, Row, gymnasium.Env[str, str]]) -> tuple[str, dict[str, Any]]:
            _, row, env = item
            # Always the same seed: a task is the same in every run and for every member of its group.
            return env.reset(seed=0, options={**row.task.options, "task_id": row.task.task_id})

        started = []
        items: list[tuple[int, Row, gymnasium.Env[str, str]]] = []
        while free and (item := next(waiting, None)) is not None:
            items.append((*item, free.pop()))
        answers = self._each(reset, items)
        firsts = [(str(i.get("instruction", "")), o, row.skill) for (_, row, _), (o, i) in zip(items, answers, strict=True)]
        prompts = self.chat.prompt_ids_many(firsts)
        for (index, row, env), (observation, info), (instruction, _, _), prompt in zip(items, answers, firsts, prompts, strict=True):
            key = stream_key(seed, "rollout", iteration, row.task.task_id, row.member)
            e = _Episode(index, row, env, key, instruction, observation, prompt, info, prompt)
            if len(prompt) > self.settings.max_prompt_tokens or self._room(e) < 1:
                e.finish = "length"
            started.append(e)
        return started

    def _room(self, e: _Episode) -> int:
        """Tokens that may still be added to the episode."""
        used = len(e.token_ids)
        return min(self.settings.max_trajectory_tokens - used, self.context_length - len(e.prompt_ids) - used)

    def _turn(self, session: Session, running: Sequence[_Episode]) -> None:
        most = self.settings.max_turn_tokens
        requests = [Request(e.index, e.new_ids, e.key, len(e.token_ids), min(most, self._room(e))) for e in running]
        completions = session.turn(requests)
        actions = [self.chat.action_text(c.token_ids) for c in completions]
        steps = self._each(lambda x: x[0].env.step(x[1]), list(zip(running, actions, strict=True)))
        going: list[tuple[_Episode, bool]] = []
        for e, c, action, (observation, reward, terminated, truncated, info) in zip(running, completions, actions, steps, strict=True):
            e.token_ids += c.token_ids
            e.action_mask += [True] * len(c.token_ids)
            e.logprobs += c.logprobs
            e.info = info
            e.turns.append(Turn(e.observation, action, float(reward)))
            e.reward += float(reward)
            e.observation = observation
            if terminated or truncated:
                e.finish = "done" if terminated else "horizon"
                e.check_failed()
            else:
                going.append((e, c.stopped))
        tails = self.chat.turn_ids_many([e.observation for e, _ in going], [stopped for _, stopped in going])
        for (e, _), e.new_ids in zip(going, tails, strict=True):
            if self._room(e) <= len(e.new_ids):
                e.finish = "length"
                continue
            e.token_ids += e.new_ids
            e.action_mask += [False] * len(e.new_ids)
            e.logprobs += [0.0] * len(e.new_ids)
        cut = [e for e in running if e.finish == "length"]
        for e, info in zip(cut, self._each(lambda e: getattr(e.env.unwrapped, "finish", lambda: e.info)(), cut), strict=True):
            e.info = info
            e.reward += float(info.get("completion", 0.0))  # the environment would have paid it at the end
            e.check_failed()

    def _finish(self, e: _Episode, seed: int, iteration: int) -> Trajectory:
        assert e.finish is not None
        return Trajectory(
            iteration=iteration, task_id=e.row.task.task_id, member=e.row.member, seed=seed, instruction=e.instruction,
            prompt_ids=tuple(e.prompt_ids), token_ids=tuple(e.token_ids), action_mask=tuple(e.action_mask), logprobs=tuple(e.logprobs),
            turns=tuple(e.turns), reward=e.reward, completion=float(e.info.get("completion", 0.0)),
            success=bool(e.info.get("success", False)), finish_reason=e.finish,
            failure=e.info["failed"] if e.finish == "failed" else "",
        )  # fmt: skip
