"""An episode as text within a budget of characters: shortened in the middle, never where the task is said or where it ends."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from skillsd.trajectory import Trajectory

MIN_CHARS = 1000
"""The smallest budget of a conversation."""
MIN_KEPT = 200
"""Characters to which an observation may be shortened, an answer to twice as many; beyond that whole turns are left out."""


def conversation(trajectory: Trajectory, max_chars: int = 24_000) -> str:
    """The episode as text of at most `max_chars` (>= 1000) characters. Each cut leaves a notice.

    The instruction and the first observation say what the task is: they stay whole while they take at most half of the budget, or
    the rest leaves them room; else the longer of the two is cut in its middle. Of the rest the longest texts are cut in their middle,
    observations to half the length of answers, which hold what was done. If that is not enough, turns in the middle are left out, never
    the first or the last. What the environment answered to the last action stands at the end: a game says there how it ended.
    """
    texts = [trajectory.instruction, *(text for turn in trajectory.turns for text in (turn.observation, turn.action))]
    if trajectory.turns and trajectory.final_observation is not None:
        texts.append(trajectory.final_observation)
    room = max_chars - len("\n\n".join(_blocks(texts))) + sum(map(len, texts))  # without the headings
    task, rest = texts[:2], texts[2:]
    limit = _limit(task, [1] * len(task), max(max_chars // 2, room - sum(map(len, rest))), 1)
    task = [shorten(text, limit) for text in task]
    weights = [2 - at % 2 for at in range(len(rest))]  # answer, observation, answer, ..., perhaps the final observation
    limit = _limit(rest, weights, room - sum(map(len, task)), min(MIN_KEPT, max_chars // 20))
    rest = [shorten(text, limit * weight) for text, weight in zip(rest, weights, strict=True)]
    return _without_middle(_blocks([*task, *rest]), 1 + bool(trajectory.instruction), max_chars)


def shorten(text: str, limit: int) -> str:
    """`text` if it has at most `limit` characters, else its two ends with a notice between, still within the limit if that is >= 40."""
    if len(text) <= limit:
        return text
    room = max(0, limit - 40)  # the notice is shorter than 40 characters
    head = room - room // 2
    return f"{text[:head]}\n[{len(text) - room} characters left out]\n{text[len(text) - room // 2 :]}"


def _blocks(texts: Sequence[str]) -> list[str]:
    """The instruction unless it is empty, then the turns, each under its headings; a final observation is in the last turn's block."""
    blocks = [f"[Instruction]\n{texts[0]}"] if texts[0] else []
    pairs = zip(texts[1::2], texts[2::2], strict=False)
    blocks += [f"[Turn {n}: environment]\n{seen}\n[Turn {n}: agent]\n{action}" for n, (seen, action) in enumerate(pairs, 1)]
    if len(texts) % 2 == 0:
        blocks[-1] += f"\n[After the last turn: environment]\n{texts[-1]}"
    return blocks


def _without_middle(blocks: list[str], first: int, max_chars: int) -> str:
    """The blocks joined; over budget, without as many in the middle as it takes. The `first` ones and the last are assumed to fit."""
    text = "\n\n".join(blocks)
    if len(text) <= max_chars:
        return text
    head, last, shift = first, len(blocks), first - 1  # kept: blocks[:head] and blocks[last:]
    room = max_chars - len("\n\n".join(blocks[:first])) - len(f"\n\n[turns {last} to {last} left out]")
    while head < last:
        from_end = len(blocks) - last <= head - first  # the last one first, then by turns
        room -= len(blocks[last - 1 if from_end else head]) + 2
        if room < 0:
            break
        head, last = (head, last - 1) if from_end else (head + 1, last)
    return "\n\n".join([*blocks[:head], f"[turns {head - shift + 1} to {last - shift} left out]", *blocks[last:]])


def _limit(texts: Sequence[str], weights: Sequence[int], room: int, minimum: int) -> int:
    """The largest limit, at least `minimum`, under which texts cut to weight x limit have at most `room` characters in all."""

    def length(limit: int) -> int:
        return sum(min(len(text), weight * limit) for text, weight in zip(texts, weights, strict=True))

    limits = range(minimum + 1, max([minimum, *map(len, texts)]) + 1)
    return minimum + bisect_right(limits, room, key=length)
