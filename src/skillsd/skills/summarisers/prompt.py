"""The analyst's prompt: a conversation and its outcome in, one JSON object out. It never holds a ground truth; a trajectory has none."""

from __future__ import annotations

from collections.abc import Sequence

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

MIN_KEPT = 200
"""Characters to which a single text may be shortened; beyond that whole turns are left out."""


def analyst_messages(
    trajectory: Trajectory, template: str = USER_PROMPT, system: str = SYSTEM_PROMPT, max_chars: int = 24_000
) -> list[dict[str, str]]:
    """The chat that asks for a skill of `trajectory`.

    Args:
        trajectory: The finished episode.
        template: The request, see `USER_PROMPT`.
        system: The role; empty for models without a system message.
        max_chars: Budget of the conversation inside the request, in characters.
    """
    request = _fill(template, conversation(trajectory, max_chars), trajectory.success, len(trajectory.turns), trajectory.completion)
    messages = [{"role": "user", "content": request}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def check_prompt(template: str, max_chars: int) -> None:
    """Raises ValueError if the template cannot be filled, leaves the conversation out, or the budget holds no conversation."""
    try:
        request = _fill(template, "\0", True, 1, 1.0)
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(
            f"summary template cannot be filled ({error!r}): its fields are conversation, result, steps, completion; double other braces"
        ) from error
    if "\0" not in request:
        raise ValueError("summary template has no {conversation}")
    if max_chars < 1000:
        raise ValueError(f"max_chars must be >= 1000, got {max_chars}")


def _fill(template: str, text: str, success: bool, steps: int, completion: float) -> str:
    result = "solved" if success else "not solved"
    return template.format(conversation=text, result=result, steps=steps, completion=float(completion))


def conversation(trajectory: Trajectory, max_chars: int = 24_000) -> str:
    """The episode as text of at most about `max_chars` characters.

    Over budget, the longest observations are shortened in their middle first; then the instruction and the answers as well; then turns in
    the middle are left out. Each cut leaves a notice.
    """
    instruction, turns = trajectory.instruction, [(turn.observation, turn.action) for turn in trajectory.turns]
    fixed = _length(instruction, [("", action) for _, action in turns])
    limit = _limit([observation for observation, _ in turns], max_chars - fixed)
    turns = [(shorten(observation, limit), action) for observation, action in turns]
    if _length(instruction, turns) > max_chars:
        texts = [instruction, *(text for turn in turns for text in turn)]
        limit = _limit(texts, max_chars - _length("", [("", "")] * len(turns)))
        instruction, turns = shorten(instruction, limit), [(shorten(seen, limit), shorten(done, limit)) for seen, done in turns]
    blocks = [_block(number, *turn) for number, turn in enumerate(turns, 1)]
    head, tail = blocks, list[str]()
    if _length(instruction, turns) > max_chars:
        room = max_chars - len(instruction)
        keep = max(2, int(len(blocks) * room / max(1, sum(map(len, blocks)))))
        if keep < len(blocks):
            first = (keep + 1) // 2
            notice = f"[turns {first + 1} to {len(blocks) - (keep - first)} left out]"
            head, tail = [*blocks[:first], notice], blocks[len(blocks) - (keep - first) :]
    return "\n\n".join([*([f"[Instruction]\n{instruction}"] if instruction else []), *head, *tail])


def shorten(text: str, limit: int) -> str:
    """`text` if it has at most `limit` characters, else its two ends with a notice between, still within the limit if that is >= 60."""
    if len(text) <= limit:
        return text
    room = max(0, limit - 40)  # the notice is shorter than 40 characters
    head = room - room // 2
    return f"{text[:head]}\n[{len(text) - room} characters left out]\n{text[len(text) - room // 2 :]}"


def _block(number: int, observation: str, action: str) -> str:
    return f"[Turn {number}: environment]\n{observation}\n[Turn {number}: agent]\n{action}"


def _length(instruction: str, turns: Sequence[tuple[str, str]]) -> int:
    return len(instruction) + 20 + sum(len(_block(number, *turn)) + 2 for number, turn in enumerate(turns, 1))


def _limit(texts: Sequence[str], room: int) -> int:
    """The largest limit, at least MIN_KEPT, under which texts cut to it have at most `room` characters in all."""
    low, high = MIN_KEPT, max([MIN_KEPT, *map(len, texts)])
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(len(text), middle) for text in texts) <= room:
            low = middle
        else:
            high = middle - 1
    return low
