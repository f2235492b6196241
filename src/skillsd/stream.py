"""The loaders of a `RolloutData`: training's stream of trajectory groups, and the panel's of episodes. Algorithm 1, lines 2 and 3."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple, Protocol

from skillsd import parallel
from skillsd.bounded import one_line
from skillsd.engines.engine import Adapter
from skillsd.errors import ConfigError
from skillsd.hashing import seeded_order
from skillsd.policy import Policy
from skillsd.rollout import Background, Collector, Episode, RolloutSettings
from skillsd.trajectory import Task, Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], object]
"""Called often, with what is played, how many of its episodes are finished, and how many there are."""


class Selection(Protocol):
    """Chooses what teachers see: `skills.selection.SkillSelection`."""

    def choose(
        self, task_ids: Sequence[str], every: Sequence[str], seed: int, epoch: int, epoch_start: bool
    ) -> list[tuple[int | None, str]]:
        """Before a rollout: each task's skill, its id in the bank and its text; (None, "") without one."""

    def texts(self, groups: Sequence[Sequence[Trajectory]], iteration: int) -> list[list[str]] | None:
        """After it: the text for each member of each group; None where `choose` has chosen."""


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
    selection: Selection | None
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
        self._launched: dict[int, _Launch] = {}

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
        tasks, skills, share, play = self._launched.pop(iteration)
        with d.policy.together():
            played, seconds = play()
        self._check_failed(played, iteration)
        local = [played[i : i + d.group_size] for i in range(0, len(played), d.group_size)]
        after = d.selection.texts(local, iteration) if d.selection is not None else None
        groups = [
            self._group(tasks[i], g, skills[i][0], after[k] if after else [skills[i][1]] * len(g), seconds)
            for k, (i, g) in enumerate(zip(share, local, strict=True))
        ]
        return [g for part in parallel.gather(groups) for g in part]  # from here on every rank has the whole batch

    def _launch(self, iteration: int) -> _Launch:
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
        if d.rollout.staleness:
            return _Launch(tasks, skills, share, d.background.submit(play).result)
        return _Launch(tasks, skills, share, partial(play, d.collector))

    def _play(
        self, tasks: Sequence[Task], skills: Sequence[str], iteration: int, adapter: Adapter, collector: Collector
    ) -> tuple[list[Trajectory], float]:
        """The tasks' groups, one after another, and the seconds that it took."""
        d, started = self.data, time.perf_counter()
        first = {"student": d.group_size, "half_with_skill": -(-d.group_size // 2)}.get(d.actor, 0)  # member that acts with the skill
        rows = [Episode(t, k, text if k >= first else "") for t, text in zip(tasks, skills, strict=True) for k in range(d.group_size)]
        report: Callable[[int], object] | None = None
        if d.progress is not None and collector is d.collector:  # not from the background
            report = partial(_report, d.progress, f"iteration {iteration + 1}", 0, 1.0, len(rows))
        played = collector.collect(rows, seed=d.seed, iteration=iteration, adapter=adapter, progress=report)
        # A skill that leaves no room to act is left out: an episode that was not played would count as a reward of 0.
        if crowded := [i for i, t in enumerate(played) if rows[i].skill and not t.turns and t.finish_reason == "length"]:
            log.warning("iteration %d: %d prompts with a skill are too long; these episodes are played without.", iteration, len(crowded))
            plain = [replace(rows[i], skill="") for i in crowded]
            for i, t in zip(crowded, collector.collect(plain, seed=d.seed, iteration=iteration, adapter=adapter), strict=True):
                played[i] = t
        return played, time.perf_counter() - started

    def _check_failed(self, played: Sequence[Trajectory], iteration: int) -> None:
        """Count failed episodes on all ranks, before anything is made of them."""
        every = parallel.gather((len(played), [t for t in played if t.failed]))
        episodes, failed = sum(n for n, _ in every), [t for _, theirs in every for t in theirs]
        if failed and parallel.is_rank_zero():
            log.warning("iteration %d: %d of %d episodes failed: %s", iteration, len(failed), episodes, one_line(failed[0].failure, 1000))
        if len(failed) > self.data.rollout.max_failed * episodes:
            raise ConfigError(self._summary(iteration, failed, episodes))

    def _summary(self, iteration: int, failed: Sequence[Trajectory], episodes: int) -> str:
        kinds = Counter(t.failure_kind for t in failed)
        first = {t.failure_kind: t for t in reversed(failed)}
        listed = "; ".join(f"{n} {k}, first on task {first[k].task_id}: {first[k].failure[:200]}" for k, n in kinds.items())
        cures = ["mend the environment"] if set(kinds) - {"model"} else []
        if "model" in kinds:
            cures.append(
                "see whether the weights of model.policy.model and of the adapters are finite and model.policy.dtype has their range"
            )
        return (
            f"data.rollout.max_failed is {self.data.rollout.max_failed:g}, and in iteration {iteration} {len(failed)} of "
            f"{episodes} episodes "
            f"failed ({listed}). {self.data.how_to_resume()}: {', '.join(cures)} and resume, or set a larger share."
        )

    def _group(
        self, task: Task, played: Sequence[Trajectory], skill_id: int | None, texts: Sequence[str], seconds: float
    ) -> TrajectoryGroup:
        """The task's group, each member's teacher with its own of `texts` in front of the prompt."""
        d = self.data
        seen = next((t for t in played if t.turns), None) or next((t for t in played if t.prompt_ids), played[0])  # some may have failed

        @cache
        def prompt(text: str) -> tuple[int, ...]:
            return tuple(d.collector.chat.prompt_ids(seen.instruction, seen.turns[0].observation, text)) if seen.turns else seen.prompt_ids

        acted, plain, with_skill = [t.prompt_ids for t in played], [prompt("")] * len(played), [prompt(x) for x in texts]
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


class _Launch(NamedTuple):
    """An iteration whose rollout has begun, or begins with `play`, which waits for what this rank's share has played, and its seconds."""

    tasks: list[Task]
    skills: list[tuple[int | None, str]]
    share: range
    play: Callable[[], tuple[list[Trajectory], float]]


class PanelStream:
    """The validation loader: batches of held-out episodes in the panel's order, of which each rank plays a share. Played anew each time."""

    def __init__(self, data: Source) -> None:
        self.data = data
        self.rows = [(seed, Episode(task, k)) for seed in data.panel_seeds for task in data.panel_tasks for k in range(data.panel_attempts)]
        self.size = 4 * data.rollout.max_rows * parallel.world()
        self.progress = data.progress
        """Called with `panel`; of several ranks by this one's share."""

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[list[Trajectory]]:
        d = self.data
        for start in range(0, len(self.rows), self.size):
            part = self.rows[start : start + self.size]
            local = [part[i] for i in parallel.share(len(part))]
            played: list[Trajectory] = []
            with d.policy.together():
                for seed in dict.fromkeys(s for s, _ in local):
                    rows = [r for s, r in local if s == seed]
                    finished = start + len(played) * len(part) // len(local)
                    report = self.progress and partial(_report, self.progress, "panel", finished, len(part) / len(local), len(self.rows))
                    played += d.collector.collect(
                        rows, seed=seed, iteration=0, temperature=d.panel_temperature, adapter=d.panel_adapter, progress=report
                    )
            yield [t for theirs in parallel.gather(played) for t in theirs]


def _report(progress: Progress, what: str, before: int, scale: float, total: int, n: int) -> None:
    """Pass on that n more episodes than `before` are finished, each of which stands for `scale` of all ranks' together."""
    progress(what, before + round(n * scale), total)
