"""The analyst's prompt: a conversation and its outcome in, one JSON object or one text out. It never holds a ground truth; a trajectory
has none."""

from __future__ import annotations

from collections.abc import Sequence

from skillsd.skills.skill import FIELDS
from skillsd.trajectory import Trajectory

SYSTEM_PROMPT = (
    "You are an analyst of agent trajectories. You read what an agent saw and did on a task, and you write down, briefly, "
    "what would help it to do better at the same task next time."
)

USER_PROMPT = """\
Here is one attempt of an agent at a task.

<conversation>
{conversation}
</conversation>

Result: {result}
Number of steps: {steps}
Completion rate: {completion:.0%}

Answer with one JSON object and nothing else. It has exactly these three fields, each a string of about 40 to 70 words:
- "success_analysis": the strategic intent that led to success, or that would have led to it.
- "mistake_analysis": the root causes of failures and inefficiencies, not a list of their symptoms.
- "golden_workflow": the ideal overall process for this task, from start to end.

How to write:
- Be concise. Guide rather than dictate: give intent and reasons, not a script to copy.
- Dwell on the steps that confused the agent, and say how to see through them.
- Let the completion rate set the balance: near 100% write mostly about what succeeded, near 0% mostly about what went wrong.
- Use only what the conversation shows. Do not invent facts about the task.

{{"success_analysis": "...", "mistake_analysis": "...", "golden_workflow": "..."}}
"""
"""Default template (str.format): {conversation}, {result} (`solved` or `not solved`), {steps} (turns), {completion} (0..1)."""

FIELD_PROMPT = """\
Here is one attempt of an agent at a task.

<conversation>
{conversation}
</conversation>

Result: {result}
Number of steps: {steps}
Completion rate: {completion:.0%}

{question}
Answer in one paragraph of plain text, about 40 to 70 words. Use only what the conversation shows.
"""
"""Default template for one field at a time: the fields of `USER_PROMPT`, and {question}."""

FIELD_QUESTIONS = dict(
    zip(
        FIELDS,
        (
            "What was the intent that led to success, or that would have led to it?",
            "What were the root causes of the failures and detours, and how are they avoided next time?",
            "What is the ideal overall process for this task, from start to end?",
        ),
        strict=True,
    )
)
"""What is asked for each field of a skill."""

MIN_KEPT = 200
"""Characters to which an observation may be shortened, an answer to twice as many; beyond that whole turns are left out."""

MIN_CHARS = 1000
"""The smallest budget of a conversation."""


def analyst_messages(
    trajectory: Trajectory, template: str = USER_PROMPT, system: str = SYSTEM_PROMPT, max_chars: int = 24_000, question: str | None = None
) -> list[dict[str, str]]:
    """The chat that asks for a skill of `trajectory`, or for one field of it.

    Args:
        trajectory: The finished episode.
        template: The request, see `USER_PROMPT` and `FIELD_PROMPT`.
        system: The role; empty for models without a system message.
        max_chars: Budget of the conversation inside the request, in characters.
        question: What fills {question}, if the template has it.
    """
    text = conversation(trajectory, max_chars)
    request = _fill(template, text, trajectory.success, len(trajectory.turns), trajectory.completion, question)
    messages = [{"role": "user", "content": request}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def check_prompt(template: str, max_chars: int, question: str | None = None) -> None:
    """Raises ValueError if the template cannot be filled, leaves the conversation or the question out, or the budget is too small."""
    fields = ["conversation", "result", "steps", "completion", *(["question"] if question is not None else [])]
    try:
        request = _fill(template, "\0", True, 1, 1.0, None if question is None else "\1")
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(
            f"summary template cannot be filled ({error!r}): its fields are {', '.join(fields)}; double other braces"
        ) from error
    if "\0" not in request:
        raise ValueError("summary template has no {conversation}")
    if question is not None and "\1" not in request:
        raise ValueError("summary template has no {question}, which asks for one field")
    if max_chars < MIN_CHARS:
        raise ValueError(f"max_chars must be >= {MIN_CHARS}, got {max_chars}")


def _fill(template: str, text: str, success: bool, steps: int, completion: float, question: str | None) -> str:
    more = {} if question is None else {"question": question}
    result = "solved" if success else "not solved"
    return template.format(conversation=text, result=result, steps=steps, completion=float(completion), **more)


def conversation(trajectory: Trajectory, max_chars: int = 24_000) -> str:
    """The episode as text of at most `max_chars` (>= 1000) characters. Each cut leaves a notice.

    The instruction and the first observation say what the task is: they stay whole while they take at most half of the budget, or
    the rest leaves them room; else the longer of the two is cut in its middle. Of the rest the longest texts are cut in their middle,
    observations to half the length of answers, which hold what was done. If that is not enough, turns in the middle are left out, never
    the first or the last.
    """
    texts = [trajectory.instruction, *(text for turn in trajectory.turns for text in (turn.observation, turn.action))]
    room = max_chars - len("\n\n".join(_blocks(texts))) + sum(map(len, texts))  # without the headings
    task, rest = texts[:2], texts[2:]
    limit = _limit(task, [1] * len(task), max(max_chars // 2, room - sum(map(len, rest))), 1)
    task = [shorten(text, limit) for text in task]
    weights = [2 - at % 2 for at in range(len(rest))]  # answer, observation, answer, ...
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
    """The instruction unless it is empty, then the turns, each under its headings."""
    blocks = [f"[Instruction]\n{texts[0]}"] if texts[0] else []
    pairs = zip(texts[1::2], texts[2::2], strict=True)
    return blocks + [f"[Turn {n}: environment]\n{seen}\n[Turn {n}: agent]\n{done}" for n, (seen, done) in enumerate(pairs, 1)]


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


def _limit(texts: Sequence[str], weights: Sequence[int], room: int, least: int) -> int:
    """The largest limit, at least `least`, under which texts cut to weight x limit have at most `room` characters in all."""
    low, high = least, max([least, *map(len, texts)])
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(len(text), weight * middle) for text, weight in zip(texts, weights, strict=True)) <= room:
            low = middle
        else:
            high = middle - 1
    return low
