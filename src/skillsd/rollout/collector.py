"""The collector: many environments and one engine session, from tasks to trajectories. Token in, token out."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import torch

from skillsd.engines.cache import CacheFull
from skillsd.engines.engine import Completion, Engine, Request
from skillsd.engines.noise import stream_key
from skillsd.errors import ConfigError, no_module
from skillsd.rollout import answers
from skillsd.rollout.answers import NOTHING, End, Env
from skillsd.rollout.chat import Chat
from skillsd.rollout.settings import RolloutSettings
from skillsd.timeouts import Alarm, Failure, Threads, attempt
from skillsd.trajectory import FinishReason, Task, Trajectory, Turn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One episode to play: a task, the member index in its group, and a skill for the prompt of whoever acts (normally none)."""

    task: Task
    member: int = 0
    skill: str = ""


def make_env(env_id: str, kwargs: Mapping[str, Any]) -> Env:
    """`gymnasium.make` with a one-line error. `module:Id-v0` imports the module that registers the id."""
    try:
        return gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    except (ValueError, TypeError, OSError, gymnasium.error.Error, ModuleNotFoundError) as e:
        told = str(e).partition(" was raised from the environment creator")[0]
        if isinstance(e, ModuleNotFoundError) and isinstance(e.__cause__, ModuleNotFoundError) and e.__cause__.name:
            told = no_module(e.__cause__.name)
        raise ConfigError(f"data.init_args.env, env_kwargs: {env_id}: {' '.join(told.split())}") from e


@dataclass(eq=False)
class _Episode:
    """A row in progress."""

    index: int
    row: Row
    env: Env
    key: int
    instruction: str = ""
    observation: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    info: Mapping[str, Any] = field(default_factory=dict)  # the last one
    new_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    final_observation: str | None = None  # the one that no action has followed
    reward: float = 0.0
    end: End = NOTHING
    finish: FinishReason | None = None
    failure: Failure | None = None

    def fail(self, failure: Failure) -> None:
        """Nothing else that it came to counts."""
        self.finish, self.failure, self.reward, self.end = "failed", failure, 0.0, NOTHING


class _Job(NamedTuple):
    """A call of an environment, perhaps in a thread: reset, step, or the score of an episode that is cut (finish). See `answers`."""

    kind: str
    episode: _Episode
    answer: Future[Any]
    completion: Completion = Completion([], [], False)
    action: str = ""


class Collector:
    """Plays episodes of one environment with one policy.

    Environments are made when first needed and kept until `close`; one that raised, hung or answered nonsense is thrown away, its episode
    ends as failed, and the run goes on. With `settings.env_workers` they are waited for in threads, each in one at a time.
    Where the engine takes rows at any time, the others go on decoding meanwhile: which rows share a forward then depends on who is ready
    first, and with it the rounding of logits, which now and then decides a draw. Where it does not, everybody waits for everybody, and the
    trajectories are those without threads to the bit.

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
        self.most_rows = settings.max_rows
        self.envs: list[Env] = []
        self.threads: Threads | None = None
        self.alarm = Alarm(settings.env_timeout)
        self.unanswered: list[_Job] = []

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
        longest = min(self.context_length, self.settings.max_prompt_tokens + self.settings.max_trajectory_tokens)
        fresh = False
        while True:
            try:
                with self.alarm:
                    return self._collect(rows, seed, iteration, temperature, adapter, progress)
            except CacheFull as e:
                sure, why = min(self.engine.most_rows(longest), self.most_rows), str(e)
                if fresh and sure == self.most_rows:
                    raise  # it is not the shape that an earlier rollout left the cache in
            except torch.OutOfMemoryError:
                sure, why = min(self.engine.most_rows(longest), self.most_rows, len(rows)) // 2, "out of memory in the rollout."
                if not sure:
                    raise
            self.most_rows, fresh = sure, True  # go on outside: the exception holds on to the session
            self.engine.release(everything=True)
            log.warning("%s It begins again with %d episodes at one time, as those after it.", why, sure)

    def _collect(
        self, rows: Sequence[Row], seed: int, iteration: int, temperature: float, adapter: str | None,
        progress: Callable[[int], object] | None,
    ) -> list[Trajectory]:  # fmt: skip
        self._settle()
        session = self.engine.open(temperature, adapter)
        waiting = iter(enumerate(rows))
        free: list[Env | None] = [*self._pool(min(len(rows), self.most_rows))]
        playing: dict[int, _Episode] = {}
        jobs: list[_Job] = []
        done: dict[int, Trajectory] = {}
        try:
            while True:
                ready: list[_Episode] = []  # for their next turn
                while True:
                    while free and (item := next(waiting, None)) is not None:
                        key = stream_key(seed, "rollout", iteration, item[1].task.task_id, item[1].member)
                        jobs.append(self._reset(_Episode(*item, self._new() if (env := free.pop()) is None else env, key)))
                    arrived = self._arrived(jobs, everybody=not session.continuous, wait=not (ready or session.busy))
                    if not arrived:
                        break
                    for e in self._take(arrived, jobs):
                        if e.finish is None:
                            ready.append(e)
                            continue
                        done[e.index] = self._finish(e, seed, iteration)
                        free.append(e.env if e.env in self.envs else None)
                        if playing.pop(e.index, None):
                            session.forget([e.index])
                if progress is not None:
                    progress(len(done))
                if len(done) == len(rows):
                    return [done[i] for i in range(len(rows))]
                playing |= {e.index: e for e in ready}
                most = self.settings.turn_tokens(self.context_length)
                session.submit([Request(e.index, e.new_ids, e.key, len(e.token_ids), min(most, self._room(e))) for e in ready])
                said = session.step()
                actions = [self.chat.action_text(c.token_ids) for _, c in said]
                jobs += [self._step(playing[index], c, action) for (index, c), action in zip(said, actions, strict=True)]
        finally:
            self.unanswered = [j for j in jobs if not j.answer.cancel()]  # after an error

    def close(self) -> None:
        """Close the environments, all of them even if one raises, and end the threads. The next `collect` makes new ones."""
        envs, threads = self.envs, self.threads
        self.envs, self.threads, self.unanswered = [], None, []
        with ExitStack() as stack:
            for env in envs:
                stack.callback(self._close, env)
            if threads is not None:  # comes first: after an interruption a step may still be running
                stack.callback(threads.close)

    def _close(self, env: Env) -> None:
        errors: list[Exception] = []

        def close() -> None:
            try:
                env.close()
            except Exception as e:
                errors.append(e)

        with self.alarm as alarm:
            if alarm(close) is not None:
                log.warning("an environment did not close in %g s and is left as it is.", self.settings.env_timeout)
        if errors:
            raise errors[0]

    def _settle(self) -> None:
        """After an error: an environment is in one thread at a time, and what has failed meanwhile is not used again."""
        jobs, self.unanswered = self.unanswered, []
        if self.threads is not None:
            self.threads.wait([j.answer for j in jobs])
        for j in jobs:
            if j.answer.exception() is not None or isinstance(j.answer.result(), Failure):
                self._discard(j.episode.env)

    def _new(self) -> Env:
        self.envs.append(self.make())
        return self.envs[-1]

    def _discard(self, env: Env) -> None:
        """Not used again. Closing it is a thread's business: it may hang, or raise, and nobody waits for it."""
        if env in self.envs:
            self.envs.remove(env)
            threading.Thread(target=attempt, args=(env.close,), name="closing", daemon=True).start()

    def _call(self, kind: str, e: _Episode, call: Callable[[], Any], *said: Any) -> _Job:
        if self.settings.env_workers:
            self.threads = self.threads or Threads(self.settings.env_workers, self.settings.env_timeout)
            return _Job(kind, e, self.threads.submit(call), *said)
        answer: Future[Any] = Future()
        answer.set_result(self.alarm(call))
        return _Job(kind, e, answer, *said)

    def _reset(self, e: _Episode) -> _Job:
        return self._call("reset", e, partial(answers.reset, e.env, e.row.task, self.settings.max_observation_chars))

    def _step(self, e: _Episode, completion: Completion, action: str) -> _Job:
        if not math.isfinite(sum(completion.logprobs)):  # of logits that are nan: what was drawn from them is no answer
            answer: Future[Any] = Future()
            answer.set_result(Failure("model", "a sampled token's log-prob is not finite"))
            return _Job("step", e, answer)
        return self._call("step", e, partial(answers.step, e.env, action, self.settings.max_observation_chars), completion, action)

    def _arrived(self, jobs: list[_Job], everybody: bool, wait: bool) -> list[_Job]:
        """Take the jobs that are done out of the list, in the order of the rows; of several interruptions the first is raised.

        Args:
            jobs: All.
            everybody: Wait for all of them.
            wait: Wait for one at least.
        """
        if jobs and (everybody or wait) and self.threads is not None:
            self.threads.wait([j.answer for j in jobs], everybody)
        done = [j.answer.done() for j in jobs]
        arrived = sorted((j for j, over in zip(jobs, done, strict=True) if over), key=lambda j: j.episode.index)
        jobs[:] = [j for j, over in zip(jobs, done, strict=True) if not over]
        for j in arrived:
            j.answer.result()
        return arrived

    def _pool(self, n: int) -> list[Env]:
        while len(self.envs) < n:
            self._new()
        return self.envs[:n]

    def _take(self, arrived: Sequence[_Job], jobs: list[_Job]) -> list[_Episode]:
        """What environments have answered. Episodes that are ready for their next turn, or finished; those to be scored become jobs."""
        began: list[_Episode] = []
        going: list[tuple[_Episode, bool]] = []
        for j in arrived:
            e, answer = j.episode, j.answer.result()
            if j.kind == "step" and j.completion.token_ids:
                e.token_ids += j.completion.token_ids
                e.action_mask += [True] * len(j.completion.token_ids)
                e.logprobs += j.completion.logprobs
                reward, valid = (0.0, None) if isinstance(answer, Failure) else (answer.reward, answers.valid(answer.info))
                e.turns.append(Turn(e.observation, j.action, reward, valid))
                e.final_observation = None
            if isinstance(answer, Failure):
                e.fail(answer)
                if answer.kind not in ("environment", "model"):
                    self._discard(e.env)
            elif j.kind == "reset":
                e.observation, e.instruction, e.info = answer
                e.final_observation = e.observation
                began.append(e)
            elif j.kind == "step":
                e.observation, reward, e.finish, e.end, e.info = answer
                e.final_observation = e.observation
                e.reward += reward
                if abs(e.reward) > answers.MAX_REWARD:
                    e.fail(Failure("reward", f"the rewards add up to {e.reward:g}, more than {answers.MAX_REWARD:g}"))
                elif e.finish is None:
                    going.append((e, j.completion.stopped))
            else:
                e.finish, e.end = "length", answer
                e.reward += e.end.completion
        prompts = self.chat.prompt_ids_many([(e.instruction, e.observation, e.row.skill) for e in began])
        for e, prompt in zip(began, prompts, strict=True):
            e.prompt_ids = e.new_ids = prompt
            if len(e.prompt_ids) > self.settings.max_prompt_tokens or self._room(e) < 1:
                e.finish, stands = "length", attempt(partial(answers.end, e.info))
                if isinstance(stands, Failure):
                    e.fail(stands)
                else:
                    e.end = stands
        tails = self.chat.turn_ids_many([e.observation for e, _ in going], [stopped for _, stopped in going])
        cut = []
        for (e, _), tail in zip(going, tails, strict=True):
            e.new_ids = tail
            if self._room(e) <= len(e.new_ids):
                cut.append(e)
                continue
            e.token_ids += e.new_ids
            e.action_mask += [False] * len(e.new_ids)
            e.logprobs += [0.0] * len(e.new_ids)
        for e in cut:  # the environment would have paid its completion at the end
            jobs.append(self._call("finish", e, partial(answers.score, e.env, e.info)))
        return [j.episode for j in arrived if j.episode not in cut]

    def _room(self, e: _Episode) -> int:
        """Tokens that may still be added to the episode."""
        used = len(e.token_ids)
        return min(self.settings.max_trajectory_tokens - used, self.context_length - len(e.prompt_ids) - used)

    def _finish(self, e: _Episode, seed: int, iteration: int) -> Trajectory:
        assert e.finish is not None
        return Trajectory(
            iteration=iteration, task_id=e.row.task.task_id, member=e.row.member, seed=seed, instruction=e.instruction,
            prompt_ids=tuple(e.prompt_ids), token_ids=tuple(e.token_ids), action_mask=tuple(e.action_mask), logprobs=tuple(e.logprobs),
            turns=tuple(e.turns), reward=e.reward, completion=e.end.completion, success=e.end.success, finish_reason=e.finish,
            failure=e.failure.text() if e.failure is not None else "", final_observation=e.final_observation,
        )  # fmt: skip
