"""The report's figures as PNG. A method has one colour and line style in all of them; the baseline is black."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from math import ceil, inf, isnan

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from skillsd.analysis.plots import COLOURS
from skillsd.statistics import t_interval
from skillsd.study.comparison import Comparison
from skillsd.study.results import PARTS, WINDOW
from skillsd.study.settings import StudySettings
from skillsd.study.verdict import ALPHA

LINES = ("-", "--", ":", "-.")
AXES = {
    "env_steps": "environment steps",
    "tokens": "tokens of trajectories and scoring",
    "seconds": "seconds of training, panels left out",
}
PART_NAMES = dict(zip(PARTS, ("rollout", "scoring", "update", "summarising"), strict=True))
BANDS = 5
"""Most methods whose 95% bands are drawn into one picture; beyond, they would hide each other."""
GREY = "#999999"


def styles(study: StudySettings) -> dict[str, dict]:
    """Method -> how its line is drawn."""
    others = [m for m in study.methods if m != study.baseline]
    cycle = {m: {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % len(LINES)]} for i, m in enumerate(others)}
    return {study.baseline: {"color": "black", "linewidth": 2.2, "zorder": 5}, **cycle}


def png(figure: Figure) -> bytes:
    out = BytesIO()
    figure.savefig(out, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    return out.getvalue()


def _axes(figure: Figure, rows: int = 1, columns: int = 1, shared: bool = False) -> list[Axes]:
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return axes


def _present(curves: pd.DataFrame, study: StudySettings) -> list[str]:
    return [m for m in study.methods if (curves["method"] == m).any()]


def _over_seeds(curves: pd.DataFrame, method: str, x: str, y: str) -> pd.DataFrame:
    """Iteration by iteration, where y was measured with every seed: means of x and y, a share, over seeds, and y's 95% interval.

    Seeds may end after different iterations (a budget of environment steps): the last point is the mean of their ends.
    """
    rows = curves[curves["method"] == method].dropna(subset=[x, y])
    ends = rows["iteration"] == rows.groupby("seed")["iteration"].transform("max")
    groups = [g for _, g in rows.groupby(rows["iteration"].astype(float).mask(ends, inf)) if len(g) == rows["seed"].nunique()]
    points = [(g[x].mean(), *t_interval(g[y].tolist(), bounds=(0.0, 1.0))) for g in groups]
    return pd.DataFrame(points, columns=["x", "mean", "low", "high"])


def learning_curves(curves: pd.DataFrame, study: StudySettings, x: str) -> bytes | None:
    """Held-out panel and training against `x`, means over seeds; None where x was not measured."""
    if curves.loc[curves["iteration"] > 0, x].isna().all():
        return None
    smooth = curves.copy()
    train = f"train_{study.metric}"
    smooth[train] = curves.groupby(["method", "seed"])[train].transform(lambda s: s.rolling(WINDOW, min_periods=min(3, WINDOW)).mean())
    present, style = _present(curves, study), styles(study)
    figure = Figure(figsize=(12.5, 5.2))
    axes = _axes(figure, 1, 2)
    lines, final = {}, {}
    titles = ("held-out panel", f"training, running mean of {WINDOW} iterations")
    for ax, y, title in zip(axes, (f"panel_{study.metric}", train), titles, strict=True):
        for method in present:
            m = _over_seeds(smooth, method, x, y)
            (line,) = ax.plot(m["x"], 100 * m["mean"], label=method, marker="o" if ax is axes[0] else "", markersize=3, **style[method])
            if len(present) <= BANDS and len(m):
                ax.fill_between(
                    m["x"].astype(float), 100 * m["low"], 100 * m["high"], color=style[method]["color"], alpha=0.15, linewidth=0
                )
            if ax is axes[0] and len(m):
                lines[method], final[method] = line, m["mean"].iloc[-1]
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xlabel(AXES[x])
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0].set_ylabel(f"{study.metric}, %, mean over seeds")
    best = sorted(final, key=lambda m: -final[m])
    axes[1].legend(
        [lines[m] for m in best], [f"{m}  {100 * final[m]:.1f}" for m in best],
        title="held-out, at the end", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=3.2,
    )  # fmt: skip
    return png(figure)


def by_seed(curves: pd.DataFrame, study: StudySettings) -> bytes:
    """The held-out panel, one small picture a method: every seed thin, the mean thick, the baseline's mean grey."""
    present, style = _present(curves, study), styles(study)
    y, columns = f"panel_{study.metric}", min(5, len(present))
    rows = ceil(len(present) / columns)
    figure = Figure(figsize=(0.8 + 2.5 * columns, 0.6 + 2.1 * rows), layout="constrained")
    axes = _axes(figure, rows, columns, shared=True)
    reference = _over_seeds(curves, study.baseline, "iteration", y)
    for ax, method in zip(axes, present, strict=False):
        ax.plot(reference["x"], 100 * reference["mean"], color=GREY, linewidth=3, alpha=0.7)
        for _, one in curves[curves["method"] == method].dropna(subset=[y]).groupby("seed"):
            ax.plot(one["iteration"], 100 * one[y], color=style[method]["color"], linewidth=0.7, alpha=0.7)
        m = _over_seeds(curves, method, "iteration", y)
        ax.plot(m["x"], 100 * m["mean"], color=style[method]["color"], linewidth=2)
        ax.set_title(method, fontsize=10)
    for ax in axes[max(0, len(present) - columns) : len(present)]:
        ax.tick_params(labelbottom=True)  # also where the last row has a gap below
    for ax in axes[len(present) :]:
        ax.set_visible(False)
    figure.supxlabel(f"iterations (grey: {study.baseline})", fontsize=10)
    figure.supylabel(f"held-out {study.metric}, %", fontsize=10)
    return png(figure)


def forest(made: Sequence[Comparison], study: StudySettings) -> bytes:
    """Differences to the baseline with 95% intervals, largest first; filled where Holm's p is at most ALPHA; small dots are seeds."""
    shown = sorted((c for c in made if c.n), key=lambda c: c.mean)
    style = styles(study)
    figure = Figure(figsize=(8.5, 1.3 + 0.36 * max(2, len(shown))))
    (ax,) = _axes(figure)
    for i, c in enumerate(shown):
        colour = style[c.method]["color"]
        ax.plot([100 * d for d in c.differences], [i - 0.22] * c.n, ".", color=colour, alpha=0.5, markersize=5)
        if not isnan(c.low):
            ax.plot([100 * c.low, 100 * c.high], [i, i], color=colour, linewidth=2)
        ax.plot(
            100 * c.mean, i, "o", color=colour, markersize=7, markeredgewidth=1.5, markerfacecolor=colour if c.p_holm <= ALPHA else "white"
        )
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(shown)), [f"{c.method} (n={c.n})" for c in shown])
    ax.set_ylim(-0.7, len(shown) - 0.4)
    ax.set_xlabel(f"{study.metric} - {study.baseline}'s, points: mean, 95% interval and seeds; filled: Holm p ≤ {ALPHA}")
    ax.grid(axis="y", visible=False)
    return png(figure)


def seconds(costs: pd.DataFrame) -> bytes | None:
    """Seconds per iteration by part, stacked; None where no time was measured.

    Args:
        costs: Index method, columns PARTS, seconds per iteration.
    """
    if costs[list(PARTS)].isna().all(axis=None):
        return None
    figure = Figure(figsize=(8.5, 1.3 + 0.36 * max(2, len(costs))))
    (ax,) = _axes(figure)
    shown = costs[list(PARTS)].fillna(0.0).iloc[::-1]
    left = pd.Series(0.0, shown.index)
    for part, colour in zip(PARTS, COLOURS, strict=False):
        ax.barh(shown.index, shown[part], left=left, color=colour, label=PART_NAMES[part], height=0.7)
        left = left + shown[part]
    for i, total in enumerate(left):
        ax.text(total, i, f" {total:.3g}", va="center", fontsize=9)
    ax.set_xlabel("seconds per iteration, mean over seeds")
    ax.set_ylim(-0.6, len(shown) - 0.4)
    ax.margins(x=0.08)
    ax.grid(axis="y", visible=False)
    ax.legend(ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return png(figure)
