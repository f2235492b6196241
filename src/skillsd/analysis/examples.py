"""A few trajectories and skills of a run, chosen by a rule and told in a report's blocks. What agents and environments wrote is cut,
made visible and freed of keys here; the document escapes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from skillsd.analysis.document import Block, Cards, Code, Heading, Picture
from skillsd.analysis.pictures import Pictures
from skillsd.analysis.run import Run
from skillsd.bounded import visible
from skillsd.errors import without_keys
from skillsd.skills.skill import FIELDS
from skillsd.trajectory import Trajectory, Turn
from skillsd.words import count

TRAJECTORIES, SKILLS = 10, 20
MOST_CHARS, MOST_TURNS = 4000, 40
"""Of a text, and of a trajectory, that are shown."""
RULE = (
    "Of the first and of the last iteration the first of each kind (solved or not, its teacher told a skill or not); of a kind that is in "
    f"neither, the last one; the rest evenly spaced in the record; {TRAJECTORIES} in all."
)


def choose(played: pd.DataFrame) -> list[int]:
    """Which of `Run.trajectories` are shown, by RULE: their numbers, ascending."""
    kinds = [played["success"], played["skill_id"].notna().rename("told")]
    found: dict[int, None] = {}
    for iteration in (played["iteration"].min(), played["iteration"].max()):
        found |= dict.fromkeys(played[played["iteration"] == iteration].groupby(kinds).head(1).index)
    known = {tuple(kind.loc[n] for kind in kinds) for n in found}
    found |= dict.fromkeys(n for n in played.groupby(kinds).tail(1).index if tuple(kind.loc[n] for kind in kinds) not in known)
    rest = played.index.difference(pd.Index(list(found), dtype=int))
    places = np.linspace(0, len(rest) - 1, min(TRAJECTORIES - len(found), len(rest))).round().astype(int)
    return sorted(int(n) for n in (*found, *rest[places]))


def said(text: str) -> str:
    """What somebody else wrote, to be shown: without keys that skillsd uses, cut, all characters printable."""
    more = f"\n[... cut: {len(text)} characters in all]" if len(text) > MOST_CHARS else ""
    return visible(without_keys(text)[:MOST_CHARS]) + more


def trajectories(run: Run, pictures: Pictures) -> list[Block]:
    """The chosen trajectories, turn by turn."""
    out: list[Block] = []
    for n in choose(run.trajectories) if len(run.trajectories) else []:
        t = run.trajectory(n)
        out.append(
            Heading(f"Trajectory {n}: iteration {t.iteration}, task {said(t.task_id)}, {'solved' if t.success else 'not solved'}", 3)
        )
        why = f" ({said(t.failure)})" if t.failure else ""
        end = f"{t.finish_reason}{why} after {count(len(t.turns), 'turn')}, reward {t.reward:.3f}, completion {t.completion:.3f}"
        out.append(f"Member {t.member} of its group: {end}. Its teacher saw {'no skill' if t.skill_id is None else f'skill {t.skill_id}'}.")
        if t.skill_id is not None and t.skill_id in run.skills.index:
            out.append(_skill(run, t.skill_id))
        if t.instruction:
            out += ["Instruction:", Code(said(t.instruction))]
        out += _turns(t, n, pictures)
    return out


def _turns(t: Trajectory, n: int, pictures: Pictures) -> list[Block]:
    numbered: list[tuple[int, Turn | str]] = [*enumerate(t.turns, 1)]
    if t.final_observation is not None:
        numbered.append((len(t.turns), t.final_observation))
    if len(t.turns) <= MOST_TURNS:
        return [_cards(numbered, n, pictures)] if numbered else []
    half = MOST_TURNS // 2
    left_out = len(t.turns) - 2 * half
    gap = f"{count(left_out, 'turn')} {'is' if left_out == 1 else 'are'} left out here."
    return [_cards(numbered[:half], n, pictures), gap, _cards(numbered[len(t.turns) - half :], n, pictures)]


def _cards(turns: Sequence[tuple[int, Turn | str]], n: int, pictures: Pictures) -> Cards:
    """A card a turn, and one for the final observation, which comes as its text alone."""
    cards: list[list[Block]] = []
    drawn = 0
    for number, turn in turns:
        observation, name = (turn, "end") if isinstance(turn, str) else (turn.observation, f"turn-{number}")
        png = pictures.png(observation)
        drawn += png is not None
        told = f", reward {turn.reward:.3f}" if isinstance(turn, Turn) and turn.reward else ""
        title = f"trajectory {n}, {name.replace('-', ' ')}"
        seen: list[Block] = [Picture(f"trajectory-{n}-{name}.png", title, png)] if png else []
        text = Code(said(observation), folded="as text" if png else "")
        done: list[Block] = [Code(said(turn.action), pictures.language)] if isinstance(turn, Turn) else []
        cards.append([f"Turn {number}{told}" if done else "At the end", *seen, text, *done])
    return Cards(cards, "small" if drawn == len(turns) else "large")


def skills(run: Run) -> list[Block]:
    """The most used skills."""
    ranked = run.skills.sort_values("uses", ascending=False, kind="stable")  # by skill_id otherwise
    cards: list[list[Block]] = []
    for skill_id, s in ranked.head(SKILLS).iterrows():
        gone = "" if pd.isna(s["dropped"]) else f", dropped in iteration {s['dropped']}"
        made = f"from iteration {s['source_iteration']}, member {s['source_member']}" if s["inserted"] >= 0 else "imported"
        made += f" (its source's reward {s['source_reward']:.3f})"
        head = f"Skill {skill_id} of task {said(s['task_id'])}: used {s['uses']} times, mean reward {s['mean_reward']:.3f}, {made}{gone}."
        cards.append([head, _skill(run, int(skill_id))])  # type: ignore[call-overload]
    return [Cards(cards, "medium")] if cards else []


def _skill(run: Run, skill_id: int) -> Code:
    texts = zip(FIELDS, run.skill(skill_id).texts, strict=True)
    return Code("\n".join(f"{name.replace('_', ' ')}: {said(text.strip())}" for name, text in texts))
