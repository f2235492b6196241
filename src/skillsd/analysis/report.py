"""`skillsd report`: a run as one HTML file that needs no other, and as Markdown. The same run folder gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from rich.console import Console
from rich.text import Text

from skillsd.analysis import examples, panel, plots, provenance
from skillsd.analysis.pictures import TRUST, Pictures
from skillsd.analysis.render import Picture, html, markdown
from skillsd.analysis.run import Run
from skillsd.bounded import visible
from skillsd.config_errors import leaves
from skillsd.errors import Parser, hold_keys, without_keys
from skillsd.files.durable import check_replaceable, sealed_folder, writing
from skillsd.files.paths import read_path
from skillsd.files.run_folder import CONFIG_FILE, check_not_of_run

KIND = "report.html"
"""The file by which a report is known."""


def report(args: Sequence[str], checks: Callable[[], Sequence[dict[str, str]]]) -> None:
    """Write report.html, report.md and its pictures, and say where they are.

    Args:
        args: What follows `skillsd report`.
        checks: Gives the rows of `skillsd doctor`.

    Raises:
        ConfigError: unknown arguments, no run folder, a damaged file, or something in the report's place that is none.
    """
    parser = Parser(
        prog="skillsd report", description=f"Write a run as one HTML file that needs no other, and as Markdown with pictures. {TRUST}"
    )
    parser.add_argument("run", metavar="RUN", help="a run folder (trainer.default_root_dir), also one that is training")
    parser.add_argument("-o", "--out", metavar="FOLDER", help="a new folder, or an earlier report; default: RUN/report")
    given = parser.parse_args(args)
    run = Run(given.run)
    hold_keys(dict(leaves(run.config)))
    folder, key = (run.folder / "report", "RUN") if given.out is None else (read_path(given.out, "-o"), "-o")
    check_not_of_run(folder, key)
    check_replaceable(folder, key, KIND)
    with Console(stderr=True).status(Text(visible(f"reading {run.folder}"))), closing(Pictures(run)) as pictures:
        made = contents(run, pictures, checks())
    with writing(folder, key), sealed_folder(folder, key, KIND) as work:
        for picture in _pictures(made):
            (work / picture.name).write_bytes(picture.png)
        (work / "report.md").write_bytes(markdown("report.jinja", **made).encode())
        (work / KIND).write_bytes(html("report.jinja", **made).encode())
    print(f"report: {folder / KIND}, {folder / 'report.md'}")


def contents(run: Run, pictures: Pictures, checks: Sequence[dict[str, str]]) -> dict[str, Any]:
    """What the template `report.jinja` shows.

    Args:
        run: The run.
        pictures: Draws its observations.
        checks: Rows of `skillsd doctor`.
    """
    return {
        "title": f"Run {run.folder.resolve().name}", "summary": provenance.summary(run), "panel": panel.shown(run.panel),
        "facts": provenance.facts(run), "figures": list(plots.pictures(run)), "rule": examples.RULE,
        "trajectories": examples.trajectories(run, pictures), "language": pictures.language, "skills": examples.skills(run),
        "ever": len(run.skills), "config": _config(run), "versions": provenance.versions(run), "checks": provenance.installed(checks),
    }  # fmt: skip


def _config(run: Run) -> str:
    """As the run wrote it; `Run.config` has refused what is none."""
    return without_keys((run.folder / CONFIG_FILE).read_text(encoding="utf-8").rstrip()) if run.config else ""


def _pictures(made: dict[str, Any]) -> list[Picture]:
    turns = [turn.get("picture") for t in made["trajectories"] for turn in t["turns"]]
    return made["figures"] + [picture for picture in turns if picture]
