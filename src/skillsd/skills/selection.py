"""Which skill each task's teacher sees, and what becomes of the trajectories: Algorithm 1, lines 2 and 7. Plain Python.

    before a rollout    choose    the skill of each task's teacher, from the bank
    after it            texts     the same for contexts that are made of the group just played
    after the update    finish    uses are recorded, trajectories are summarised, and what is ready enters the bank

With several ranks, rank 0 alone has the bank: it chooses for all, and each summarises what it has played. The summaries of iteration i
enter the bank, in (task, member) order, at the first iteration boundary at which they are ready; with `rules` and `base` that is always
the next one. What a summariser returns is data: see CheckedSummariser.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

from skillsd import parallel
from skillsd.bounded import fill
from skillsd.config_errors import lacks
from skillsd.errors import ConfigError
from skillsd.skills.bank import SkillBank
from skillsd.skills.context import BankContext, GroundTruthContext, GroupContext, NoContext, PrivilegedContext
from skillsd.skills.skill import FIELDS, SKILL_TEMPLATE, Skill
from skillsd.skills.summarisers import BaseSummariser, CheckedSummariser, Finished, RulesSummariser, Summariser
from skillsd.skills.summarisers.transcript import conversation
from skillsd.trajectory import Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)
TRANSCRIPT_TEMPLATE = """\
# An earlier attempt at this task, which succeeded
{transcript}

# Your attempt
"""


class SkillSelection:
    """Chooses, records uses and summarises. The arguments are those of `SkillBankCallback`.

    Attributes:
        bank: The bank while it is open; on rank 0 alone.
        chosen: Task id -> the skill of its teacher; a task without one is not there.
        failed: Summaries that gave no skill since the run began.
        made: Summaries that gave one since this process began.
    """

    def __init__(
        self, summariser: Summariser | None, context: PrivilegedContext | None, bank_settings: dict[str, Any], min_reward: float | None,
        template: str | None, transcript_template: str | None, refresh: Literal["epoch", "iteration"],
    ) -> None:  # fmt: skip
        protocols: tuple[tuple[str, Any, Any], ...] = (("summariser", summariser, Summariser), ("context", context, PrivilegedContext))
        for key, given, protocol in protocols:
            if given is not None and (missing := lacks(given, protocol)):
                raise ConfigError(f"skills.{key}: {type(given).__qualname__} lacks {' and '.join(missing)}: write what is missing.")
        self.summariser: Summariser = summariser or RulesSummariser()
        self.checked = CheckedSummariser(self.summariser)
        self.context: PrivilegedContext = context or BankContext()
        self.bank_settings = bank_settings
        self.min_reward = -math.inf if min_reward is None else min_reward
        self.template, self.transcript_template = template or SKILL_TEMPLATE, transcript_template or TRANSCRIPT_TEMPLATE
        self.refresh = refresh
        shown = ("transcript", "actions")
        for key, text, fields in (("template", self.template, FIELDS), ("transcript_template", self.transcript_template, shown)):
            try:
                fill(text, dict.fromkeys(fields, ""))
            except ValueError as e:
                raise ConfigError(f"skills.{key}: use only {', '.join(fields)} in braces ({e}).") from e
        self.bank: SkillBank | None = None
        self.chosen: dict[str, Skill] = {}
        self.failed = self.made = 0
        self.together: Callable[[], AbstractContextManager[None]] = nullcontext
        self._hindsight: list[Finished] | None = None  # of the iteration under way, made before its update
        self._waited_s = 0.0  # seconds that training waited for summaries in this iteration
        self._ready = False

    # -- a run's beginning -------------------------------------------------------------------------------------------------

    def check_summariser(self) -> None:
        """Try the summariser before anything is written or loaded, if this run uses it. Once is enough.

        Raises:
            ConfigError: It cannot work.
        """
        if not self._ready and parallel.is_rank_zero() and not isinstance(self.context, NoContext):
            self.checked.check_ready()
        self._ready = True

    def bind(
        self,
        generate: Callable[..., list[str]],
        solution: Callable[..., Skill | None],
        together: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """What a selection may ask of the run that it belongs to.

        Args:
            generate: Answers of the untouched base model to conversations, for a summariser that needs them.
            solution: The summary of the environment's own solution of a task, for a context that needs it; None if it has none.
            together: In this context each rank may use the model as often as it likes; all ranks enter it.
        """
        self.together = together
        if isinstance(self.summariser, BaseSummariser):
            self.summariser.bind(generate)
        if isinstance(self.context, GroundTruthContext):
            self.context.bind(partial(solution, summariser=self.checked))

    # -- before a rollout, and after it ------------------------------------------------------------------------------------

    def choose(
        self, task_ids: Sequence[str], every: Sequence[str], seed: int, epoch: int, epoch_start: bool
    ) -> list[tuple[int | None, str]]:
        """The skill that conditions each task's teacher, its id in the bank and its text; (None, "") without one. Rank 0 chooses for all.

        Skills are chosen for `every` training task, anew where that is due. Between two choices a task without one may get its first skill
        late, from a slow summariser.

        Raises:
            RuntimeError: The bank has skills of a task, and its teacher would get none.
        """
        found: list[tuple[int | None, str]] = []
        with self.together():
            if parallel.is_rank_zero():
                assert self.bank is not None
                if epoch_start or self.refresh == "iteration":
                    self.chosen = {}
                for t in every:
                    skill = None if t in self.chosen else self.context(self.bank, t, every, seed, epoch)
                    if skill is not None and skill.skill_id is not None:
                        self.chosen[t] = skill
                for t in task_ids:
                    if t not in self.chosen and isinstance(self.context, BankContext) and (n := len(self.bank.skills(t))):
                        raise RuntimeError(f"task {t} has {n} skills, and its teacher got none")
                skills = [self.chosen.get(t) for t in task_ids]
                found = [(None, "") if skill is None else (skill.skill_id, self._text(skill)) for skill in skills]
        return parallel.broadcast(found)

    def texts(self, groups: Sequence[Sequence[Trajectory]], iteration: int) -> list[list[str]] | None:
        """What a `GroupContext` puts in front of each member's teacher prompt, of this rank's groups; None with one of the other kind."""
        if not isinstance(self.context, GroupContext):
            return None
        skills: dict[tuple[str, int], Skill] = {}
        if self.context.needs_skills:
            started = time.perf_counter()
            self._insert(iteration)  # summaries that were ready before are not counted among these
            self._submit(groups, iteration)
            self.checked.drain()
            self._hindsight = self.checked.collect()
            skills = {(s.task_id, s.source_member): s for finished in self._hindsight for s in finished.skills}
            self._waited_s += time.perf_counter() - started
        with self.together():  # a context may have the base model summarise
            return [[self._text(x) for x in self.context.choose(g, [skills.get((t.task_id, t.member)) for t in g])] for g in groups]

    def _text(self, shown: Skill | Trajectory | None) -> str:
        if isinstance(shown, Trajectory):
            actions = " ".join(turn.action for turn in shown.turns)
            return fill(self.transcript_template, {"transcript": conversation(shown), "actions": actions})
        return shown.render(self.template) if shown is not None else ""

    # -- after the update --------------------------------------------------------------------------------------------------

    def finish(self, groups: Sequence[TrajectoryGroup], gaps: Sequence[float], last: bool) -> dict[str, float]:
        """Book what the iteration's skills were worth, summarise its trajectories, and insert what is ready.

        Args:
            groups: All ranks' groups of the iteration.
            gaps: The outcome-aligned gap of each, nats.
            last: No iteration follows: wait for all summaries, so that the last checkpoint holds them.

        Returns:
            The skills' part of the iteration's metrics.
        """
        iteration = groups[0].trajectories[0].iteration
        for g, gap in zip(groups, gaps, strict=True):
            if self.bank is not None and g.skill_id is not None and g.counted:  # a use of which nothing is known is none
                self.bank.record_use(g.skill_id, iteration, reward=sum(t.reward for t in g.counted) / len(g.counted), gap=gap)
        started = time.perf_counter()
        if self._hindsight is None and not isinstance(self.context, NoContext):
            local = [groups[i].trajectories for i in parallel.share(len(groups))]
            self._submit(local, iteration, self.min_reward)  # what would not enter costs no summary
        if last:
            self.checked.drain()
        size = self._insert(iteration)
        waited, self._waited_s = self._waited_s + time.perf_counter() - started, 0.0
        return {"skills/bank": float(size), "skills/failed": float(self.failed), "time/summary_s": waited}

    def _submit(self, groups: Sequence[Sequence[Trajectory]], iteration: int, min_reward: float = -math.inf) -> None:
        rows = [t for g in groups for t in g if t.turns and not t.failure and t.reward >= min_reward]
        with self.together():
            self.checked.submit(iteration, rows)

    def _insert(self, iteration: int) -> int:
        """Put what is ready on any rank into the bank, in the order that one rank would; the bank's size."""
        local, self._hindsight = [*(self._hindsight or []), *self.checked.collect()], None
        every = [finished for theirs in parallel.gather(local) for finished in theirs]
        self.failed += sum(finished.n_failed for finished in every)
        self.made += sum(len(finished.skills) for finished in every)
        size = 0
        if self.bank is not None:
            for since in sorted({finished.iteration for finished in every}):
                skills = [s for f in every if f.iteration == since for s in f.skills if s.source_reward >= self.min_reward]
                self.bank.insert(sorted(skills, key=lambda s: (s.task_id, s.source_member)), iteration)
            size = len(self.bank)
        size, self.failed = parallel.broadcast((size, self.failed))
        return size
