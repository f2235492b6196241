"""Paired replay: the same tasks on the same sampling noise, with a skill in front of the prompt and without."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pandas as pd

from skillsd.analysis.run import text_frame
from skillsd.analysis.score import Scorer
from skillsd.engines.in_process import InProcessEngine
from skillsd.engines.noise import stream_key
from skillsd.errors import ConfigError
from skillsd.rollout import Collector, Episode, RolloutSettings
from skillsd.skills import Skill
from skillsd.statistics import bootstrap_mean
from skillsd.tasks import read_tasks
from skillsd.trajectory import Task, Trajectory

COLUMNS = ("task_id", "skill", "member", "success", "completion", "turns", "finish_reason")


def replay(
    scorer: Scorer,
    skills: Sequence[int],
    tasks: Sequence[str] | None = None,
    members: int = 4,
    adapter: str | None = "student",
    temperature: float | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Play tasks with given skills in front of the prompt, and without, in the run's environment.

    A pair shares its noise: a member's draws depend on (run seed, `seed`, task, member) alone. Until the skill changes what is likely, both
    do the same.

    Args:
        scorer: Whose model acts.
        skills: Ids of the bank.
        tasks: Where each of them is tried, as many as there are skills; None: at the task it was made for.
        members: Episodes a task and skill.
        adapter: Who acts: `student`, `teacher`, or None for the untouched base.
        temperature: None: the run's; 0 is greedy, and one member is then enough.
        seed: Another one plays other episodes.

    Returns:
        A row an episode: `task_id`, `skill` (Int64, missing where there was none), `member`, `success`, `completion` (share, 0 to 1),
        `turns`, `finish_reason`. A task is played without a skill once for each member, however many skills it is tried with.

    Raises:
        ConfigError: there are not as many tasks as skills, fewer than one member, or the environment cannot be made.
        KeyError: there is no such skill.
    """
    run, data = scorer.run, scorer.run.config["data"]
    if members < 1:
        raise ConfigError(f"members: {members} episodes a task cannot be compared: give 1 or more.")
    shown: list[Skill] = [run.skill(i) for i in skills]
    where = [skill.task_id for skill in shown] if tasks is None else list(tasks)
    if len(where) != len(shown):
        raise ConfigError(f"tasks: {len(where)} tasks for {len(shown)} skills: name one for each, or none.")
    known = _tasks_of(data)
    plain: list[tuple[str, int | None, str]] = [(task_id, None, "") for task_id in dict.fromkeys(where)]
    with_skill = [(t, s.skill_id, s.render(scorer.template)) for t, s in dict.fromkeys(zip(where, shown, strict=True))]
    planned = [(*what, member) for what in [*plain, *with_skill] for member in range(members)]
    rows = [Episode(known.get(task_id) or Task(task_id), member, text) for task_id, _, text, member in planned]
    played = _play(scorer, data, rows, adapter, temperature, stream_key("replay", run.config.get("seed_everything", 0), seed))
    frame = text_frame(
        [
            (task_id, skill_id, member, t.success, t.completion, len(t.turns), t.finish_reason)
            for (task_id, skill_id, _, member), t in zip(planned, played, strict=True)
        ],
        columns=list(COLUMNS),
    )
    return frame.astype({"skill": "Int64", "success": bool})


def paired(frame: pd.DataFrame, what: str = "success") -> pd.DataFrame:
    """With the skill minus without, episode by episode.

    Args:
        frame: What `replay` gives.
        what: `success`, `completion` or `turns`.

    Returns:
        A row a pair: `task_id`, `skill`, `member`, `with`, `without`, `difference`. Pairs with an episode that failed (which is the
        environment's doing) are left out.
    """
    whole = frame[frame["finish_reason"] != "failed"].astype({what: float})
    keys, without = ["task_id", "member"], whole["skill"].isna()
    pairs = whole[~without].merge(whole[without], on=keys, suffixes=("", " without"))
    return pairs[["task_id", "skill", "member"]].assign(
        **{"with": pairs[what], "without": pairs[f"{what} without"], "difference": pairs[what] - pairs[f"{what} without"]}
    )


def effect(frame: pd.DataFrame, what: str = "success") -> tuple[float, float, float]:
    """What skills do on average over tasks, which all weigh the same.

    Args:
        frame: What `replay` gives.
        what: `success`, `completion` or `turns`.

    Returns:
        Mean paired difference, and its 95% bootstrap interval over tasks; the interval is NaN with one task, all three with none.
    """
    by_task = paired(frame, what).groupby("task_id")["difference"].mean()
    if len(by_task) < 2:
        return float(by_task.mean()), np.nan, np.nan
    return bootstrap_mean(by_task.tolist())


def _tasks_of(data: dict[str, Any]) -> dict[str, Task]:
    """The tasks of a run whose tasks stand in a file, which alone says how to reset to them."""
    if data.get("tasks_file") is None:
        return {}
    listed = [
        t
        for key in ("train_split", "panel_split")
        for t in read_tasks(data["tasks_file"], data.get(key, key.removesuffix("_split").replace("panel", "test")), key)
    ]
    return {task.task_id: task for task in listed}


def _play(
    scorer: Scorer, data: dict[str, Any], rows: Sequence[Episode], adapter: str | None, temperature: float | None, seed: int
) -> list[Trajectory]:
    policy, settings = scorer.policy, RolloutSettings(**(data.get("rollout") or {}))
    engine = InProcessEngine(policy, settings.cuda_graphs, settings.kernels)
    with closing(engine), closing(Collector(*scorer.run.environment, scorer.chat, engine, settings, policy.context_length)) as collector:
        return collector.collect(rows, seed=seed, iteration=0, temperature=temperature, adapter=adapter)
