"""From an answer to moves and back."""

import re

from skillsd_sokoban.solve import MOVES

FENCE = "```"
FORMATS = ("fenced", "bare")
_NUMBER = {name: number for number, name in enumerate(MOVES)}
# Whole words: neither "setup" nor "set-up" is "up".
_WORD = re.compile(r"(?<![\w-])(?:up|down|left|right)(?![\w-])", re.IGNORECASE)
_GAP = re.compile(r"[^\w]*\Z")


class Actions:
    """Reads answers of up to `limit` moves (indices into MOVES) in one of FORMATS.

    fenced: the last span between triple backticks holds the moves; any other words in it are ignored, more than `limit` moves are refused.
    bare: the moves are the last unbroken run of move words in the answer; of more than `limit`, the last.
    """

    def __init__(self, action_format: str, limit: int) -> None:
        self._fenced, self._limit = action_format == "fenced", limit
        words = "up, down, left or right"
        if limit == 1:
            self.accepted = f"end with one of {words}"
            if self._fenced:
                self.accepted = f"end with a single action between triple backticks, one of {words}, for example {FENCE}up{FENCE}"
        else:
            self.accepted = f"end with 1 to {limit} actions, separated by spaces, each one of {words}"
            if self._fenced:
                self.accepted = (
                    f"end with 1 to {limit} actions between triple backticks, separated by spaces, each one of {words}, "
                    f"for example {FENCE}up left{FENCE}"
                )
        self._exact = {self.text([move]): [move] for move in range(len(MOVES))}

    def read(self, answer: str) -> list[int] | None:
        """The moves of an answer, None if it cannot be read."""
        moves = self._exact.get(answer)
        if moves is not None:
            return moves
        if self._fenced:
            parts = answer.rsplit(FENCE, 2)
            moves = [_NUMBER[word.lower()] for word in _WORD.findall(parts[1])] if len(parts) == 3 else []
            return moves if 1 <= len(moves) <= self._limit else None
        return self._last_run(answer) or None

    def text(self, moves: list[int]) -> str:
        """A full valid answer for one turn: `moves`, at most `limit`."""
        words = " ".join([MOVES[move] for move in moves])
        return f"{FENCE}{words}{FENCE}" if self._fenced else words

    def _last_run(self, answer: str) -> list[int]:
        run: list[int] = []
        end = 0
        for match in _WORD.finditer(answer):
            if run and not _GAP.match(answer[end : match.start()]):
                run = []
            run.append(_NUMBER[match[0].lower()])
            end = match.end()
        return run[-self._limit :]
