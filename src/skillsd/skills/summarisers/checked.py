"""What stands between any summariser and the bank: its errors are counted, and what it returns is data of the expected shape or nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from skillsd.bounded import one_line
from skillsd.errors import ConfigError, causes
from skillsd.skills.skill import Skill
from skillsd.skills.summarisers.protocol import Finished, Summariser, in_order
from skillsd.trajectory import Trajectory

log = logging.getLogger(__name__)
_BLANK = Skill("-", "-", "-")


class CheckedSummariser:
    """A summariser, ours or a third party's, held to its contract.

    Only the three texts of a skill are believed, within `skill.MAX_CHARS`: task, source and reward are those of the trajectory that was
    submitted. A summary that is missing, surplus, given twice or of another type counts as failed or is left out; so does a whole
    submission if the summariser raises. Only ConfigError goes on, as it is the user's business. A synchronous summariser that hangs
    holds up training: an asynchronous one must end by itself.

    Args:
        inner: The summariser.
    """

    def __init__(self, inner: Summariser) -> None:
        self.inner, self.asynchronous = inner, bool(inner.asynchronous)
        self._open: dict[int, dict[tuple[str, int], Skill]] = {}  # iteration -> (task, member) -> a skill of that source without texts
        self._lost: list[Finished] = []
        self._error = ""  # why the latest call failed as a whole

    def check_ready(self) -> None:
        """Ask a summariser that has a method `check_ready` whether it can work, before a run starts.

        Raises:
            ConfigError: It cannot.
        """
        check = getattr(self.inner, "check_ready", None)
        try:
            if callable(check):
                check()
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"skills.summariser: {type(self.inner).__name__}.check_ready() failed: {causes(error)}") from error

    @property
    def last_error(self) -> str:
        """Why the latest failed summary failed, if it is known: a summariser may note it in an attribute of this name."""
        return self._error or str(getattr(self.inner, "last_error", ""))

    def summarise(self, trajectories: Sequence[Trajectory]) -> list[Skill | None]:
        """One skill per trajectory, None where it failed; all None if it raises or returns another number."""
        given: list[Skill | None] = self._tried("summarise", lambda: list(self.inner.summarise(trajectories)), [])
        if len(given) != len(trajectories):
            log.warning("the summariser returned %d summaries of %d trajectories: none is taken", len(given), len(trajectories))
            given = [None] * len(trajectories)
        return [_taken(skill, _BLANK.of(t)) for skill, t in zip(given, trajectories, strict=True)]

    def submit(self, iteration: int, trajectories: Sequence[Trajectory]) -> None:
        """As `Summariser.submit`."""
        self._open[iteration] = {(t.task_id, t.member): _BLANK.of(t) for t in in_order(trajectories)}
        if self._tried("submit", partial(self.inner.submit, iteration, trajectories), self) is self:
            self._lost.append(Finished(iteration, [], len(self._open.pop(iteration))))

    def collect(self) -> list[Finished]:
        """What is ready. The failures are counted here: what was submitted, less what is taken."""
        ready, self._lost = self._lost, []
        given: list[Finished] = self._tried("collect", lambda: list(self.inner.collect()), [])
        for item in given:
            try:
                iteration, skills, _ = item
                sources, rows = self._open[iteration], [s for s in skills if isinstance(s, Skill)]
                by_source = {(s.task_id, s.source_member): s for s in reversed(rows)}  # the first of several
            except (TypeError, ValueError, KeyError):
                log.warning("the summariser returned what was not submitted, or is no Finished: it is left out")
                continue
            del self._open[iteration]
            skills = [s for key, source in sources.items() if (s := _taken(by_source.get(key), source)) is not None]
            ready.append(Finished(iteration, skills, len(sources) - len(skills)))
        return ready

    def drain(self) -> None:
        """As `Summariser.drain`."""
        self._tried("drain", self.inner.drain, None)

    def close(self) -> None:
        """As `Summariser.close`."""
        self._tried("close", self.inner.close, None)

    def _tried(self, what: str, call: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return call()
        except ConfigError:
            raise
        except Exception as error:  # whatever it is, training goes on
            self._error = causes(error)[:500]
            log.warning("the summariser failed in %s (%s); its summaries count as failed", what, self._error)
            return otherwise


def _taken(given: object, source: Skill) -> Skill | None:
    """The texts of what was given with the source that is known; None if it is no skill, or one that no bank may hold."""
    if not isinstance(given, Skill):
        return None
    try:
        return source.with_texts(Skill.admitted(given).texts)
    except ValueError as error:
        log.info("no skill from %s, member %d: %s", one_line(source.task_id), source.source_member, error)
        return None
