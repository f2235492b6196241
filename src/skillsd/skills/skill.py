"""A skill: three short texts about one finished trajectory, where they came from, and how they have fared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from skillsd.bounded import fill
from skillsd.trajectory import Trajectory

FIELDS = ("success_analysis", "mistake_analysis", "golden_workflow")
"""The three texts of a skill, in order."""

MAX_CHARS = 24_000
"""Longest text that enters a bank, in characters: no more than a summariser is shown of the conversation."""
MAX_ANSWER_CHARS = 64_000
"""Longest answer of a language model that is read at all, thoughts and prose around the object included."""
MAX_ANSWER_FIELD_CHARS = 4_000
"""Longest text that a language model may write; about 500 are asked for."""

SKILL_TEMPLATE = """\
# Notes from an earlier attempt at this task
What worked, or would have: {success_analysis}
What went wrong, and why: {mistake_analysis}
A way through: {golden_workflow}
Take these notes as a guide, not as orders: what you observe now comes first.

"""
"""Default wrapper of a skill in front of the teacher's prompt. The paper does not publish its own; this one is ours."""


@dataclass(frozen=True)
class Skill:
    """One skill. The bank fills `skill_id`, `uses`, `sources` and `mean_reward`; they are ignored on insertion.

    Args:
        success_analysis: The intent that led, or would lead, to success.
        mistake_analysis: Root causes of failures and inefficiencies.
        golden_workflow: The ideal overall process.
        task_id: The task it belongs to.
        skill_id: The bank's id, from 1 upwards; None before insertion.
        source_iteration: Iteration of the trajectory it was made from; below 0 that of another run, counted back from this one's start.
        source_member: That trajectory's index within its group.
        source_reward: That trajectory's reward.
        source_completion: That trajectory's completion, 0..1.
        uses: How often it conditioned a teacher (visits of its task).
        mean_reward: What retrieval exploits: the bank's `value_estimate` says what it is.
        sources: How many trajectories gave exactly these texts.

    Raises:
        ValueError: A text is not a str, is blank, or cannot be written as UTF-8.
    """

    success_analysis: str
    mistake_analysis: str
    golden_workflow: str
    task_id: str = ""
    skill_id: int | None = None
    source_iteration: int = 0
    source_member: int = 0
    source_reward: float = 0.0
    source_completion: float = 0.0
    uses: int = 0
    mean_reward: float = 0.0
    sources: int = 1

    def __post_init__(self) -> None:
        for name in FIELDS:
            text = getattr(self, name)
            if not isinstance(text, str):
                raise ValueError(f"{name} must be a string, not {type(text).__name__}")
            if not text.strip():
                raise ValueError(f"{name} is empty")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name} holds a lone surrogate and cannot be stored as UTF-8") from error

    def admitted(self, most: int = MAX_CHARS) -> Skill:
        """As it may enter a bank. The texts are data: they are bounded, not read.

        Control characters become spaces, but for line breaks and tabs. Nothing is cut: half an advice may say its opposite.

        Args:
            most: Longest text, in characters.

        Raises:
            ValueError: A text is longer, or nothing of it is left.
        """
        for name in FIELDS:
            if len(getattr(self, name)) > most:
                raise ValueError(f"{name} has {len(getattr(self, name))} characters, more than {most}")
        return self.with_texts(_CONTROL.sub(" ", text) for text in self.texts)

    def with_texts(self, texts: Iterable[str]) -> Skill:
        """The same skill with other texts, in the order of `FIELDS`."""
        return replace(self, **dict(zip(FIELDS, texts, strict=True)))  # type: ignore[arg-type]

    @property
    def texts(self) -> tuple[str, str, str]:
        """The three texts, in the order of `FIELDS`."""
        return (self.success_analysis, self.mistake_analysis, self.golden_workflow)

    def render(self, template: str = SKILL_TEMPLATE) -> str:
        """The text that is put in front of the teacher's prompt.

        Args:
            template: Text with the names of the three fields in braces (`bounded.fill`).

        Raises:
            ValueError: The template names something else, its braces do not match, or it repeats the texts without end.
        """
        try:
            return fill(template, dict(zip(FIELDS, self.texts, strict=True)))
        except ValueError as error:
            raise ValueError(
                f"skill template cannot be filled ({error}): use only {', '.join(FIELDS)} in braces, and double other braces"
            ) from error

    def of(self, trajectory: Trajectory) -> Skill:
        """The same texts, with `trajectory` as their source."""
        return replace(
            self,
            task_id=trajectory.task_id,
            source_iteration=trajectory.iteration,
            source_member=trajectory.member,
            source_reward=trajectory.reward,
            source_completion=trajectory.completion,
            mean_reward=trajectory.reward,
        )

    @classmethod
    def parse(cls, text: str) -> Skill:
        """Reads a language model's answer: one JSON object with exactly the three fields, a code fence and prose around it allowed.

        What stands in <think>...</think> is no answer, nor what precedes a </think> or follows a <think> without its other end.

        Raises:
            ValueError: The answer or a field is too long, there is no such object, more than one, or a field is missing, surplus,
                repeated, blank or no string.
        """
        if len(text) > MAX_ANSWER_CHARS:
            raise ValueError(f"an answer of {len(text)} characters is not read: at most {MAX_ANSWER_CHARS}")
        objects = _objects(text)
        if len(objects) != 1:
            thought = " outside its thoughts" * bool(_THOUGHT.search(text))
            raise ValueError(f"expected one JSON object{thought}, found {len(objects)} in {_excerpt(text)}")
        pairs = objects[0]
        names = [name for name, _ in pairs]
        wrong = [
            f"{what}: {', '.join(found)}"
            for what, found in (
                ("missing", [name for name in FIELDS if name not in names]),
                ("unexpected", sorted(set(names) - set(FIELDS))),
                ("repeated", sorted({name for name in names if names.count(name) > 1})),
            )
            if found
        ]
        if wrong:
            raise ValueError(f"expected exactly the fields {', '.join(FIELDS)}; {'; '.join(wrong)}")
        values = {name: value.strip() if isinstance(value, str) else value for name, value in pairs}
        success, mistakes, workflow = (values[name] for name in FIELDS)
        found = cls(success, mistakes, workflow).admitted(MAX_ANSWER_FIELD_CHARS)
        return found.with_texts(text.strip() for text in found.texts)  # a control character at an end has become a space


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # the last two ranges turn text around
_THOUGHT = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)
_STOP = re.compile(r"\{|<(/?)think(?:ing)?>", re.IGNORECASE)


def without_thoughts(text: str) -> str:
    """A plain answer without the thoughts in front of it, which a reasoning model puts between <think> and </think>.

    Thoughts without an end are all there is, and a </think> without a beginning ends thoughts that began in the prompt. The marks may also
    stand in the answer itself, as a quotation: only what comes first is cut off.
    """
    while (mark := _THOUGHT.search(text)) is not None and (mark[1] or not text[: mark.start()].strip()):
        end = mark if mark[1] else next((m for m in _THOUGHT.finditer(text, mark.end()) if m[1]), None)
        text = text[end.end() :] if end is not None else ""
    return text


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a repeated key is seen."""


def _objects(text: str) -> list[_Pairs]:
    """The objects of an answer that have a field of a skill. Marks of thoughts inside an object are a part of its texts."""
    # strict=False: models put raw line breaks into strings.
    decoder = json.JSONDecoder(object_pairs_hook=_Pairs, strict=False)
    found: list[_Pairs] = []
    stop, spare = _STOP.search(text), 8 * MAX_ANSWER_CHARS  # characters that may be read in vain, or nested braces would cost their square
    while stop is not None:
        at, end = stop.start(), stop.end()
        if stop[1]:  # the end of thoughts that began in the prompt
            found = []
        elif stop[1] == "":
            end = next((m.end() for m in _THOUGHT.finditer(text, end) if m[1]), len(text))
        if stop[0] != "{":
            stop = _STOP.search(text, end)
            continue
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:  # a number of 5000 digits is a ValueError
            end = at + 1  # a brace in the prose
            spare -= getattr(error, "pos", len(text)) - at
            if spare < 0:
                return []
        else:
            if any(name in FIELDS for name, _ in value):  # not one that the prose quotes
                found.append(value)
        stop = _STOP.search(text, end)
    return found


def _excerpt(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")
