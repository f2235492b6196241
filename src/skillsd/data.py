"""The data: tasks in, groups of trajectories out (`stream`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng

from skillsd import parallel
from skillsd.demonstration import demonstrate
from skillsd.engines.engine import Request, complete
from skillsd.engines.make_engine import make_engine
from skillsd.engines.noise import stream_key
from skillsd.environment import TextEnv, make_env
from skillsd.errors import ConfigError
from skillsd.files.checkpoint import how_to_resume
from skillsd.files.continuation import check_episodes, episodes
from skillsd.panel_stream import PanelStream
from skillsd.policy import Policy
from skillsd.policy.load import load_tokenizer
from skillsd.rollout import Background, Chat, Collector, RolloutSettings
from skillsd.skills import Skill, Summariser
from skillsd.skills.context import GroupContext, NoContext
from skillsd.skills.selection import SkillSelection
from skillsd.stream import GroupStream, Progress
from skillsd.tasks import read_tasks
from skillsd.testing import check_before_run
from skillsd.trajectory import Task

log = logging.getLogger(__name__)
ACTOR_NEEDS_SKILL = "data.actor is {}, which needs a skill before the rollout: set skills.context to skillsd.skills.BankContext."


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
                raise ConfigError(f"data.{key} is {value}: give at least 1.")
        if panel_temperature < 0:
            raise ConfigError(f"data.panel_temperature is {panel_temperature}: give 0 (greedy) or more (the panel is sampled).")
        self.env_id, self.env_kwargs = env, {**(env_kwargs or {}), **_overrides(env, env_overrides or {})}
        self.train_split, self.panel_split, self.tasks_file = train_split, panel_split, tasks_file
        self.batch_tasks, self.group_size, self.rollout = batch_tasks, group_size, rollout or RolloutSettings()
        self.actor: str = actor
        self.panel_temperature, self.panel_attempts, self.panel_adapter = panel_temperature, panel_attempts, panel_adapter
        self.panel_seeds, self.seed = panel_seeds or [0], seed
        self.progress: Progress | None = None
        self.selection: SkillSelection | None = None
        self._resume_at = 0
        self._episodes: dict[str, str] | None = None  # of a run that trains
        self._stream: GroupStream | None = None
        self._collector: Collector | None = None
        self._background: Background | None = None

    def setup(self, stage: str) -> None:
        """List the tasks. Raises ConfigError for an empty split, overlapping splits, or G < 2 where a group baseline is needed."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        self.panel_tasks, self._episodes = self.tasks(self.panel_split, "panel_split"), None
        if stage in ("fit", "validate") and self.panel_temperature == 0 and self.panel_attempts * len(self.panel_seeds) > 1:
            parallel.print_rank_zero(
                "panel_temperature is 0: greedy episodes of a task are alike, and panel_attempts or panel_seeds only repeat them"
            )
        if stage != "fit":
            self._check_playable(self.panel_tasks)
            self._check_chat(module)
            return
        self._resume_at, self._stream = 0, None
        self.train_tasks = self.tasks(self.train_split, "train_split")
        both = {t.task_id for t in self.train_tasks} & {t.task_id for t in self.panel_tasks}
        if both:
            raise ConfigError(f"data: train_split and panel_split share {len(both)} tasks ({min(both)}, ...): name two that are disjoint.")
        if self.group_size < 2 and module.objective.policy_weight > 0:
            raise ConfigError(
                f"data.group_size is {self.group_size}: GRPO needs at least 2 trajectories a task, "
                "or set model.objective.policy_weight to 0."
            )
        self._check_playable([*self.train_tasks, *self.panel_tasks])
        numbers = {"seed": self.seed, "batch_tasks": self.batch_tasks, "group_size": self.group_size}
        self._episodes = episodes(self.env_id, self.env_kwargs, self.train_tasks, self._check_chat(module), **numbers)

    def _check_chat(self, module: Any) -> Any:
        """Refuse a chat template before anything is written; after the tasks, since a hub's tokenizer may take minutes not to come."""
        if module is None:
            return None
        tokenizer = load_tokenizer(module.settings)
        Chat(tokenizer, ())
        return tokenizer

    def _check_playable(self, tasks: Sequence[Task]) -> None:
        """Try the environment: what is bad is better known now than in the middle of a run. No random number of the run is drawn."""
        with isolate_rng(include_cuda=False), self.open_env() as env:
            check_before_run(env, tasks, self.rollout.env_timeout, self.rollout.max_failed == 1, self.tasks_file)

    def open_env(self) -> closing[TextEnv]:
        """An environment to ask, outside of the rollouts, which have their own; closed at the end of the `with` block."""
        return closing(make_env(self.env_id, self.env_kwargs, self.rollout.max_observation_chars))

    def tasks(self, split: str, key: str) -> list[Task]:
        """The tasks of a split, which the configuration's `key` names: those of `tasks_file`, or the environment's own."""
        if self.tasks_file is not None:
            return read_tasks(self.tasks_file, split, key)
        with self.open_env() as env:
            return env.tasks(split, key)

    def teardown(self, stage: str) -> None:
        """Close the environments and the engine. The collector is made anew if it is needed again."""
        collector, self._collector = self._collector, None
        background, self._background = self._background, None
        with ExitStack() as stack:  # the last first: without its engine a rollout in the background ends
            if background is not None:
                stack.callback(background.close)
            if collector is not None:
                stack.callback(collector.engine.close)
                stack.callback(collector.close)

    def on_exception(self, exception: BaseException) -> None:
        """Close the environments: Lightning calls no `teardown` after an error or an interruption."""
        self.teardown("exception")

    @property
    def acting(self) -> str:
        """The adapter that plays training episodes."""
        return "teacher" if self.actor == "teacher" else "student"

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
            trainer: Any = self.trainer
            engine = make_engine(policy, self.rollout, run=str(Path(trainer.default_root_dir).resolve()))
            self._collector = Collector(self.env_id, self.env_kwargs, chat, engine, self.rollout, policy.context_length)
            if self.rollout.max_turn_tokens is None:
                most, context = self.rollout.turn_tokens(policy.context_length), policy.context_length
                parallel.print_rank_zero(
                    f"data.rollout.max_turn_tokens: {most}, since it is not set and the model's context is {context} tokens."
                )
        return self._collector

    @property
    def background(self) -> Background:
        """Who plays while the updates go on (data.rollout.staleness), made when first used."""
        if self._background is None:
            policy, engine = self.policy, self.collector.engine
            chat = Chat(load_tokenizer(policy.settings), policy.stop_ids)  # tokenizers are not for two threads
            self._background = Background(Collector(self.env_id, self.env_kwargs, chat, engine, self.rollout, policy.context_length))
        return self._background

    @property
    def iterations(self) -> float:
        """Updates until the run's end; infinite without one."""
        trainer: Any = self.trainer
        return trainer.estimated_stepping_batches  # type: ignore[no-any-return]

    def use_skills(self, selection: SkillSelection) -> None:
        """Take who chooses skills for the teachers; the skill callback calls it before training.

        Raises:
            ConfigError: `actor` needs a skill and none is chosen before the rollout, or its use means nothing.
        """
        if self.actor != "student" and isinstance(selection.context, GroupContext | NoContext):
            raise ConfigError(ACTOR_NEEDS_SKILL.format(self.actor))
        refused = {"half_with_skill": ("gap", "next_visit"), "student_with_skill": ("gap",)}.get(self.actor, ())
        if (estimate := selection.bank_settings["value_estimate"]) in refused:
            raise ConfigError(
                f"skills.value_estimate is {estimate}, which means nothing where data.actor is {self.actor}: set it to source."
            )
        selection.bind(self.generate, self.solution, self.together)
        self.selection = selection

    def together(self) -> AbstractContextManager[None]:
        """In this context each rank may use the model as often as it likes; all ranks enter it."""
        return self.policy.together()

    def how_to_resume(self) -> str:
        """Where a run that stops can be taken up, in words."""
        return how_to_resume(self.trainer)

    def train_dataloader(self) -> GroupStream:
        if self.selection is None and self.actor != "student":
            raise ConfigError(ACTOR_NEEDS_SKILL.format(self.actor))
        self._stream = GroupStream(self)
        self._stream.position = self._resume_at
        return self._stream

    def state_dict(self) -> dict[str, Any]:
        """The stream's, and what decides which episodes it plays.

        Lightning restores a loader only if nobody asked for its length (estimated_stepping_batches) before.
        """
        return {**self._stream.state_dict(), "episodes": self._episodes} if self._stream is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; comes between `setup` and `train_dataloader`.

        Raises:
            ConfigError: the run played other episodes.
        """
        if self._episodes is not None:  # it is to go on
            check_episodes(state.get("episodes"), self._episodes)
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
        chat, context = self.collector.chat, self.policy.context_length
        prompts = [chat.conversation_ids(c) for c in conversations]
        requests = [
            Request(i, p, stream_key("generate", *key), 0, min(max_new_tokens, context - len(p)))
            for i, (p, key) in enumerate(zip(prompts, seed_keys, strict=True))
            if len(p) < context
        ]
        texts = [""] * len(prompts)
        completions = complete(self.collector.engine, requests, self.rollout.temperature, adapter, self.rollout.max_rows)
        for request, completion in zip(requests, completions, strict=True):
            if completion is not None:
                texts[request.row] = chat.action_text(completion.token_ids)
        return texts

    def solution(self, task_id: str, summariser: Summariser) -> Skill | None:
        """The summary of the environment's own solution of a training task; None if it has none. Its rewards are not looked at."""
        task = next(t for t in self.train_tasks if t.task_id == task_id)
        with self.open_env() as env:
            if not env.offers("solution"):
                raise ConfigError(f"skills.context: {self.env_id} offers no solution(): choose another context.")
            played, _ = demonstrate(env, task)
        return summariser.summarise([played])[0] if played.turns else None


def _overrides(env: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of `env`. Raises ConfigError for one that is not named after an environment, or is no dictionary."""
    for key, value in overrides.items():
        if ":" not in key:
            raise ConfigError(
                f"data.env_overrides.{key}: entries are named after environments: write env_overrides: {{{env}: {{{key}: ...}}}}."
            )
        if not isinstance(value, Mapping):
            raise ConfigError(f"data.env_overrides.{key} is {value!r}: give a dictionary of that environment's env_kwargs.")
    return dict(overrides.get(env, {}))
