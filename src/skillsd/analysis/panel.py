"""The panel's results as a table, for the terminal, reports and the viewer, and what is printed at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from skillsd.analysis.render import Table
from skillsd.bounded import visible
from skillsd.files.run_folder import ADAPTER, BANK_FILE, METRICS_FILE, TRAJECTORIES_FILE, read_results
from skillsd.skills import SkillBank
from skillsd.statistics import bootstrap_mean
from skillsd.words import count


def rounds(panel: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The results that it holds, by name: before and after training, then each validation."""
    found = {when: panel[when] for when in ("before", "after") if when in panel}
    return found | {f"validate {i}": record for i, record in enumerate(panel.get("validations", ()), 1)}


def title(panel: Mapping[str, Any]) -> str:
    """What `table` shows, in a line; the panel was played at least once."""
    parts = rounds(panel).values()
    *others, last = sorted({part["n"] for part in parts})
    held_out = "held-out " * all(part.get("settings", {}).get("held_out", True) is True for part in parts)
    several = any(len(_by_task(part)) < len(part["levels"]) for part in parts)
    intervals = f"95% intervals{' over tasks' if several else ''}"
    return f"panel of {''.join(f'{n} or ' for n in others)}{count(last, f'{held_out}episode')}, {intervals}"


def table(panel: Mapping[str, Any]) -> Table:
    """Shares of success and completion with their 95% intervals, and the paired differences of after and before.

    Args:
        panel: What `Run.panel` gives.
    """
    rows: list[tuple[str, ...]] = [(when, *_shares(part)) for when, part in rounds(panel).items()]
    if "difference" in panel:
        paired = ("after - before, paired", *(_points(panel["difference"][k]) for k in ("success", "completion")))
        rows.insert(sum(when in panel for when in ("before", "after")), paired)
    return Table(("", "success", "completion"), rows)


def notes(panel: Mapping[str, Any]) -> list[str]:
    """What else was measured, a line each: what a validation played, pass@k, AppWorld's goal completion, and episodes that failed."""
    lines = []
    for when, part in rounds(panel).items():
        if "settings" in part:
            lines.append(f"{when}: {_validated(part)}")
        if len(part.get("pass_at", ())) > 1:
            lines.append(visible(f"{when}: " + ", ".join(f"pass@{k} {v:.3f}" for k, v in part["pass_at"].items())))
        if goals := [k for k in ("task_goal_completion", "scenario_goal_completion") if k in part]:
            shares = (f"{k.replace('_', ' ')} {_interval(part[k], *part[f'{k}_interval'])}" for k in goals)
            lines.append(f"{when}: {', '.join(shares)}")
        if part.get("failed"):
            lines.append(f"{when}: {part['failed']} of {count(part['n'], 'episode')} failed; they count as not solved")
    return lines


def shown(panel: Mapping[str, Any]) -> dict[str, Any] | None:
    """`title`, `table` and `notes` for the templates; None of a panel that was not played."""
    return {"title": title(panel), "table": table(panel), "notes": notes(panel)} if rounds(panel) else None


def print_panel(panel: Mapping[str, Any], console: Console) -> None:
    """Print `table` and `notes`; nothing of a panel that was not played."""
    if not rounds(panel):
        return
    made = table(panel)
    out = RichTable(*made.header, title=title(panel))
    for row in made.rows:
        out.add_row(*row)
    console.print(out)
    for line in notes(panel):
        console.print(Text(line), soft_wrap=True)


def print_report(folder: Path) -> None:
    """Print success and completion before and after with intervals, the bank's size and the paths of a run folder."""
    console = Console()
    print_panel(read_results(folder), console)
    if (folder / BANK_FILE).is_file():
        with SkillBank(folder / BANK_FILE, read_only=True) as bank:
            console.print(f"skill bank: {count(len(bank), 'skill')} of {count(len(bank.tasks()), 'task')}")
    for name, path in (("adapter", f"{ADAPTER}/student"), ("log", METRICS_FILE), ("trajectories", TRAJECTORIES_FILE)):
        if (folder / path).exists():
            console.print(Text(visible(f"{name}: {folder / path}")), soft_wrap=True)


def _validated(record: Mapping[str, Any]) -> str:
    """Which agent a validation has played, and how."""
    s, checkpoint = record["settings"], record["checkpoint"]
    if s["adapter"] is None:
        agent = "the base model"
    elif checkpoint is None:
        agent = f"{s['adapter']} as it starts, without a checkpoint"
    else:
        agent = f"{s['adapter']} of {checkpoint}" + (f" (step {record['step']})" if record["step"] is not None else "")
    attempts = f", {s['attempts']} attempts" if s["attempts"] > 1 else ""
    seeds = f", seeds {', '.join(map(str, s['seeds']))}" if len(s["seeds"]) > 1 else ""
    how = "greedy" if s["temperature"] == 0 else f"temperature {s['temperature']:g}"
    return visible(f"{agent}; {count(record['n'], 'episode')} of {s['split']}, {how}{attempts}{seeds}")


def _shares(result: Mapping[str, Any]) -> tuple[str, str]:
    tasks = _by_task(result)
    completion = bootstrap_mean([sum(v) / len(v) for v in tasks], bounds=(0.0, 1.0)) if tasks else (nan, nan, nan)
    return _interval(result["success"], *result["success_interval"]), _interval(*completion)


def _by_task(result: Mapping[str, Any]) -> list[list[float]]:
    """The completions of each task's episodes, which are no evidence about other tasks."""
    tasks: dict[str, list[float]] = {}
    for i, x in enumerate(result["levels"]):
        tasks.setdefault(str(x.get("task_id", i)), []).append(x["completion"])
    return list(tasks.values())


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _points(difference: list[float]) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)
