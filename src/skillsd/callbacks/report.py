"""The table at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from skillsd.run_folder import ADAPTER, BANK_FILE, METRICS_FILE, TRAJECTORIES_FILE, read_panel
from skillsd.skills import SkillBank
from skillsd.statistics import bootstrap_mean


def print_report(folder: Path) -> None:
    """Print success and completion before and after with intervals, the bank's size and the paths of a run folder."""
    panel, console = read_panel(folder), Console()
    shown = [w for w in ("before", "after", "validate") if w in panel]
    if shown:
        table = Table(title=f"panel of {panel[shown[0]]['n']} held-out episodes, 95% intervals")
        for heading in ("", "success", "completion"):
            table.add_column(heading)
        for when in shown:
            table.add_row(when, *_shares(panel[when]))
        if "difference" in panel and "validate" not in shown:
            table.add_row("after - before, paired", *(_points(panel["difference"][k]) for k in ("success", "completion")))
        console.print(table)
        for when in shown:
            if len(panel[when]["pass_at"]) > 1:
                console.print(f"{when}: " + ", ".join(f"pass@{k} {v:.3f}" for k, v in panel[when]["pass_at"].items()))
            if goals := [k for k in ("task_goal_completion", "scenario_goal_completion") if k in panel[when]]:
                told = ", ".join(f"{k.replace('_', ' ')} {_interval(panel[when][k], *panel[when][f'{k}_interval'])}" for k in goals)
                console.print(f"{when}: {told}", soft_wrap=True)
            if panel[when].get("failed"):
                console.print(f"{when}: {panel[when]['failed']} of {panel[when]['n']} episodes failed; they count as not solved")
    if (folder / BANK_FILE).is_file():
        with SkillBank(folder / BANK_FILE, read_only=True) as bank:
            console.print(f"skill bank: {len(bank)} skills of {len(bank.tasks())} tasks")
    for name, path in (("adapter", f"{ADAPTER}/student"), ("log", METRICS_FILE), ("trajectories", TRAJECTORIES_FILE)):
        if (folder / path).exists():
            console.print(f"{name}: {folder / path}", soft_wrap=True)


def _shares(result: dict[str, Any]) -> tuple[str, str]:
    completion = bootstrap_mean([x["completion"] for x in result["levels"]])
    return _interval(result["success"], *result["success_interval"]), _interval(*completion)


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _points(difference: list[float]) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)
