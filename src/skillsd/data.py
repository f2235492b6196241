"""The data: tasks in, groups of trajectories out. The stream is Algorithm 1, lines 2 and 3: retrieve, then roll out."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from skillsd import ranks
from skillsd.errors import ConfigError
from skillsd.module import last_checkpoint
from skillsd.policy import Policy
from skillsd.policy.load import load_tokenizer
from skillsd.rollout import (
    CacheFull,
    Chat,
    Collector,
    Completion,
    Request,
    RolloutSettings,
    Row,
    ask,
    demonstrate,
    make_engine,
    make_env,
    read_tasks,
    tasks_of,
)
from skillsd.rollout.noise import stream_key
from skillsd.skills import BankContext, ShuffledContext, Skill, Summariser
from skillsd.skills.callback import SkillBankCallback
from skillsd.trajectory import Task, Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)


class RolloutData(L.LightningDataModule):
    """Streams rollouts of a text environment. With several ranks each plays its share of an iteration's tasks, and all get the whole batch.

    Args:
        env: Gymnasium id, `module:Id-v0`; the environment fulfils `skillsd.testing.check_text_env`.
        env_kwargs: Its keyword arguments.
        env_overrides: Environment id -> what an overlay changes in that environment's env_kwargs (a dictionary in a later file replaces
            an earlier one whole); entries of other environments are ignored, so that one overlay serves several experiments.
        train_split: Split of the training tasks, a fixed set: an epoch visits each once.
        panel_split: Split of the held-out panel.
        tasks_file: A JSONL file of tasks instead of the environment's own; each line holds task_id and split, maybe difficulty and
            scenario, and options for `reset`.
        batch_tasks: Tasks an iteration.
        group_size: Trajectories a task, G.
        actor: Who rolls out: `student`, under the plain prompt; `student_with_skill` (skill-augmented GRPO); `half_with_skill`, the second
            half of each group with it, each half's teacher being the other view (UCOB); `teacher`, with the skill (off-policy, Eq. 13).
        rollout: How episodes are played.
        panel_temperature: 0 is greedy.
        panel_attempts: Episodes a panel task (pass@k needs several and a temperature).
        panel_seeds: Seeds of the panel's sampling noise; each plays all attempts.
        panel_adapter: Which adapter plays the panel; null is the untouched base.
        seed: Run seed (linked to `seed_everything`).
    """

    def __init__(
        self,
        env: str,
        env_kwargs: dict[str, Any] | None = None,
        env_overrides: dict[str, Any] | None = None,
        train_split: str = "train",
        panel_split: str = "test",
        tasks_file: str | None = None,
        batch_tasks: int = 16,
        group_size: int = 4,
        actor: Literal["student", "student_with_skill", "half_with_skill", "teacher"] = "student",
        rollout: RolloutSettings | None = None,
        panel_temperature: float = 0.0,
        panel_attempts: int = 1,
        panel_seeds: list[int] | None = None,
        panel_adapter: str | None = "student",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value in {"batch_tasks": batch_tasks, "group_size": group_size, "panel_attempts": panel_attempts}.items():
            if value < 1:
                raise ConfigError(f"data.init_args.{key} is {value}: give at least 1.")
        if panel_temperature < 0:
            raise ConfigError(f"data.init_args.panel_temperature is {panel_temperature}: 0 is greedy, more samples.")
        self.env_id, self.env_kwargs = env, {**(env_kwargs or {}), **_overrides(env, env_overrides or {})}
        self.train_split, self.panel_split, self.tasks_file = train_split, panel_split, tasks_file
        self.batch_tasks, self.group_size, self.rollout = batch_tasks, group_size, rollout or RolloutSettings()
        self.actor = actor
        self.panel_temperature, self.panel_attempts, self.panel_adapter = panel_temperature, panel_attempts, panel_adapter
        self.panel_seeds, self.seed = panel_seeds or [0], seed
        self.rollout_s = 0.0
        self._resume_at = 0
        self._stream: GroupStream | None = None
        self._collector: Collector | None = None

    def setup(self, stage: str) -> None:
        """List the tasks. Raises ConfigError for an empty split, overlapping splits, or G < 2 where a group baseline is needed."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        self.panel_tasks = self._tasks(self.panel_split, "panel_split")
        if stage != "fit":
            self._check_playable(self.panel_tasks)
            self._check_chat(module)
            return
        self._resume_at, self._stream = 0, None
        self.train_tasks = self._tasks(self.train_split, "train_split")
        both = {t.task_id for t in self.train_tasks} & {t.task_id for t in self.panel_tasks}
        if both:
            raise ConfigError(
                f"data.init_args: train_split and panel_split share {len(both)} tasks ({min(both)}, ...): name two that are disjoint."
            )
        contexts = (BankContext, ShuffledContext)
        if self.actor != "student" and (self.bank is None or not isinstance(self.bank.context, contexts)):
            raise ConfigError(
                f"data.init_args.actor is {self.actor}, which needs a skill before the rollout: "
                "set skills.context to skillsd.skills.BankContext."
            )
        refused = {"half_with_skill": ("gap", "next_visit"), "student_with_skill": ("gap",)}.get(self.actor, ())
        if self.bank is not None and self.bank.bank_settings["booking"] in refused:
            raise ConfigError(
                f"skills.booking is {self.bank.bank_settings['booking']}, which means nothing where data.init_args.actor is {self.actor}: "
                "set it to source."
            )
        if self.group_size < 2 and module.objective.policy_weight > 0:
            raise ConfigError(
                f"data.init_args.group_size is {self.group_size}: GRPO needs at least 2 trajectories a task, "
                "or set model.init_args.objective.policy_weight to 0."
            )
        self._check_playable([*self.train_tasks, *self.panel_tasks])
        self._check_chat(module)

    def _check_chat(self, module: Any) -> None:
        """Refuse a chat template before anything is written; after the tasks, since a hub's tokenizer may take minutes not to come."""
        if module is not None:
            Chat(load_tokenizer(module.settings), ())

    def _check_playable(self, tasks: Sequence[Task]) -> None:
        """Reset the environment to each task of a file: a bad board is better known now than in the middle of a run."""
        if self.tasks_file is None:
            return
        with closing(make_env(self.env_id, self.env_kwargs)) as env:
            for task in tasks:
                try:
                    env.reset(seed=0, options={**task.options, "task_id": task.task_id})
                except (ValueError, KeyError, TypeError) as e:
                    raise ConfigError(f"data.init_args.tasks_file: {self.tasks_file}, task {task.task_id}: {e}") from e

    def _tasks(self, split: str, key: str) -> list[Task]:
        if self.tasks_file is not None:
            return read_tasks(Path(self.tasks_file), split, key)
        env: Any
        with closing(make_env(self.env_id, self.env_kwargs)) as env:
            try:
                tasks = ask(env, f"tasks({split!r})", lambda: tasks_of(env, split), (ValueError, KeyError, FileNotFoundError))
            except ConfigError:
                raise
            except (ValueError, KeyError, FileNotFoundError) as e:
                raise ConfigError(f"data.init_args.{key}: {e}") from e
        listed = [Task(t["task_id"], split, str(t.get("difficulty") or ""), scenario=str(t.get("scenario") or "")) for t in tasks]
        if not listed:
            raise ConfigError(f"data.init_args.{key}: the split {split} has no tasks: name another or enlarge it in env_kwargs.")
        return listed

    def teardown(self, stage: str) -> None:
        """Close the environments and the engine. The collector is made anew if it is needed again."""
        collector, self._collector = self._collector, None
        if collector is not None:
            try:
                collector.close()
            finally:
                collector.engine.close()

    def on_exception(self, exception: BaseException) -> None:
        """Close the environments: Lightning calls no `teardown` after an error or an interruption."""
        self.teardown("exception")

    @property
    def policy(self) -> Policy:
        """The module's policy."""
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        return module.policy  # type: ignore[no-any-return]

    @property
    def collector(self) -> Collector:
        """The collector on the module's policy, made when first used."""
        if self._collector is None:
            policy = self.policy
            chat = Chat(policy.tokenizer, policy.stop_ids)
            engine = make_engine(policy, self.rollout)
            self._collector = Collector(self.env_id, self.env_kwargs, chat, engine, self.rollout, policy.context_length)
        return self._collector

    @property
    def bank(self) -> SkillBankCallback | None:
        """The SkillBank callback of this run, if it has one."""
        trainer: Any = self.trainer
        return next((c for c in trainer.callbacks if isinstance(c, SkillBankCallback)), None)

    def train_dataloader(self) -> GroupStream:
        if self.bank is not None:
            self.bank.bind(self.generate, self.solution)
        self._stream = GroupStream(self)
        self._stream.position = self._resume_at
        return self._stream

    def state_dict(self) -> dict[str, int]:
        """The stream's. Lightning restores a loader only if nobody asked for its length (estimated_stepping_batches) before."""
        return self._stream.state_dict() if self._stream is not None else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The inverse of `state_dict`; comes before `train_dataloader`."""
        self._resume_at = state["position"]

    def val_dataloader(self) -> PanelStream:
        return PanelStream(self)

    def generate(
        self, conversations: Sequence[Any], max_new_tokens: int, seed_keys: Sequence[Any], adapter: str | None = None
    ) -> list[str]:
        """Answers to whole conversations, sampled at the training temperature; the default is the untouched base model.

        Args:
            conversations: Lists of {role, content}.
            max_new_tokens: Most tokens of an answer.
            seed_keys: What the noise of each is for.
            adapter: Who answers.

        Returns:
            The texts; "" where the conversation leaves no room for an answer.
        """
        chat, texts, engine = self.collector.chat, [""] * len(conversations), self.collector.engine
        context = min(self.policy.context_length, engine.most_tokens())
        prompts = [chat.conversation_ids(c) for c in conversations]
        todo = [i for i, p in enumerate(prompts) if len(p) < context]
        longest = max((len(prompts[i]) for i in todo), default=0) + max_new_tokens
        most = min(self.rollout.max_rows, engine.most_rows(min(context, longest)))

        def answers(part: Sequence[int]) -> list[Completion]:
            session = engine.open(self.rollout.temperature, adapter)
            limits = [min(max_new_tokens, context - len(prompts[i])) for i in part]
            keys = [stream_key("generate", *seed_keys[i]) for i in part]
            return session.turn([Request(i, prompts[i], k, 0, n) for i, k, n in zip(part, keys, limits, strict=True)])

        for start in range(0, len(todo), most):
            part, said = todo[start : start + most], None
            with suppress(CacheFull, torch.OutOfMemoryError):  # an earlier rollout left the cache in another shape
                said = answers(part)
            if said is None:
                engine.release(everything=True)
                said = answers(part)
            for i, completion in zip(part, said, strict=True):
                texts[i] = chat.action_text(completion.token_ids)
        engine.release()
        return texts

    def solution(self, task_id: str, summariser: Summariser) -> Skill | None:
        """The summary of the environment's own solution of a training task; None if it has none. Its rewards are not looked at."""
        task = next(t for t in self.train_tasks if t.task_id == task_id)
        with closing(make_env(self.env_id, self.env_kwargs)) as env:
            if not hasattr(env.unwrapped, "solution"):
                raise ConfigError(f"skills.context: {self.env_id} offers no solution(): choose another context.")
            turns, _, instruction, success = demonstrate(env, task, 0.0, random.Random(0))
        if not turns:
            return None
        share = float(success)
        trajectory = Trajectory(0, task_id, 0, 0, instruction, (), (), (), (), tuple(turns), share, share, success, "done")
        return summariser.summarise([trajectory])[0]


class GroupStream:
    """The train loader: a pure function of (run seed, iteration) and of the weights and the bank at that point.

    Its state is one integer, the number of iterations begun, so a run resumes where its checkpoint stands.
    """

    def __init__(self, data: RolloutData) -> None:
        self.data, self.position = data, 0

    def __len__(self) -> int:
        return -(-len(self.data.train_tasks) // self.data.batch_tasks)

    def __iter__(self) -> Iterator[list[TrajectoryGroup]]:
        for _ in range(self.position % len(self), len(self)):
            iteration, self.position = self.position, self.position + 1
            yield self._groups(iteration)

    def state_dict(self) -> dict[str, int]:
        """For the checkpoint."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The inverse of `state_dict`."""
        self.position = state["position"]

    def order(self, epoch: int) -> list[Task]:
        """The tasks in the epoch's order, drawn from (run seed, epoch)."""
        return sorted(self.data.train_tasks, key=lambda t: blake2b(f"{self.data.seed}/order/{epoch}/{t.task_id}".encode()).digest())

    def _groups(self, iteration: int) -> list[TrajectoryGroup]:
        d = self.data
        epoch, index = divmod(iteration, len(self))
        tasks = self.order(epoch)[index * d.batch_tasks : (index + 1) * d.batch_tasks]
        skills: list[tuple[int | None, str]] = [(None, "")] * len(tasks)
        if d.bank is not None:
            every = [t.task_id for t in d.train_tasks]
            skills = d.bank.choose([t.task_id for t in tasks], every, d.seed, epoch, epoch_start=index == 0)
        started = time.perf_counter()
        share = ranks.share(len(tasks))
        played = self._play([tasks[i] for i in share], [text for _, text in skills[share.start : share.stop]], iteration)
        mine = [played[i : i + d.group_size] for i in range(0, len(played), d.group_size)]
        d.rollout_s = time.perf_counter() - started
        after = d.bank.texts(mine, iteration) if d.bank is not None else None
        groups = [
            self._group(tasks[i], g, skills[i][0], after[k] if after else [skills[i][1]] * len(g))
            for k, (i, g) in enumerate(zip(share, mine, strict=True))
        ]
        told = ranks.gather((d.rollout_s, groups))  # from here on every rank has the whole batch
        d.rollout_s = max(seconds for seconds, _ in told)
        self._check_failed([t for _, part in told for g in part for t in g.trajectories], iteration)
        return [g for _, part in told for g in part]

    def _play(self, tasks: Sequence[Task], skills: Sequence[str], iteration: int) -> list[Trajectory]:
        """The tasks' groups, one after another."""
        d = self.data
        first = {"student": d.group_size, "half_with_skill": -(-d.group_size // 2)}.get(d.actor, 0)  # member that acts with the skill
        rows = [Row(t, k, text if k >= first else "") for t, text in zip(tasks, skills, strict=True) for k in range(d.group_size)]
        adapter = "teacher" if d.actor == "teacher" else "student"
        played = d.collector.collect(rows, seed=d.seed, iteration=iteration, adapter=adapter)
        # A skill that leaves no room to act is left out: an episode that was not played would count as a reward of 0.
        if crowded := [i for i, t in enumerate(played) if rows[i].skill and not t.turns and t.finish_reason == "length"]:
            log.warning("iteration %d: %d prompts with a skill are too long; these episodes are played without.", iteration, len(crowded))
            plain = [replace(rows[i], skill="") for i in crowded]
            for i, t in zip(crowded, d.collector.collect(plain, seed=d.seed, iteration=iteration, adapter=adapter), strict=True):
                played[i] = t
        d.collector.engine.release()
        return played

    def _check_failed(self, played: Sequence[Trajectory], iteration: int) -> None:
        failed = [t for t in played if t.failed]
        if failed and ranks.leads():
            log.warning("iteration %d: %d of %d episodes failed: %s", iteration, len(failed), len(played), failed[0].failure)
        if len(failed) > self.data.rollout.max_failed * len(played):
            raise ConfigError(self._summary(iteration, failed, len(played)))

    def _summary(self, iteration: int, failed: Sequence[Trajectory], episodes: int) -> str:
        kinds = Counter(t.failure_kind for t in failed)
        first = {t.failure_kind: t for t in reversed(failed)}
        told = "; ".join(f"{n} {k}, first on task {first[k].task_id}: {first[k].failure[:200]}" for k, n in kinds.items())
        return (
            f"rollout.max_failed is {self.data.rollout.max_failed:g}, and in iteration {iteration} {len(failed)} of {episodes} episodes "
            f"failed ({told}). {last_checkpoint(self.data.trainer)}: mend the environment and resume, or set a larger share."
        )

    def _group(self, task: Task, played: Sequence[Trajectory], skill_id: int | None, texts: Sequence[str]) -> TrajectoryGroup:
        """Texts: what each member's teacher is told."""
        d = self.data
        seen = next((t for t in played if t.turns), None) or next((t for t in played if t.prompt_ids), played[0])  # some may have failed

        @cache
        def prompt(text: str) -> tuple[int, ...]:
            return tuple(d.collector.chat.prompt_ids(seen.instruction, seen.turns[0].observation, text)) if seen.turns else seen.prompt_ids

        acted, plain, told = [t.prompt_ids for t in played], [prompt("")] * len(played), [prompt(x) for x in texts]
        student, teacher = {
            "student": (plain, told),
            "student_with_skill": (acted, acted),
            "half_with_skill": (acted, [x if a == p else p for a, p, x in zip(acted, plain, told, strict=True)]),
            "teacher": (plain, acted),
        }[d.actor]
        return TrajectoryGroup(
            task, tuple(replace(t, skill_id=skill_id) for t in played), tuple(student), tuple(teacher), skill_id, d.rollout.temperature,
            by_teacher=d.actor == "teacher",
        )  # fmt: skip


class PanelStream:
    """The validation loader: batches of held-out episodes in the panel's order, of which each rank plays a share. Played anew each time."""

    def __init__(self, data: RolloutData) -> None:
        self.data = data
        self.rows = [(seed, Row(task, k)) for seed in data.panel_seeds for task in data.panel_tasks for k in range(data.panel_attempts)]
        self.size = 4 * data.rollout.max_rows * ranks.world()

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[list[Trajectory]]:
        d = self.data
        for start in range(0, len(self.rows), self.size):
            part = self.rows[start : start + self.size]
            mine = [part[i] for i in ranks.share(len(part))]
            played: list[Trajectory] = []
            for seed in dict.fromkeys(s for s, _ in mine):
                rows = [r for s, r in mine if s == seed]
                played += d.collector.collect(rows, seed=seed, iteration=0, temperature=d.panel_temperature, adapter=d.panel_adapter)
            yield [t for theirs in ranks.gather(played) for t in theirs]


def _overrides(env: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of `env`. Raises ConfigError for one that is not named after an environment, or is no dictionary."""
    for key, value in overrides.items():
        if ":" not in key:
            raise ConfigError(
                f"data.init_args.env_overrides.{key}: entries are named after environments: write env_overrides: {{{env}: {{{key}: ...}}}}."
            )
        if not isinstance(value, Mapping):
            raise ConfigError(f"data.init_args.env_overrides.{key} is {value!r}: give a dictionary of that environment's env_kwargs.")
    return dict(overrides.get(env, {}))
