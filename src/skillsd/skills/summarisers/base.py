"""Skills from the policy's own base model: the adapters are off, nothing leaves the machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

from skillsd.bounded import one_line
from skillsd.skills.skill import FIELDS, MAX_ANSWER_FIELD_CHARS, Skill, without_thoughts
from skillsd.skills.summarisers.prompt import FIELD_PROMPT, FIELD_QUESTIONS, SYSTEM_PROMPT, USER_PROMPT, analyst_messages, check_prompt
from skillsd.skills.summarisers.protocol import SynchronousSummariser
from skillsd.trajectory import Trajectory

log = logging.getLogger(__name__)

SeedKey = tuple[int, int, str, int] | tuple[int, int, str, int, str]
"""(run seed, iteration, task_id, member), and the field asked for if it is one: names the noise of one answer, whatever batch it is
sampled in."""

Generate = Callable[[list[list[dict[str, str]]], int, list[SeedKey]], list[str]]
"""(conversations, max_new_tokens, seed_keys) -> one answer each, in order."""


class BaseSummariser(SynchronousSummariser):
    """Asks the base model. The module hands over its generator with `bind` before the first use.

    Args:
        max_new_tokens: Longest answer, in tokens.
        batch_size: Conversations per call of the generator; None: all at once.
        template: The request, see `prompt.USER_PROMPT` (`json`) and `prompt.FIELD_PROMPT` (`fields`); None: the one of the form.
        system: The role; empty for none.
        max_chars: Budget of the conversation, in characters.
        form: `json` asks once, for one JSON object. `fields` asks three times, for one text each: small models rarely write the object.
        questions: With `fields`, other questions by field; a field left out keeps that of `prompt.FIELD_QUESTIONS`.

    Raises:
        ValueError: A setting is out of range, or the template cannot be filled.
    """

    def __init__(
        self,
        max_new_tokens: int = 512,
        batch_size: int | None = None,
        template: str | None = None,
        system: str = SYSTEM_PROMPT,
        max_chars: int = 24_000,
        form: Literal["json", "fields"] = "json",
        questions: dict[str, str] | None = None,
    ) -> None:
        if max_new_tokens < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError("max_new_tokens and batch_size must be >= 1")
        if form not in ("json", "fields"):
            raise ValueError(f"form is {form!r}: one of json, fields")
        if questions and form == "json":
            raise ValueError("questions are asked by field: set form to fields")
        if unknown := set(questions or {}) - set(FIELDS):
            raise ValueError(f"questions names {', '.join(sorted(unknown))}: the fields are {', '.join(FIELDS)}")
        self.questions = {**FIELD_QUESTIONS, **(questions or {})} if form == "fields" else {}
        self.template = template or (FIELD_PROMPT if form == "fields" else USER_PROMPT)
        check_prompt(self.template, max_chars, "" if form == "fields" else None)
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.system = system
        self.max_chars = max_chars
        self.last_error = ""
        """Why the latest failed summary failed."""
        self._generate: Generate | None = None

    def bind(self, generate: Generate) -> None:
        """Sets the generator: the same base model with its adapters off."""
        self._generate = generate

    def summarise(self, trajectories: Sequence[Trajectory]) -> list[Skill | None]:
        """One skill per trajectory; None where the answer was not the JSON asked for, or that for a field blank or too long.

        Raises:
            RuntimeError: No generator is bound, or it returned another number of answers.
        """
        if self._generate is None:
            raise RuntimeError("BaseSummariser has no model yet: call bind(generate) first")
        requests = [request for trajectory in trajectories for request in self._requests(trajectory)]
        size = self.batch_size or max(1, len(requests))
        answers: list[str] = []
        for start in range(0, len(requests), size):
            messages, keys = map(list, zip(*requests[start : start + size], strict=True))
            batch = self._generate(messages, self.max_new_tokens, keys)
            if len(batch) != len(messages):
                raise RuntimeError(f"the generator returned {len(batch)} answers to {len(messages)} conversations")
            answers += batch
        each = len(self.questions) or 1
        return [self._skill(answers[at * each : (at + 1) * each], trajectory) for at, trajectory in enumerate(trajectories)]

    def _requests(self, t: Trajectory) -> list[tuple[list[dict[str, str]], SeedKey]]:
        """The conversations that make one skill, and the name of each one's noise."""

        def messages(question: str | None = None) -> list[dict[str, str]]:
            return analyst_messages(t, self.template, self.system, self.max_chars, question)

        if not self.questions:
            return [(messages(), (t.seed, t.iteration, t.task_id, t.member))]
        return [(messages(question), (t.seed, t.iteration, t.task_id, t.member, name)) for name, question in self.questions.items()]

    def _skill(self, answers: Sequence[str], trajectory: Trajectory) -> Skill | None:
        try:
            if not self.questions:
                return Skill.parse(answers[0]).of(trajectory)
            success, mistakes, workflow = (without_thoughts(answer).strip() for answer in answers)
            return Skill(success, mistakes, workflow).admitted(MAX_ANSWER_FIELD_CHARS).of(trajectory)
        except ValueError as error:
            self.last_error = str(error)
            log.info("no skill from %s, member %d: %s", one_line(trajectory.task_id), trajectory.member, error)
            return None
