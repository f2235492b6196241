"""What each page of `skillsd view` shows, as plain data. Times it shows are the run's own."""

from __future__ import annotations

import difflib
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from skillsd.analysis import panel, plots, show
from skillsd.analysis.heatmap import heat
from skillsd.analysis.pictures import turns
from skillsd.analysis.plots import CURVES
from skillsd.analysis.provenance import lookup
from skillsd.analysis.render import Picture
from skillsd.analysis.run import Run, text_frame
from skillsd.analysis.similar import SkillIndex
from skillsd.analysis.view.site import OpenRun
from skillsd.bounded import visible
from skillsd.config_errors import leaves
from skillsd.errors import ConfigError
from skillsd.skills.skill import FIELDS, Skill
from skillsd.statistics import paired_difference
from skillsd.words import count

if TYPE_CHECKING:
    from skillsd.analysis.score import Scorer

MAX_CURVES = 100
"""On one page; a run measures half as many things."""
ROWS = 100
"""Rows of a table on one page."""
NEAR = 20_000
"""Up to so many skills an index is made without being asked for: seconds."""
WORDS = 2000
"""Texts of more are not compared word by word, which takes the square of them."""
LATEST = 32
"""Trajectories that the overview names, at most."""
HEATS = {"skill": ("i", "with its skill"), "none": ("o", "without a skill"), "shuffled": ("r", "with another task's skill")}
"""What the teacher sees while tokens are scored, and the key that asks for it."""


def _picture(figure: Figure, alt: str) -> Picture:
    return Picture("", alt, svg=plots.svg(figure))


def _paged(frame: pd.DataFrame, sort: str, page: int) -> dict[str, Any]:
    """A page of a table by one of its columns (a leading - for descending)."""
    name, down = sort.removeprefix("-"), sort.startswith("-")
    if name != frame.index.name and name not in frame:
        name, down = str(frame.index.name), False
    ordered = (
        frame.sort_index(ascending=not down) if name == frame.index.name else frame.sort_values(name, ascending=not down, kind="stable")
    )
    pages = max(1, math.ceil(len(ordered) / ROWS))
    page = min(max(1, page), pages)
    return {"rows": ordered.iloc[(page - 1) * ROWS : page * ROWS], "n": len(ordered), "page": page, "pages": pages, "sort": sort}


# -- overview ------------------------------------------------------------------------------------------------------------------------


def overview(opened: OpenRun, everything: bool = False) -> dict[str, Any]:
    """How the run goes: curves, the panel, speed and memory; all metrics if `everything`."""
    run = opened.run
    names = {name: name for name in run.metrics.columns if name != "epoch"} if everything else CURVES
    measured = [name for name in names if name in run.metrics and run.metrics[name].notna().any()][:MAX_CURVES]
    figures = [opened.once(("curve", name, names[name]), partial(_curve, {"": run}, name, names[name])) for name in measured]
    seen = show.overview(run)
    facts = {
        "model": lookup(run.config, "model.policy.model"),
        "environment": lookup(run.config, "data.env"),
        "seed": seen["seed"],
        "iterations": seen["iterations"],
        "trajectories": seen["trajectories"],
        "tasks": seen["tasks"],
        "last written": opened.written(),
        "running now": seen["running"] or "no",
        "ended": ", ".join(f"{n} {reason}" for reason, n in seen["finish_reasons"].items()),
        "skills": f"{seen['skills']['held']} held, {seen['skills']['ever']} ever, of {count(seen['skills']['tasks'], 'task')}",
        **_costs(run),
    }
    return {"facts": facts, "panel": panel.shown(run.panel), "figures": figures, "everything": everything, "latest": _latest(run)}


def _curve(runs: dict[str, Run], name: str, title: str) -> Picture:
    return _picture(plots.curves(runs, name, title), title)


def _costs(run: Run) -> dict[str, str]:
    """Seconds an iteration by part, and the most memory."""
    parts = {"rollout": "time/rollout_s", "teacher": "time/teacher_s", "update": "time/update_s", "summaries": "time/summary_s"}
    times = {part: run.metrics[name].mean() for part, name in parts.items() if name in run.metrics}
    seconds = ", ".join(f"{part} {value:.2f}" for part, value in times.items() if not math.isnan(value))
    memory = run.metrics["memory/peak_gib"].max() if "memory/peak_gib" in run.metrics else math.nan
    return {"seconds an iteration": seconds} | ({} if math.isnan(memory) else {"peak memory": f"{memory:.2f} GiB"})


def _latest(run: Run) -> list[dict[str, Any]]:
    """The first trajectories of the last iteration."""
    rows = run.trajectories
    rows = rows[rows["iteration"] == rows["iteration"].max()].head(LATEST) if len(rows) else rows
    return [{"trajectory": n, **row} for n, row in zip(rows.index, rows.to_dict("records"), strict=True)]


# -- tasks ---------------------------------------------------------------------------------------------------------------------------


def _tasks(run: Run) -> pd.DataFrame:
    """A row a task: `groups`, `trajectories`, `reward` (mean), `solved` and `zero_variance` (shares), `last` (mean reward of its last
    group), `turns` (fewest of a solved trajectory) and `best`, that trajectory."""
    played = run.trajectories
    groups = played.groupby(["task_id", "iteration"])["reward"].agg(["mean", "min", "max"])
    groups = groups.assign(even=groups["min"] == groups["max"])
    by_task = groups.groupby(level="task_id")
    solved = played[played["success"]].sort_values("n_turns", kind="stable").reset_index().groupby("task_id")
    tasks = played.groupby("task_id")
    frame = text_frame(
        {
            "groups": by_task.size(),
            "trajectories": tasks.size(),
            "reward": tasks["reward"].mean(),
            "solved": tasks["success"].mean(),
            "zero_variance": by_task["even"].mean(),
            "last": by_task["mean"].last(),
        }
    )
    return frame.assign(turns=solved["n_turns"].first().astype("Int64"), best=solved["trajectory"].first().astype("Int64"))


def tasks(opened: OpenRun, query: str, only: str, sort: str, page: int) -> dict[str, Any]:
    """The tasks whose name holds `query`, of those that `only` says: all, solved, unsolved, uneven (a group's rewards differ), even."""
    frame = opened.once("tasks", lambda: _tasks(opened.run))
    kinds = {
        "solved": frame["solved"] > 0, "unsolved": frame["solved"] == 0, "uneven": frame["zero_variance"] < 1,
        "even": frame["zero_variance"] == 1,
    }  # fmt: skip
    chosen = frame[kinds[only]] if only in kinds else frame
    chosen = chosen[chosen.index.str.contains(query, case=False, regex=False)] if query else chosen
    shown = _paged(chosen, sort, page)
    plans = {
        task_id: " · ".join(turn.action.strip() for turn in opened.run.trajectory(int(n)).turns)
        for task_id, n in shown["rows"]["best"].dropna().items()
    }
    return shown | {"query": query, "only": only, "kinds": ["all", *kinds], "plans": plans, "all": len(frame)}


def task(opened: OpenRun, task_id: str) -> dict[str, Any]:
    """A task's groups; its name as addresses have it. Raises KeyError if it was never played."""
    known = opened.once("visible", lambda: {visible(name): name for name in opened.run.trajectories["task_id"].unique()})
    if task_id not in known:
        raise KeyError(f"Task {task_id} was never played in this run.")
    seen = show.task(opened.run, known[task_id])
    rows = opened.run.trajectories.loc[[n for g in seen["groups"] for n in g["trajectories"]]]
    return seen | {"ends": rows["finish_reason"].to_dict(), "solved": rows["success"].to_dict()}


# -- a trajectory --------------------------------------------------------------------------------------------------------------------


def trajectory(opened: OpenRun, n: int, scored: str) -> dict[str, Any]:
    """An episode turn by turn; `scored` is one of HEATS, or "" for no scores. Raises IndexError if there is no such trajectory."""
    with opened.lock:
        run = opened.run
        last = len(run.trajectories) - 1
        if n > last:
            raise IndexError(f"There is no trajectory {n}: " + (f"the last one is {last}." if last >= 0 else "there are none yet."))
        seen = show.trajectory(run, n)
        skill = run.skill(seen["skill_id"]) if seen["skill_id"] in run.skills.index else None  # a bank may be lost
        group = run.trajectories
        group = group[(group["iteration"] == seen["iteration"]) & (group["task_id"] == seen["task_id"])].index.tolist()
    shown = {"skill": skill, "text": skill and _rendered(opened.run, skill)}
    found = _scores(opened, n, scored) if scored in HEATS else None
    return {
        "t": seen, "turns": turns(seen, opened.pictures), "language": opened.pictures.language, "last": last, "group": group,
        "shown": shown, "heats": HEATS, "scored": found,
    }  # fmt: skip


def _rendered(run: Run, skill: Skill) -> str:
    """What the teacher saw of a skill, or why that cannot be shown."""
    try:
        return skill.render(run.skill_template)
    except (ConfigError, ValueError) as e:
        return str(e)


def _scores(opened: OpenRun, n: int, kind: str) -> dict[str, Any]:
    """Log-prob of the teacher, which sees what `kind` says, - log-prob of the student, for each sampled token."""

    def ask(scorer: Scorer) -> dict[str, Any]:
        run = scorer.run
        own = run.trajectories["skill_id"][n]
        if kind == "skill" and own is pd.NA:
            raise KeyError(f"The teacher of trajectory {n} saw no skill: look at it without one, or with another task's.")
        context: int | str = "" if kind == "none" else int(own) if kind == "skill" else _other(run, run.trajectories["task_id"][n], n)
        student, teacher = scorer.logprobs(n), scorer.logprobs(n, "teacher", context)
        tokens = run.tokens(n).assign(text=scorer.texts(n), gap=(teacher - student).astype(float), student=student, teacher=teacher)
        sampled = tokens[tokens["sampled"]]
        heats = {int(turn): Markup(heat(list(part["text"]), list(part["gap"]))) for turn, part in sampled.groupby("turn")}
        return {
            "kind": kind, "skill_id": context if isinstance(context, int) else None, "heats": heats, "tokens": len(sampled),
            "gap": float(sampled["gap"].mean()), "total": float(sampled["gap"].sum()), "prompt": scorer.prompt(n, context),
            "by_turn": sampled.groupby("turn")["gap"].sum().to_dict(),
        }  # fmt: skip

    return opened.scored((n, kind), ask)


def _other(run: Run, task_id: str, n: int) -> int:
    """A skill of another task: the n-th, counted round."""
    others = run.skills.index[run.skills["task_id"] != task_id]
    if others.empty:
        raise KeyError("The bank holds no skill of another task.")
    return int(others[n % len(others)])


# -- skills --------------------------------------------------------------------------------------------------------------------------


def skills(opened: OpenRun, query: str, sort: str, page: int) -> dict[str, Any]:
    """The bank's growth, and its skills: all, or those most like `query`, best first."""
    run = opened.run
    frame, last = run.skills, max(1, len(run.metrics))
    if query:
        frame = _index(opened).search(query, len(frame))
    shown = _paged(frame, sort or ("-similarity" if query else "skill_id"), page)
    return shown | {"query": query, "last": last, "figure": opened.once("growth", lambda: _growth(run)), "all": len(run.skills)}


def _growth(run: Run) -> Picture | None:
    """Skills held, and those that ever entered, after each iteration."""
    events = run.events
    if events.empty:
        return None
    count = {kind: (events["kind"] == kind).groupby(events["iteration"]).sum().cumsum() for kind in ("insert", "evict", "use")}
    lines = {"ever": count["insert"], "held": count["insert"] - count["evict"], "retrieved": count["use"]}
    title = "skills, and how often they were retrieved"
    return _picture(plots.lines(lines, title), title)


def _index(opened: OpenRun) -> SkillIndex:
    """Made anew when the last skill is another one: what a skill says does not change."""
    frame = opened.run.skills
    return opened.once("index", lambda: SkillIndex(frame), (len(frame), *frame[list(FIELDS)].tail(1).to_numpy().ravel()))


def skill(opened: OpenRun, skill_id: int, near: bool = False) -> dict[str, Any]:
    """A skill, where it came from, when it was retrieved, and which are like it (in a bank of more than NEAR, if `near`).

    Raises:
        KeyError: there never was one of that id.
    """
    run = opened.run
    if skill_id not in run.skills.index:
        raise KeyError(f"There is no skill {skill_id} in this bank.")
    row = run.skills.loc[skill_id].to_dict()
    uses = run.retrievals[run.retrievals["skill_id"] == skill_id].set_index("iteration")
    source = run.trajectories
    at = ("iteration", row["source_iteration"]), ("task_id", row["task_id"]), ("member", row["source_member"])
    for column, value in at:
        source = source[source[column] == value]
    lines, title = {name: uses[name].dropna() for name in ("reward", "gap")}, "at its retrievals: the group's mean reward, gap (nats)"
    return {
        "id": skill_id, "skill": row, "fields": FIELDS, "uses": uses.reset_index().to_dict("records"),
        "source": int(source.index[0]) if len(source) else None,
        "figure": _picture(plots.lines(lines, title, "o"), title) if len(uses) else None,
        "near": _index(opened).neighbours(skill_id) if near or len(run.skills) <= NEAR else None,
    }  # fmt: skip


def skill_pair(opened: OpenRun, a: int, b: int) -> dict[str, Any]:
    """Two skills side by side, what one has and the other has not marked. Raises KeyError if there is no such skill."""
    frame = opened.run.skills
    if missing := [i for i in (a, b) if i not in frame.index]:
        raise KeyError(f"There is no skill {missing[0]} in this bank.")
    both = [{"id": i, "skill": frame.loc[i].to_dict()} for i in (a, b)]
    texts = {name: _marked(*(one["skill"][name] for one in both)) for name in FIELDS}
    return {"both": both, "texts": texts, "fields": FIELDS}


def _marked(a: str, b: str) -> tuple[Markup, Markup]:
    """Both texts, the words that the other has not in <mark>."""
    words = visible(a).split(), visible(b).split()
    if max(map(len, words)) > WORDS:
        return escape(visible(a)), escape(visible(b))
    out: tuple[list[Markup], list[Markup]] = ([], [])
    for kind, *spans in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, (start, end) in enumerate((spans[:2], spans[2:])):
            text = escape(" ".join(words[side][start:end]))
            if text:
                out[side].append(text if kind == "equal" else Markup("<mark>{}</mark>").format(text))
    return Markup(" ").join(out[0]), Markup(" ").join(out[1])


# -- two runs ------------------------------------------------------------------------------------------------------------------------


def compare(one: OpenRun, other: OpenRun) -> dict[str, Any]:
    """Two runs: their curves, their panels, and in what their configurations differ."""
    runs, stamp = {one.name: one.run, other.name: other.run}, f"{one.stamp} {other.stamp}"
    names = [name for name in CURVES if any(name in r.metrics and r.metrics[name].notna().any() for r in runs.values())]
    flat = [{key: str(value) for key, value in leaves(r.config)} for r in runs.values()]
    differing = [k for k in sorted({*flat[0], *flat[1]}) if flat[0].get(k) != flat[1].get(k)]
    return {
        "other": other.name,
        "live": stamp,
        "figures": [one.once(("compare", name), partial(_curve, runs, name, CURVES[name]), stamp) for name in names],
        "panels": {name: panel.shown(r.panel) for name, r in runs.items()},
        "difference": _difference(one.run, other.run),
        "settings": [(k, *(f.get(k, "-") for f in flat)) for k in differing],
    }


def _difference(a: Run, b: Run) -> dict[str, Any] | None:
    """Success after training, b - a, with its 95% interval, paired by the panel's episodes; None where they are not the same."""
    one, other = (r.panel.get("after") for r in (a, b))
    if not one or not other:
        return None
    try:
        mean, low, high = paired_difference(one, other)
    except (ValueError, KeyError, TypeError):  # from elsewhere
        return None
    return {"n": len(one["levels"]), "mean": mean, "low": low, "high": high}
