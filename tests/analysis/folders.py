"""Run folders written by hand: a trajectory to vary, lines of trajectories, rows of metrics.csv; and an HTML page taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from skillsd.callbacks.log import COLUMNS
from skillsd.trajectory import Trajectory, Turn

SHORT = Trajectory(
    0, "t1", 0, 7, "Solve it.", (1, 2, 3), (4, 5, 9, 9, 6, 9, 9), (True, True, False, False, True, False, False),
    (-0.5, -0.25, 0.0, 0.0, -1.0, 0.0, 0.0), (Turn("s0", "up", 0.0), Turn("s1", "left", 1.0)), 1.0, 1.0, True, "done", 3,
    final_observation="s2",
)  # fmt: skip


def append(path: Path, rows: Sequence[Trajectory], mode: str = "a") -> None:
    with path.open(mode) as f:
        f.writelines(t.to_json() + "\n" for t in rows)


def write_metrics(folder: Path, rows: Sequence[dict[str, str]]) -> None:
    """metrics.csv with a row for each iteration; a column that its row does not name is blank."""
    lines = [dict.fromkeys(COLUMNS, "") | {"iteration": str(i), "epoch": "0"} | row for i, row in enumerate(rows)]
    (folder / "metrics.csv").write_text("\n".join([",".join(COLUMNS), *(",".join(line.values()) for line in lines)]) + "\n")


class Page(HTMLParser):
    """A page's elements with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
