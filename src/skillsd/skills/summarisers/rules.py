"""Skills by rule: deterministic, offline, from the trajectory alone, for any environment whose observations show its state.

Loops are cut by comparing observations: if turn j sees what turn i < j saw, the actions i..j-1 led nowhere and are left out of the
workflow. Where equal observations do not mean equal states (a REPL that answers "done" twice), set `cut_loops` to false.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from skillsd.bounded import fill
from skillsd.skills.skill import Skill
from skillsd.skills.summarisers.protocol import SynchronousSummariser
from skillsd.trajectory import Trajectory, Turn

SOLVED_SUCCESS = (
    "The attempt solved the task in {turns} turns; {kept} of them carry the solution. "
    "What worked was to settle on the whole order of actions before the first one and to follow it to the end without detours."
)
SOLVED_MISTAKES = (
    "{blocked} turns changed nothing and {loops} times the attempt came back to a situation it had seen before, so {cut} turns were "
    "wasted. Check that an action is possible before taking it, and do not undo what was just done."
)
SOLVED_WORKFLOW = (
    "These actions in this order, with every detour left out, lead from the start to the solution; "
    "check after each that the situation is as expected: {workflow}"
)
UNSOLVED_SUCCESS = (
    "The attempt did not solve the task: after {turns} turns {completion:.0%} of it was done. Success needs an order of actions that "
    "does the hardest part first and never makes a later part impossible; plan it fully before acting."
)
UNSOLVED_MISTAKES = (
    "{blocked} turns changed nothing, {loops} times the attempt came back to a situation it had seen before, and it then ended unsolved. "
    "The likely causes are acting before the plan is complete and repeating what had already failed."
)
UNSOLVED_WORKFLOW = (
    "No solution is known yet. The attempt below, with its detours left out, FAILED, so do not repeat it as a whole: find the first action "
    "after which the task could no longer be finished and act differently there. Failed attempt: {workflow}"
)


@dataclass(frozen=True)
class Digest:
    """What the rules see in an episode.

    Args:
        actions: The actions that remain after loops are cut, in order.
        kept: Turns that remain.
        blocked: Turns whose next observation is the same; the last turn has no next one and is never counted.
        loops: Returns to an earlier observation that was left in between.
        unparsed: Turns whose answer did not match the action pattern.
    """

    actions: tuple[str, ...]
    kept: int
    blocked: int
    loops: int
    unparsed: int


class RulesSummariser(SynchronousSummariser):
    """Fills templates (`bounded.fill`) from the counts of an episode.

    Fields of every template: {completion} (0..1), {turns}, {kept} (turns left after cutting loops), {cut} (turns - kept), {blocked} (turns
    that changed nothing), {loops} (returns to an earlier situation), {unparsed} (answers without an action), {workflow} (the kept actions,
    joined). A template may be a single word; one that gives a blank text makes the summary fail.

    Args:
        joiner: Put between the actions of the workflow.
        action_pattern: Regular expression that finds the action in an answer: its last match counts, group 1 if it has groups. Answers
            without a match are left out of the workflow. None: the whole answer, stripped.
        observation_pattern: The same for the part of an observation that shows the state (the whole observation if it does not match).
        cut_loops: True if equal observations mean equal states.
        solved_success: Template of success_analysis when solved.
        solved_mistakes: Template of mistake_analysis when solved.
        solved_workflow: Template of golden_workflow when solved.
        unsolved_success: Template of success_analysis when not solved.
        unsolved_mistakes: Template of mistake_analysis when not solved.
        unsolved_workflow: Template of golden_workflow when not solved; it should not present the failed actions as golden.

    Raises:
        ValueError: A template or a pattern is malformed.
    """

    def __init__(
        self,
        joiner: str = ", ",
        action_pattern: str | None = None,
        observation_pattern: str | None = None,
        cut_loops: bool = True,
        solved_success: str = SOLVED_SUCCESS,
        solved_mistakes: str = SOLVED_MISTAKES,
        solved_workflow: str = SOLVED_WORKFLOW,
        unsolved_success: str = UNSOLVED_SUCCESS,
        unsolved_mistakes: str = UNSOLVED_MISTAKES,
        unsolved_workflow: str = UNSOLVED_WORKFLOW,
    ) -> None:
        self.joiner = joiner
        self.cut_loops = cut_loops
        self._action = _compiled("action_pattern", action_pattern)
        self._observation = _compiled("observation_pattern", observation_pattern)
        self._solved = (solved_success, solved_mistakes, solved_workflow)
        self._unsolved = (unsolved_success, unsolved_mistakes, unsolved_workflow)
        for template in (*self._solved, *self._unsolved):
            try:
                self._fill(template, Digest(("a",), 1, 0, 0, 0), 1, 1.0)
            except ValueError as error:
                raise ValueError(f"rules template {template!r} cannot be filled ({error}): see RulesSummariser for its fields") from error

    def summarise(self, trajectories: Sequence[Trajectory]) -> list[Skill | None]:
        """One skill per trajectory; None where a text came out blank (an episode without turns, or without any action)."""
        summaries: list[Skill | None] = []
        for trajectory in trajectories:
            try:
                skill = self.summarise_one(trajectory.turns, trajectory.success, trajectory.completion)
            except ValueError:
                summaries.append(None)
            else:
                summaries.append(skill.of(trajectory))
        return summaries

    def summarise_one(self, turns: Sequence[Turn], success: bool, completion: float) -> Skill:
        """The skill of one episode, without a source: what a model may be pre-trained to read.

        Args:
            turns: Observation before and answer, turn by turn.
            success: True if the task was solved.
            completion: Share that was completed, 0..1.

        Raises:
            ValueError: A text came out blank.
        """
        if not turns:
            raise ValueError("an episode without turns has nothing to summarise")
        digest = self.digest(turns)
        templates = self._solved if success else self._unsolved
        well, badly, workflow = (self._fill(template, digest, len(turns), completion) for template in templates)
        return Skill(well, badly, workflow)

    def digest(self, turns: Sequence[Turn]) -> Digest:
        """Cuts the loops and counts."""
        states = [_extract(self._observation, turn.observation) or turn.observation for turn in turns]
        actions = [_extract(self._action, turn.action) for turn in turns]
        blocked = loops = 0
        path: list[int] = []  # turns that remain
        place: dict[str, int] = {}  # state -> index on the path
        for at, state in enumerate(states):
            if at and state == states[at - 1]:
                blocked += 1
            elif state in states[:at]:
                loops += 1
            if self.cut_loops and state in place:
                keep = place[state]
                for undone in path[keep:]:
                    del place[states[undone]]
                del path[keep:]
            place[state] = len(path)
            path.append(at)
        return Digest(
            actions=tuple(action for at in path if (action := actions[at])),
            kept=len(path),
            blocked=blocked,
            loops=loops,
            unparsed=sum(not action for action in actions),
        )

    def _fill(self, template: str, digest: Digest, turns: int, completion: float) -> str:
        values = {
            "completion": float(completion), "turns": turns, "kept": digest.kept, "cut": turns - digest.kept, "blocked": digest.blocked,
            "loops": digest.loops, "unparsed": digest.unparsed, "workflow": self.joiner.join(digest.actions),
        }  # fmt: skip
        return fill(template, values)


def _compiled(name: str, pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{name} {pattern!r} is no regular expression: {error}") from error


def _extract(pattern: re.Pattern[str] | None, text: str) -> str:
    if pattern is None:
        return text.strip()
    found = ""
    for match in pattern.finditer(text):
        found = (match.group(1) if pattern.groups else match.group()) or ""
    return found.strip()
