"""Other ways to write a Sokoban skill down than as moves: as pushes, or as sub-goals. The nano agent has to be taught to read them.

cd docs/results/sokoban-nano-search
PYTHONPATH=. skillsd fit -c pretrain/nano-recover -c read_pushes.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skillsd.skills import RulesSummariser
from skillsd.skills.summarisers.rules import Digest
from skillsd.trajectory import Turn

STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


class Pushes(RulesSummariser):
    """The workflow names every push by the box's cell and the direction: `1 3 left , 3 2 up`. Rows and columns count from the wall, 0."""

    def digest(self, turns: Sequence[Turn]) -> Digest:
        """That of the moves, with pushes in the place of the moves that remain."""
        found = [f"{r} {c} {way}" for (r, c), _, way in self.pushes(turns)]
        return replace(super().digest(turns), actions=tuple(found))

    def pushes(self, turns: Sequence[Turn]) -> list[tuple[tuple[int, int], tuple[int, int], str]]:
        """(the box's cell before, after, direction) of each push that remains when loops are cut."""
        path: list[Turn] = []
        for turn in turns:
            seen = [t.observation for t in path]
            if turn.observation in seen:
                del path[seen.index(turn.observation) :]
            path.append(turn)
        return [push for turn in path if (push := _push(turn.observation, turn.action))]


class SubGoals(Pushes):
    """The workflow names where each box goes, pushes of one box in a row together: `1 3 to 1 1 , 3 2 to 2 2`."""

    def digest(self, turns: Sequence[Turn]) -> Digest:
        """That of the moves, with sub-goals in the place of the moves that remain."""
        goals: list[list[tuple[int, int]]] = []
        for start, end, _ in self.pushes(turns):
            if goals and goals[-1][1] == start:
                goals[-1][1] = end
            else:
                goals.append([start, end])
        found = [f"{a} {b} to {c} {d}" for (a, b), (c, d) in goals]
        return replace(RulesSummariser.digest(self, turns), actions=tuple(found))


def _push(observation: str, action: str) -> tuple[tuple[int, int], tuple[int, int], str] | None:
    """What the move pushes; None if it pushes nothing, or is no move."""
    if action not in STEPS:
        return None
    board = [line for line in observation.splitlines() if line and set(line) <= set("#_OXPTS")]
    (row, col), (dr, dc) = next((r, c) for r, line in enumerate(board) for c, x in enumerate(line) if x in "PS"), STEPS[action]
    box, beyond = (row + dr, col + dc), (row + 2 * dr, col + 2 * dc)
    if board[box[0]][box[1]] not in "XT" or board[beyond[0]][beyond[1]] not in "_O":
        return None
    return box, beyond, action
