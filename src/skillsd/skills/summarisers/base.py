"""Skills from the policy's own base model: the adapters are off, nothing leaves the machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from skillsd.skills.skill import Skill
from skillsd.skills.summarisers.prompt import SYSTEM_PROMPT, USER_PROMPT, analyst_messages, check_prompt
from skillsd.skills.summarisers.protocol import Synchronous
from skillsd.trajectory import Trajectory

log = logging.getLogger(__name__)

SeedKey = tuple[int, int, str, int]
"""(run seed, iteration, task_id, member): names the noise of one answer, whatever batch it is sampled in."""

Generate = Callable[[list[list[dict[str, str]]], int, list[SeedKey]], list[str]]
"""(conversations, max_new_tokens, seed_keys) -> one answer each, in order."""


class BaseSummariser(Synchronous):
    """Asks the base model. The module hands over its generator with `bind` before the first use.

    Args:
        max_new_tokens: Longest answer, in tokens.
        batch_size: Conversations per call of the generator; None: all at once.
        template: The request, see `prompt.USER_PROMPT`.
        system: The role; empty for none.
        max_chars: Budget of the conversation, in characters.

    Raises:
        ValueError: A setting is out of range, or the template cannot be filled.
    """

    def __init__(
        self,
        max_new_tokens: int = 512,
        batch_size: int | None = None,
        template: str = USER_PROMPT,
        system: str = SYSTEM_PROMPT,
        max_chars: int = 24_000,
    ) -> None:
        super().__init__()
        if max_new_tokens < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError("max_new_tokens and batch_size must be >= 1")
        check_prompt(template, max_chars)
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.template = template
        self.system = system
        self.max_chars = max_chars
        self._generate: Generate | None = None

    def bind(self, generate: Generate) -> None:
        """Sets the generator: the same base model with its adapters off."""
        self._generate = generate

    def summarise(self, trajectories: Sequence[Trajectory]) -> list[Skill | None]:
        """One skill per trajectory; None where the answer was not the JSON asked for.

        Raises:
            RuntimeError: No generator is bound, or it returned another number of answers.
        """
        if self._generate is None:
            raise RuntimeError("BaseSummariser has no model yet: call bind(generate) first")
        size = self.batch_size or max(1, len(trajectories))
        summaries: list[Skill | None] = []
        for start in range(0, len(trajectories), size):
            batch = trajectories[start : start + size]
            messages = [analyst_messages(trajectory, self.template, self.system, self.max_chars) for trajectory in batch]
            keys = [(t.seed, t.iteration, t.task_id, t.member) for t in batch]
            answers = self._generate(messages, self.max_new_tokens, keys)
            if len(answers) != len(batch):
                raise RuntimeError(f"the generator returned {len(answers)} answers to {len(batch)} conversations")
            summaries += [_parsed(answer, trajectory) for answer, trajectory in zip(answers, batch, strict=True)]
        return summaries


def _parsed(answer: str, trajectory: Trajectory) -> Skill | None:
    try:
        return Skill.parse(answer).of(trajectory)
    except ValueError as error:
        log.info("no skill from %s, member %d: %s", trajectory.task_id, trajectory.member, error)
        return None
