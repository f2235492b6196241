"""Training's stream of trajectory groups: Algorithm 1, lines 2 and 3."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from skillsd import parallel
from skillsd.engines.engine import Adapter
from skillsd.hashing import seeded_order
from skillsd.policy import Policy
from skillsd.rollout import Background, Collector, Episode, RolloutSettings
from skillsd.rollout.failures import check_failed
from skillsd.skills.selection import SkillSelection
from skillsd.trajectory import Task, Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], object]
"""Called often, with what is played, how many of its episodes are finished, and how many there are."""
Launch = tuple[list[Task], list[tuple[int | None, str]], Callable[[], tuple[list[Trajectory], float]]]
"""An iteration under way: its tasks, the id and text of each one's skill, and a call that waits for this rank's share of the episodes and
gives them with the seconds they took. Without staleness the call plays them."""


class Source(Protocol):
    """What the loaders ask of the data module: its settings, and who plays. See `RolloutData` for the settings' meaning."""

    train_tasks: list[Task]
    panel_tasks: list[Task]
    batch_tasks: int
    group_size: int
    actor: str
    rollout: RolloutSettings
    panel_temperature: float
    panel_attempts: int
    panel_adapter: str | None
    panel_seeds: list[int]
    seed: int
    selection: SkillSelection | None
    progress: Progress | None

    @property
    def acting(self) -> str:
        """The adapter that plays training episodes."""

    @property
    def policy(self) -> Policy:
        """The module's."""

    @property
    def collector(self) -> Collector:
        """Plays episodes on it."""

    @property
    def background(self) -> Background:
        """Plays while the updates go on."""

    @property
    def iterations(self) -> float:
        """Updates until the run's end; infinite without one."""

    def how_to_resume(self) -> str:
        """Where a run that stops can be taken up, in words."""


class GroupStream:
    """The train loader: a pure function of (run seed, iteration) and of the weights and the bank at that point.

    Its state is one integer, the number of iterations begun, so a run resumes where its checkpoint stands. With `data.rollout.staleness` s,
    iteration j is retrieved for and launched when iteration j - s is asked for, with the weights of that moment: near an epoch's end the
    prompts of the next epoch's first s are chosen so much earlier, by what the bank knows then. What is under way when the run is stopped
    is lost, and a run that is resumed begins as a new one does: with the first s + 1 iterations from the same weights.
    """

    def __init__(self, data: Source) -> None:
        self.data, self.position = data, 0
        self._launched: dict[int, Launch] = {}

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
        return seeded_order(self.data.train_tasks, self.data.seed, "order", epoch, name=lambda t: t.task_id)

    def _groups(self, iteration: int) -> list[TrajectoryGroup]:
        d = self.data
        ahead = 0
        if d.rollout.staleness:
            ahead = int(max(0, min(d.rollout.staleness, d.iterations - 1 - iteration)))
        for j in range(iteration, iteration + ahead + 1):
            if j not in self._launched:
                self._launched[j] = self._launch(j)
        tasks, skills, play = self._launched.pop(iteration)
        with d.policy.together():
            played, seconds = play()
        check_failed(played, iteration, d.rollout.max_failed, d.how_to_resume)
        local = [played[i : i + d.group_size] for i in range(0, len(played), d.group_size)]
        after = d.selection.texts(local, iteration) if d.selection is not None else None
        groups = [
            self._group(tasks[i], g, skills[i][0], after[k] if after else [skills[i][1]] * len(g), seconds)
            for k, (i, g) in enumerate(zip(parallel.share(len(tasks)), local, strict=True))
        ]
        return [g for part in parallel.gather(groups) for g in part]  # from here on every rank has the whole batch

    def _launch(self, iteration: int) -> Launch:
        """Retrieve, and roll out in the background, or without staleness when asked for the result."""
        d = self.data
        epoch, index = divmod(iteration, len(self))
        tasks = self.order(epoch)[index * d.batch_tasks : (index + 1) * d.batch_tasks]
        skills: list[tuple[int | None, str]] = [(None, "")] * len(tasks)
        if d.selection is not None:
            every = [t.task_id for t in d.train_tasks]
            skills = d.selection.choose([t.task_id for t in tasks], every, d.seed, epoch, epoch_start=index == 0)
        share = parallel.share(len(tasks))
        texts = [text for _, text in skills[share.start : share.stop]]
        play = partial(self._play, [tasks[i] for i in share], texts, iteration, d.collector.engine.snapshot(d.acting))
        return tasks, skills, d.background.submit(play).result if d.rollout.staleness else partial(play, d.collector)

    def _play(
        self, tasks: Sequence[Task], skills: Sequence[str], iteration: int, adapter: Adapter, collector: Collector
    ) -> tuple[list[Trajectory], float]:
        """The tasks' groups, one after another, and the seconds that it took."""
        d, started = self.data, time.perf_counter()
        first = {"student": d.group_size, "half_with_skill": -(-d.group_size // 2)}.get(d.actor, 0)  # member that acts with the skill
        rows = [Episode(t, k, text if k >= first else "") for t, text in zip(tasks, skills, strict=True) for k in range(d.group_size)]
        report = None  # from the background
        if d.progress is not None and collector is d.collector:
            report = partial(d.progress, f"iteration {iteration + 1}")
        played = collector.collect(rows, seed=d.seed, iteration=iteration, adapter=adapter, progress=report)
        # A skill that leaves no room to act is left out: an episode that was not played would count as a reward of 0.
        if crowded := [i for i, t in enumerate(played) if rows[i].skill and not t.turns and t.finish_reason == "length"]:
            log.warning("iteration %d: %d prompts with a skill are too long; these episodes are played without.", iteration, len(crowded))
            plain = [replace(rows[i], skill="") for i in crowded]
            for i, t in zip(crowded, collector.collect(plain, seed=d.seed, iteration=iteration, adapter=adapter), strict=True):
                played[i] = t
        return played, time.perf_counter() - started

    def _group(
        self, task: Task, played: Sequence[Trajectory], skill_id: int | None, texts: Sequence[str], seconds: float
    ) -> TrajectoryGroup:
        """The task's group, each member's teacher with its own of `texts` in front of the prompt."""
        d = self.data
        seen = next((t for t in played if t.turns), None) or next((t for t in played if t.prompt_ids), played[0])  # some may have failed
        prompts = {
            text: tuple(d.collector.chat.prompt_ids(seen.instruction, seen.turns[0].observation, text)) if seen.turns else seen.prompt_ids
            for text in {"", *texts}
        }
        acted, plain, with_skill = [t.prompt_ids for t in played], [prompts[""]] * len(played), [prompts[text] for text in texts]
        student, teacher = {
            "student": (plain, with_skill),
            "student_with_skill": (acted, acted),
            "half_with_skill": (acted, [x if a == p else p for a, p, x in zip(acted, plain, with_skill, strict=True)]),
            "teacher": (plain, acted),
        }[d.actor]
        return TrajectoryGroup(
            task, tuple(replace(t, skill_id=skill_id) for t in played), tuple(student), tuple(teacher), skill_id, d.rollout.temperature,
            sampled_by_teacher=d.actor == "teacher", rollout_s=seconds,
        )  # fmt: skip
