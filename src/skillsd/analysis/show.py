"""`skillsd show`: a run in the terminal, or the same as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from skillsd.analysis.panel import print_panel
from skillsd.analysis.render import number
from skillsd.analysis.run import Run
from skillsd.bounded import one_line, visible
from skillsd.errors import ConfigError, Parser
from skillsd.files.run_lock import running
from skillsd.words import count

_SHOWN = ("reward/success", "reward/mean", "loss/total", "teacher/gap_mean", "policy/entropy", "time/rollout_s", "time/update_s")
"""The metrics in the overview."""


def show(args: Sequence[str]) -> None:
    """`skillsd show ARGS`: print a run, one of its trajectories, a task's groups or its skills.

    Raises:
        ConfigError: unknown arguments, no run folder, a damaged file, or nothing of that name.
    """
    parser = Parser(prog="skillsd show", description="Show a run: how it goes, or what is named below. More: skillsd.analysis in Python.")
    parser.add_argument("run", metavar="RUN", help="a run folder (trainer.default_root_dir), also one that is training")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--trajectory", type=int, metavar="N", help="an episode turn by turn, by its line in trajectories.jsonl from 0")
    what.add_argument("--task", metavar="ID", help="a task's groups: what each of its attempts came to")
    what.add_argument("--skills", action="store_true", help="every skill that entered the bank")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    given = parser.parse_args(args)
    run, out = Run(given.run), Console(highlight=False, emoji=False, markup=False)
    shown: Any
    print_text: Callable[[Any, Console], None]
    if given.trajectory is not None:
        shown, print_text = trajectory(run, given.trajectory), _print_trajectory
    elif given.task is not None:
        shown, print_text = task(run, given.task), _print_task
    elif given.skills:
        shown, print_text = skills(run), _print_skills
    else:
        shown, print_text = overview(run), partial(_print_overview, run.panel)
    if given.json:
        print(json.dumps(shown, indent=1, allow_nan=False))
    else:
        print_text(shown, out)


# -- what there is, as plain data ---------------------------------------------------------------------------------------------------


def overview(run: Run) -> dict[str, Any]:
    """How a run goes: its size, how episodes ended, the panel's results, the bank, and of its metrics the means over the first and the
    last `averaged` iterations: a tenth of them, but 5 at least, or half of a shorter run."""
    metrics, played = run.metrics, run.trajectories
    shown = [name for name in _SHOWN if name in metrics]
    n = max(1, min(max(len(metrics) // 10, 5), len(metrics) // 2))
    values = metrics[shown]
    return {
        "folder": str(run.folder),
        "running": None if (owner := running(run.folder)) is None else str(owner),
        "seed": seed if isinstance(seed := run.config.get("seed_everything"), int | None) else str(seed),
        "iterations": len(metrics),
        "trajectories": len(played),
        "tasks": int(played["task_id"].nunique()),
        "finish_reasons": {str(reason): int(n) for reason, n in played["finish_reason"].value_counts().items()},
        "averaged": n if len(metrics) else 0,
        "metrics": {"first": plain(values.head(n).mean()), "last": plain(values.tail(n).mean())} if len(metrics) else {},
        "panel": {when: _without_levels(part) for when, part in run.panel.items()},
        "skills": run.bank_size,
    }


def _without_levels(part: Any) -> Any:
    """A panel's result without its episodes; of a list of results each."""
    if isinstance(part, list):
        return [_without_levels(x) for x in part]
    return {k: v for k, v in part.items() if k != "levels"} if isinstance(part, dict) else part


def trajectory(run: Run, number: int) -> dict[str, Any]:
    """A trajectory with its number, without its tokens.

    Raises:
        ConfigError: there is none of that number.
    """
    try:
        t = run.trajectory(number)
    except IndexError as e:
        raise ConfigError(f"--trajectory: {e}.") from e
    return {"trajectory": number} | {k: v for k, v in asdict(t).items() if k not in ("prompt_ids", "token_ids", "action_mask", "logprobs")}


def task(run: Run, task_id: str) -> dict[str, Any]:
    """A task's groups, by iteration.

    Raises:
        ConfigError: it was never played.
    """
    rows = run.trajectories[run.trajectories["task_id"] == task_id]
    if rows.empty:
        known = ", ".join(map(one_line, list(dict.fromkeys(run.trajectories["task_id"]))[:5]))
        raise ConfigError(f"--task {one_line(task_id)}: {run.folder} has no trajectory of it (it has {known or 'none at all'}, ...).")
    groups = [
        {
            "iteration": int(iteration),
            "skill_id": None if pd.isna(group["skill_id"].iloc[0]) else int(group["skill_id"].iloc[0]),
            "trajectories": group.index.tolist(),
            "rewards": group["reward"].tolist(),
            "solved": int(group["success"].sum()),
            "failed": int((group["finish_reason"] == "failed").sum()),
            "turns": group["n_turns"].tolist(),
        }
        for iteration, group in rows.groupby("iteration")
    ]
    return {"task_id": task_id, "groups": groups}


def skills(run: Run) -> list[dict[str, Any]]:
    """Every skill that entered the bank, as `Run.skills` has it."""
    return [{"skill_id": int(skill_id)} | plain(row) for skill_id, row in run.skills.iterrows()]  # type: ignore[call-overload]


def plain(row: pd.Series[Any]) -> dict[str, Any]:
    """Python's own numbers, None for what is missing or not finite."""
    values = {str(k): None if pd.isna(v) else v.item() if hasattr(v, "item") else v for k, v in row.items()}
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in values.items()}


# -- the same as text ---------------------------------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(one_line(title)), title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "task", "workflow") else "right", overflow="fold")
    return table


def _print_overview(panel: dict[str, Any], seen: dict[str, Any], out: Console) -> None:
    ends = ", ".join(f"{n} {reason}" for reason, n in seen["finish_reasons"].items())
    ends = f" ({ends})" if ends else ""
    played = f"{count(seen['trajectories'], 'trajectory')} of {count(seen['tasks'], 'task')}"
    out.print(f"{seen['folder']}: {count(seen['iterations'], 'iteration')}, {played}{ends}", soft_wrap=True)
    if seen["running"]:
        out.print(visible(f"running now: {seen['running']}"), soft_wrap=True)
    if seen["metrics"]:
        n = seen["averaged"]
        many = f" {n}" if n > 1 else ""
        table = _table("means over iterations" if many else "iterations", "", f"first{many}", f"last{many}")
        for name in seen["metrics"]["first"]:
            table.add_row(name, *(number(seen["metrics"][when][name]) for when in ("first", "last")))
        out.print(table)
    print_panel(panel, out)
    bank = seen["skills"]
    out.print(f"skills: {bank['held']} held, {bank['ever']} ever, of {count(bank['tasks'], 'task')}", soft_wrap=True)


def _print_trajectory(t: dict[str, Any], out: Console) -> None:
    skill = "no skill" if t["skill_id"] is None else f"its teacher saw skill {t['skill_id']}"
    out.print(
        f"trajectory {t['trajectory']}: iteration {t['iteration']}, task {one_line(t['task_id'])}, member {t['member']}, {skill}",
        soft_wrap=True,
    )
    if t["instruction"]:
        out.print(visible(t["instruction"]), soft_wrap=True)
    for k, turn in enumerate(t["turns"], 1):
        unread = "\n(the environment could not read this)" if turn["valid"] is False else ""
        out.print(visible(f"--- turn {k}\n{turn['observation']}\n> {turn['action']}{unread}"), soft_wrap=True)
    if t["final_observation"] is not None:
        out.print(visible(f"--- at the end\n{t['final_observation']}"), soft_wrap=True)
    why = f" ({one_line(t['failure'], 1000)})" if t["failure"] else ""
    end = f"completion {t['completion']:.2f}, reward {t['reward']:.2f}, {count(len(t['turns']), 'turn')}"
    out.print(f"--- {t['finish_reason']}{why}: success {t['success']}, {end}", soft_wrap=True)


def _print_task(seen: dict[str, Any], out: Console) -> None:
    table = _table(f"task {seen['task_id']}", "iteration", "skill", "solved", "rewards", "turns", "trajectories")
    for g in seen["groups"]:
        even = " (all equal)" if len(set(g["rewards"])) == 1 else ""
        rewards, turns = " ".join(f"{x:g}" for x in g["rewards"]), " ".join(map(str, g["turns"]))
        skill, first, last = "-" if g["skill_id"] is None else str(g["skill_id"]), g["trajectories"][0], g["trajectories"][-1]
        table.add_row(str(g["iteration"]), skill, f"{g['solved']} of {len(g['rewards'])}", rewards + even, turns, f"{first} to {last}")
    out.print(table)


def _print_skills(seen: list[dict[str, Any]], out: Console) -> None:
    table = _table("skills", "id", "task", "from", "uses", "reward", "sources", "evicted", "workflow")
    for s in seen:
        evicted = "" if s["evicted"] is None else str(s["evicted"])
        text = Text(one_line(" ".join(s["golden_workflow"].split())))
        origin = "imported" if s["inserted"] < 0 else str(s["source_iteration"])
        numbers = (origin, str(s["uses"]), number(s["mean_reward"]), str(s["sources"]), evicted)
        table.add_row(str(s["skill_id"]), Text(one_line(s["task_id"])), *numbers, text)
    out.print(table)
