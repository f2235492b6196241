"""How a task's skills stood with retrieval as a run went on: the bank's log played again, scored by retrieval's own formula."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import closing
from itertools import groupby
from typing import Any

import pandas as pd

from skillsd.analysis.run import Run, opened_bank, text_frame
from skillsd.files.run_folder import BANK_FILE
from skillsd.skills.bank_file import open_file
from skillsd.skills.ledger import Ledger
from skillsd.skills.retrieval import SQRT2, scores, select
from skillsd.skills.tables import State


def ucb_scores(run: Run, tasks: Collection[str] | None = None, c: float | None = None, unused_first: bool | None = None) -> pd.DataFrame:
    """The UCB scores of tasks' skills over time.

    Args:
        run: The run.
        tasks: Ids of tasks; None: all of them.
        c: Weight of exploration; None: the run's.
        unused_first: Never-used skills come first (`retrieval.select`); None: as in the run.

    Returns:
        A row a skill in the bank at the beginning of an iteration, for each iteration before which something of its task has changed:
        `iteration`, `task_id`, `skill_id`, `uses`, `mean_reward`, `score` (inf for a never-used skill that comes before all others) and
        `best`, whether retrieval would take it. Between two of its rows a task stands as in the first.

    Raises:
        ConfigError: the bank is damaged.
    """
    given: dict[str, Any] = ((run.config.get("skills") or {}).get("context") or {}).get("init_args") or {}
    c = float(given.get("c", SQRT2)) if c is None else c
    unused_first = bool(given.get("unused_first", True)) if unused_first is None else unused_first
    rows: list[tuple[Any, ...]] = []
    with opened_bank(run.folder / BANK_FILE) as bank:
        value_estimate, events = bank.value_estimate, list(bank.events())
        skills = {e.skill_id: bank.get(e.skill_id) for e in events if e.kind == "insert"}
    with closing(open_file(None, value_estimate, read_only=False)) as file:
        ledger = Ledger(file)
        with ledger.transaction():
            for iteration, happened in groupby(events, key=lambda event: event.iteration):
                changed: set[str] = set()
                for event in happened:
                    skill = skills[event.skill_id]
                    if event.kind == "insert":
                        ledger.insert(skill, iteration)
                    else:
                        ledger.append(event.kind, iteration, skill.task_id, event.skill_id, event.reward, event.gap)
                    changed.add(skill.task_id)
                for task_id in sorted(changed if tasks is None else changed.intersection(tasks)):
                    rows += _scored(iteration + 1, task_id, ledger.states(task_id).values(), c, unused_first)
    return text_frame(rows, columns=["iteration", "task_id", "skill_id", "uses", "mean_reward", "score", "best"])


def _scored(iteration: int, task_id: str, live: Iterable[State], c: float, unused_first: bool) -> list[tuple[Any, ...]]:
    states = sorted(live, key=lambda s: s.skill_id)
    best = select(states, c, unused_first)
    return [
        (iteration, task_id, s.skill_id, s.uses, s.mean_reward, score, s is best)
        for s, score in zip(states, scores(states, c, unused_first), strict=True)
    ]
