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
from typing import Any, Literal

import torch

from skillsd.engines.engine import Adapter, CacheFull, Completion, Engine, Request, Session
from skillsd.engines.noise import stream_key
from skillsd.environment import MAX_REWARD, TextEnv, TimeStep, make_env
from skillsd.rollout.chat import Chat
from skillsd.rollout.settings import RolloutSettings
from skillsd.timeouts import Alarm, Failure, Threads, attempt
from skillsd.trajectory import FinishReason, Task, Trajectory, Turn

log = logging.getLogger(__name__)

NOTHING = Completion([], [], False)
NOWHERE = TimeStep("")


@dataclass(frozen=True)
class Episode:
    """An episode to play: a task, the member index in its group, and a skill for the prompt of whoever acts (normally none)."""

    task: Task
    member: int = 0
    skill: str = ""


@dataclass(eq=False)
class _Running:
    """An episode in progress: what its environment is asked, and what becomes a Trajectory."""

    index: int
    episode: Episode
    env: TextEnv
    key: int
    call: Literal["reset", "step", "finish"] = "reset"
    answer: Future[Any] = field(default_factory=Future)  # to the call: a TimeStep or a Failure
    completion: Completion = NOTHING  # the action that is played
    action: str = ""
    now: TimeStep = NOWHERE  # the last one
    instruction: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    new_ids: list[int] = field(default_factory=list)  # what the engine has not seen yet
    room: int = 0  # tokens that may still be added
    token_ids: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    final_observation: str | None = None  # the one that no action has followed
    reward: float = 0.0
    finish: FinishReason | None = None
    failure: str = ""

    def ask(self, call: Literal["reset", "step", "finish"]) -> TimeStep:
        """Call the environment."""
        if call == "reset":
            return self.env.reset(self.episode.task)
        if call == "finish":
            return self.env.finish()
        if not math.isfinite(sum(self.completion.logprobs)):  # of logits that are nan
            raise Failure("model", "a sampled token's log-prob is not finite")
        return self.env.step(self.action)

    def add(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Append ids that were sampled, with their log-probs, or the environment's."""
        self.room -= len(ids)
        self.token_ids += ids
        self.action_mask += [logprobs is not None] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs

    def fail(self, failure: Failure) -> None:
        """End it; nothing that it came to counts."""
        self.finish, self.failure, self.reward, self.now = "failed", failure.text(), 0.0, NOWHERE

    def trajectory(self, seed: int, iteration: int) -> Trajectory:
        """The finished episode."""
        assert self.finish is not None
        return Trajectory(
            iteration=iteration, task_id=self.episode.task.task_id, member=self.episode.member, seed=seed, instruction=self.instruction,
            prompt_ids=tuple(self.prompt_ids), token_ids=tuple(self.token_ids), action_mask=tuple(self.action_mask),
            logprobs=tuple(self.logprobs), turns=tuple(self.turns), reward=self.reward, completion=self.now.completion,
            success=self.now.success, finish_reason=self.finish, failure=self.failure, final_observation=self.final_observation,
        )  # fmt: skip


class Collector:
    """Plays episodes of one environment with one policy.

    Environments are made when first needed and kept until `close`; one that raised, hung or answered nonsense is thrown away, its episode
    ends as failed, and the run goes on. With `settings.env_workers` they are waited for in threads, each in one at a time.
    Where the engine takes rows at any time, the others go on decoding meanwhile: which of them share a forward then depends on who is ready
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
        self.make = partial(make_env, env_id, env_kwargs, max_observation_chars=settings.max_observation_chars)
        self.chat, self.engine, self.settings, self.context_length = chat, engine, settings, context_length
        self.max_rows = settings.max_rows
        self.envs: list[TextEnv] = []
        self.threads: Threads | None = None
        self.alarm = Alarm(settings.env_timeout)
        self.unanswered: list[_Running] = []

    def collect(
        self, episodes: Sequence[Episode], *, seed: int, iteration: int, temperature: float | None = None, adapter: Adapter = "student",
        progress: Callable[[int, int], object] | None = None,
    ) -> list[Trajectory]:  # fmt: skip
        """Play episodes; the trajectories come back in their order.

        Args:
            episodes: What to play.
            seed: Run seed; with `iteration`, the task and the member it fixes the sampling noise.
            iteration: Optimizer step the trajectories belong to.
            temperature: None takes the settings'; 0 is greedy.
            adapter: Who acts.
            progress: Called with the number of finished episodes, and of all.
        """
        temperature = self.settings.temperature if temperature is None else temperature
        fresh = False
        while True:
            try:
                with self.alarm, self.engine.open(temperature, adapter) as session:
                    return self._collect(session, episodes, seed, iteration, progress)
            except CacheFull as e:
                sure, why = min(e.rows, self.max_rows), str(e)
                if fresh and sure == self.max_rows:
                    raise  # it is not the shape that an earlier rollout left the cache in
            except torch.OutOfMemoryError:
                sure, why = min(self.max_rows, len(episodes)) // 2, "out of memory in the rollout."
                if not sure:
                    raise
            self.max_rows, fresh = sure, True  # go on outside: the exception holds on to the session
            log.warning("%s It begins again with %d episodes at one time, as those after it.", why, sure)

    def _collect(
        self, session: Session, episodes: Sequence[Episode], seed: int, iteration: int, progress: Callable[[int, int], object] | None
    ) -> list[Trajectory]:
        self._settle()
        max_turn_tokens = self.settings.turn_tokens(self.context_length)
        waiting = iter(enumerate(episodes))
        n = min(len(episodes), self.max_rows)
        free: list[TextEnv | None] = [*self.envs[:n], *[None] * (n - len(self.envs))]  # None stands for one that is not made yet, or lost
        playing: dict[int, _Running] = {}
        asked: list[_Running] = []  # their environments have not answered yet
        finished: dict[int, Trajectory] = {}
        try:
            while True:
                ready: list[_Running] = []  # for their next turn
                while True:
                    while free and (item := next(waiting, None)) is not None:
                        if (env := free.pop()) is None:
                            self.envs.append(env := self.make())
                        key = stream_key(seed, "rollout", iteration, item[1].task.task_id, item[1].member)
                        asked.append(self._ask(_Running(*item, env, key), "reset"))
                    arrived = self._arrived(asked, everybody=not session.continuous, wait=not (ready or session.busy))
                    if not arrived:
                        break
                    for e in self._take(arrived, asked):
                        if e.finish is None:
                            ready.append(e)
                            continue
                        finished[e.index] = e.trajectory(seed, iteration)
                        free.append(e.env if e.env in self.envs else None)
                        if playing.pop(e.index, None):
                            session.forget([e.index])
                if progress is not None:
                    progress(len(finished), len(episodes))
                if len(finished) == len(episodes):
                    return [finished[i] for i in range(len(episodes))]
                playing |= {e.index: e for e in ready}
                session.submit([Request(e.index, e.new_ids, e.key, len(e.token_ids), min(max_turn_tokens, e.room)) for e in ready])
                for index, completion in session.step():
                    e = playing[index]
                    e.completion, e.action = completion, self.chat.action_text(completion.token_ids)
                    asked.append(self._ask(e, "step"))
        finally:
            self.unanswered = [e for e in asked if not e.answer.cancel()]  # after an error

    def close(self) -> None:
        """Close the environments, all of them even if one raises, and end the threads. The next `collect` makes new ones."""
        envs, threads = self.envs, self.threads
        self.envs, self.threads, self.unanswered = [], None, []
        with ExitStack() as stack:
            for env in envs:
                stack.callback(self._close, env)
            if threads is not None:  # comes first: after an interruption a step may still be running
                stack.callback(threads.close)

    def _close(self, env: TextEnv) -> None:
        with self.alarm as alarm:
            failure = alarm(env.close)
        if failure is not None and failure.kind != "hung":
            raise env.failure("close()", failure)
        if failure is not None:
            log.warning("an environment did not close in %g s and is left as it is.", self.settings.env_timeout)

    def _settle(self) -> None:
        """After an error: an environment is in one thread at a time, and what has failed meanwhile is not used again."""
        asked, self.unanswered = self.unanswered, []
        if self.threads is not None:
            self.threads.wait([e.answer for e in asked])
        for e in asked:
            if e.answer.exception() is not None or isinstance(e.answer.result(), Failure):
                self._discard(e.env)

    def _discard(self, env: TextEnv) -> None:
        """Not used again. Closing it is a thread's business: it may hang, or raise, and nobody waits for it."""
        if env in self.envs:
            self.envs.remove(env)
            threading.Thread(target=attempt, args=(env.close,), name="closing", daemon=True).start()

    def _ask(self, e: _Running, call: Literal["reset", "step", "finish"]) -> _Running:
        """Begin a call of the episode's environment, perhaps in a thread."""
        calls: Alarm | Threads = self.alarm
        if self.settings.env_workers:
            calls = self.threads = self.threads or Threads(self.settings.env_workers, self.settings.env_timeout)
        e.call, e.answer = call, calls.submit(partial(e.ask, call))
        return e

    def _arrived(self, asked: list[_Running], everybody: bool, wait: bool) -> list[_Running]:
        """Take those that are answered out of the list, in their order. Of several interruptions the first is raised.

        Args:
            asked: All.
            everybody: Wait for all of them.
            wait: Wait for one at least.
        """
        if asked and (everybody or wait) and self.threads is not None:
            self.threads.wait([e.answer for e in asked], everybody)
        arrived = sorted((e for e in asked if e.answer.done()), key=lambda e: e.index)
        over = set(arrived)
        asked[:] = [e for e in asked if e not in over]
        for e in arrived:
            e.answer.result()
        return arrived

    def _take(self, arrived: Sequence[_Running], asked: list[_Running]) -> list[_Running]:
        """Go on from what environments have answered. The episodes that are ready for their next turn, or finished; those that are cut are
        asked what they came to."""
        began: list[_Running] = []
        going: list[_Running] = []
        for e in arrived:
            now = e.answer.result()
            failure = now if isinstance(now, Failure) else None
            if e.call == "step" and not (failure and failure.kind == "model"):  # what such a model says is no action
                e.add(e.completion.token_ids, e.completion.logprobs)
                e.turns.append(Turn(e.now.observation, e.action, 0.0 if failure else now.reward, None if failure else now.valid))
                e.final_observation = None
            if failure is not None:
                e.fail(failure)
                if failure.kind not in ("environment", "model"):
                    self._discard(e.env)
                continue
            e.now, e.final_observation, e.finish = now, now.observation, now.finish
            e.reward += now.reward
            if abs(e.reward) > MAX_REWARD:
                e.fail(Failure("reward", f"the rewards add up to {e.reward:g}, more than {MAX_REWARD:g}"))
            elif e.call == "reset":
                began.append(e)
            elif e.finish is None:
                going.append(e)
        prompts = self.chat.prompt_ids_many([(e.now.instruction, e.now.observation, e.episode.skill) for e in began])
        for e, prompt in zip(began, prompts, strict=True):
            e.instruction, e.prompt_ids, e.new_ids = e.now.instruction, prompt, prompt
            e.room = min(self.settings.max_trajectory_tokens, self.context_length - len(prompt))
            if len(prompt) > self.settings.max_prompt_tokens or e.room < 1:
                e.finish = "length"  # it is not played
        tails = self.chat.turn_ids_many([e.now.observation for e in going], [e.completion.stopped for e in going])
        cut = []
        for e, tail in zip(going, tails, strict=True):
            e.new_ids = tail
            if e.room > len(tail):
                e.add(tail)
            else:  # the environment would have paid its completion at the end
                cut.append(self._ask(e, "finish"))
        asked += cut
        return [e for e in arrived if e not in cut]
