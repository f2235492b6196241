"""A few trajectories and skills of a run for its report, chosen by a rule. What agents and environments wrote is freed of keys and cut
here; the templates escape it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from skillsd.analysis import show
from skillsd.analysis.pictures import Pictures, turns
from skillsd.analysis.run import Run
from skillsd.errors import without_keys
from skillsd.skills.skill import FIELDS
from skillsd.words import count

TRAJECTORIES, SKILLS = 10, 20
MAX_CHARS, MAX_TURNS = 4000, 40
"""Most characters of a text, and most turns of a trajectory, that are shown."""
RULE = (
    "Of the first and of the last iteration the first of each kind (solved or not, its teacher saw a skill or not); of a kind that is in "
    f"neither, the last one; the rest evenly spaced in the record; {TRAJECTORIES} in all."
)


def choose(played: pd.DataFrame) -> list[int]:
    """Which of `Run.trajectories` are shown, by RULE: their numbers, ascending."""
    kinds = [played["success"], played["skill_id"].notna().rename("has_skill")]
    found: dict[int, None] = {}
    for iteration in (played["iteration"].min(), played["iteration"].max()):
        found |= dict.fromkeys(played[played["iteration"] == iteration].groupby(kinds).head(1).index)
    known = {tuple(kind.loc[n] for kind in kinds) for n in found}
    found |= dict.fromkeys(n for n in played.groupby(kinds).tail(1).index if tuple(kind.loc[n] for kind in kinds) not in known)
    rest = played.index.difference(pd.Index(list(found), dtype=int))
    places = np.linspace(0, len(rest) - 1, min(TRAJECTORIES - len(found), len(rest))).round().astype(int)
    return sorted(int(n) for n in (*found, *rest[places]))


def shortened(text: str) -> str:
    """What somebody else wrote, without keys that skillsd uses, and cut."""
    more = f"\n[... cut: {len(text)} characters in all]" if len(text) > MAX_CHARS else ""
    return without_keys(text)[:MAX_CHARS] + more


def trajectories(run: Run, pictures: Pictures) -> list[dict[str, Any]]:
    """The chosen trajectories, turn by turn; of a long one the turns in the middle are left out."""
    out = []
    for n in choose(run.trajectories) if len(run.trajectories) else []:
        t = show.trajectory(run, n)
        skill_id, seen, half = t["skill_id"], turns(t, pictures, shortened), MAX_TURNS // 2
        if (left_out := len(t["turns"]) - MAX_TURNS) > 0:
            gap = f"{count(left_out, 'turn')} {'is' if left_out == 1 else 'are'} left out here."
            seen[half : half + left_out] = [{"left_out": gap}]
        why = f" ({shortened(t['failure'])})" if t["failure"] else ""
        end = (
            f"{t['finish_reason']}{why} after {count(len(t['turns']), 'turn')}, reward {t['reward']:.3f}, completion {t['completion']:.3f}"
        )
        solved = "solved" if t["success"] else "not solved"
        out.append({
            "number": n, "title": f"Trajectory {n}: iteration {t['iteration']}, task {shortened(t['task_id'])}, {solved}",
            "end": f"Member {t['member']} of its group: {end}. Its teacher saw {'no skill' if skill_id is None else f'skill {skill_id}'}.",
            "skill": _texts(run, skill_id) if skill_id in run.skills.index else None,
            "instruction": shortened(t["instruction"]), "turns": seen,
        })  # fmt: skip
    return out


def skills(run: Run) -> list[dict[str, Any]]:
    """The most used skills."""
    ranked = run.skills.sort_values("uses", ascending=False, kind="stable")  # by skill_id otherwise
    out = []
    for skill_id, s in ranked.head(SKILLS).iterrows():
        gone = "" if pd.isna(s["evicted"]) else f", evicted in iteration {s['evicted']}"
        made = f"from iteration {s['source_iteration']}, member {s['source_member']}" if s["inserted"] >= 0 else "imported"
        used = f"used {s['uses']} times, mean reward {s['mean_reward']:.3f}, {made} (its source's reward {s['source_reward']:.3f}){gone}"
        out.append({"title": f"Skill {skill_id} of task {shortened(s['task_id'])}: {used}.", "texts": _texts(run, int(skill_id))})  # type: ignore[call-overload]
    return out


def _texts(run: Run, skill_id: int) -> dict[str, str]:
    texts = zip(FIELDS, run.skill(skill_id).texts, strict=True)
    return {name.replace("_", " "): shortened(text.strip()) for name, text in texts}
