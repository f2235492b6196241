"""A run's curves as matplotlib figures."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO, StringIO
from itertools import cycle
from threading import Lock
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from skillsd.analysis.render import Picture
from skillsd.analysis.run import Run
from skillsd.statistics import t_interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe & Ito (2008) without yellow: distinct with any colour vision."""
EPISODE_METRICS = {"reward/mean": "reward", "reward/success": "success", "reward/completion": "completion"}
"""Metrics that every task's group measures anew, which gives them an interval."""
CURVES = {
    "reward/success": "episodes solved, share", "reward/mean": "reward", "reward/completion": "completion",
    "reward/zero_variance": "groups of equal rewards, share", "teacher/gap_mean": "log teacher - log student, nats a token",
    "policy/entropy": "entropy, nats", "loss/total": "loss", "loss/policy": "policy loss", "loss/distillation": "distillation loss",
    "skills/bank": "skills in the bank", "time/rollout_tokens_per_s": "rollout, tokens/s", "time/learner_tokens_per_s": "learner, tokens/s",
    "memory/peak_gib": "peak memory, GiB",
}  # fmt: skip
"""Metrics that reports and overviews draw, and their titles."""
POINTS = 60
"""Most points of a curve; of a longer run iterations are put together."""
_LARGEST = 3.4028235e38
_INK = "#010203"  # stands for currentColor, which matplotlib does not know
_LOCK = Lock()  # matplotlib's settings are those of the whole process


def curve(run: Run, name: str, window: int | None = None) -> pd.DataFrame:
    """A metric over the iterations.

    Args:
        run: The run.
        name: One of `Run.metrics`.
        window: So many iterations make a point; default: as few as give at most POINTS.

    Returns:
        By `iteration` (a point's last) `mean`, and `low` and `high`: its 95% interval (Student's t) over the groups played, failed
        episodes left out, where `name` is in EPISODE_METRICS and there are two groups; NaN elsewhere. That of a share ends at 0 and 1.

    Raises:
        KeyError: there is no such metric.
    """
    values = run.metrics[name]
    values = values[values.abs() <= _LARGEST]  # what is not finite, or overflows an axis, leaves a gap
    n, window = int(run.metrics.index.max()) + 1 if len(run.metrics) else 1, window or _window(run)
    if name in EPISODE_METRICS and not run.trajectories.empty:
        played = run.trajectories[run.trajectories["finish_reason"] != "failed"]
        groups = played[EPISODE_METRICS[name]].astype(float).groupby([played["iteration"], played["task_id"]]).mean()
        bounds = (-math.inf, math.inf) if name == "reward/mean" else (0.0, 1.0)
        points = {k: t_interval(g.tolist(), bounds=bounds) for k, g in groups.groupby(groups.index.get_level_values("iteration") // window)}
    else:
        points = {k: (g.mean(), math.nan, math.nan) for k, g in values.groupby(values.index // window)}
    ends = pd.Index([min((k + 1) * window, n) - 1 for k in points], name="iteration", dtype=int)
    return pd.DataFrame(list(points.values()), ends, ["mean", "low", "high"], dtype=float)


def _window(run: Run) -> int:
    return max(1, math.ceil(len(run.metrics) / POINTS))


def curves(runs: Mapping[str, Run], name: str, title: str | None = None) -> Figure:
    """A metric of one or more runs against the iteration, with its 95% intervals where it has any.

    Args:
        runs: Runs by the names they get in the legend, which one run alone does not need.
        name: One of `Run.metrics`; runs without it are left out.
        title: Above the picture; default: the metric's name.
    """
    with _axes(title or name, len(runs) > 1) as ax:
        window = max((_window(run) for run in runs.values()), default=1)  # one for all: a longer mean looks calmer
        for i, (label, run) in enumerate(runs.items()):
            if name not in run.metrics:
                continue
            c = curve(run, name, window)
            colour = COLOURS[i % len(COLOURS)]
            ax.plot(c.index, c["mean"], color=colour, label=label, linewidth=1.6, marker="o" if len(c) == 1 else "")
            if c["low"].notna().any():
                ax.fill_between(c.index, c["low"], c["high"], color=colour, alpha=0.18, linewidth=0)
    return _figure(ax)


def lines(series: Mapping[str, pd.Series[Any]], title: str, marker: str = "") -> Figure:
    """Numbers by iteration, one line each.

    Args:
        series: By the names they get in the legend; empty ones are left out.
        title: Above the picture.
        marker: At each number, as matplotlib names it.
    """
    shown = {name: s for name, s in series.items() if len(s)}
    with _axes(title, bool(shown)) as ax:
        for colour, dash, (name, s) in zip(cycle(COLOURS), cycle(("-", "--", ":")), shown.items(), strict=False):
            look: dict[str, Any] = {"marker": marker, "linestyle": dash, "linewidth": 1.6, "markersize": 4}  # equal ones are both seen
            ax.plot(s.index, s, color=colour, label=name, **look)
    return _figure(ax)


def pictures(run: Run) -> Iterator[Picture]:
    """Those of CURVES that the run has measured."""
    for name, title in CURVES.items():
        if name in run.metrics and run.metrics[name].notna().any():
            figure = curves({"": run}, name, title)
            yield Picture(f"{name.replace('/', '-')}.png", title, png(figure), svg(figure))


@contextmanager
def _axes(title: str, legend: bool) -> Iterator[Axes]:
    """The axes of a new figure, in the page's ink."""
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    with _LOCK, mpl.rc_context({**ink, "text.parse_math": False}):  # a name with two dollars is no formula
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        figure.patch.set_alpha(0.0)
        ax = figure.subplots()
        ax.patch.set_alpha(0.0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        yield ax
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xlabel("iteration")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if legend:
            ax.legend(frameon=False, fontsize=9, labelcolor=_INK)


def _figure(ax: Axes) -> Figure:
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure


def svg(figure: Figure) -> str:
    """As an SVG element to be put into HTML: its ink is the text's colour, so that it can be read in the dark. The same for the same."""
    out = StringIO()
    with _LOCK, mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "skillsd"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r'<metadata>.*?</metadata>|width="[^"]*pt" height="[^"]*pt" ', "", text, count=2, flags=re.DOTALL)


def png(figure: Figure, dpi: int = 130) -> bytes:
    """As a picture file, black on white."""
    out = BytesIO()
    with _LOCK:
        alpha = figure.patch.get_alpha()
        figure.patch.set_alpha(1.0)  # or the white would be as transparent as what it replaces
        figure.savefig(out, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
        figure.patch.set_alpha(alpha)
    return out.getvalue()
