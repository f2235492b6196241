"""The texts that the environment says. Each is a template with names in braces; `SokobanEnv(prompts={...})` replaces any of them.

    instruction   info["instruction"], once an episode    fields {board} {format} {turns_left}
    observation   the answer to a valid action, and the first map   fields {board} {format} {message} {turn} {turns_left}
    invalid       the answer to an action that cannot be read       fields as for observation

{board} the map; {format} what an answer must look like; {message} what was wrong with the last answer ("" if nothing); {turn} turns taken;
{turns_left} turns left. Double a brace to get one.
"""

from collections.abc import Mapping
from string import Formatter

INSTRUCTION = """You are an expert player of Sokoban, a puzzle in which a player pushes boxes onto targets inside a walled room.

The map is a grid of symbols, one row a line:
# a wall
_ free floor
O a target without a box
X a box that is not on a target
P you, the player
T a box on a target
S you, standing on a target

Goal: get every box onto a target, so that no X is left. You have {turns_left} turns.

Rules:
- A move takes you one cell up, down, left or right.
- Walking into a box pushes it one cell further, if that cell is free. Boxes are pushed, never pulled, and only one at a time.
- Walls stop both you and the boxes. A move that is blocked changes nothing, but costs a turn.
- Keep boxes out of corners and away from walls without a target along them: from there they cannot come back.
- Each turn shows you the current map. Think briefly, do not overthink, then decide.

Answer: {format}."""

DEFAULTS = {"instruction": INSTRUCTION, "observation": "{board}", "invalid": "{message}\n{board}"}

FIELDS = {
    "instruction": ("board", "format", "turns_left"),
    "observation": ("board", "format", "message", "turn", "turns_left"),
    "invalid": ("board", "format", "message", "turn", "turns_left"),
}


def check_prompts(prompts: Mapping[str, str] | None) -> dict[str, str]:
    """The templates in force. ValueError, naming the key, for an unknown template or field."""
    out = dict(DEFAULTS)
    if prompts is not None and not isinstance(prompts, Mapping):
        raise ValueError(f"prompts = {prompts!r}: give a mapping with any of {', '.join(DEFAULTS)}")
    for name, template in (prompts or {}).items():
        if name not in DEFAULTS:
            raise ValueError(f"prompts: unknown key {name!r}; use {', '.join(DEFAULTS)}")
        try:
            for _, field, spec, conversion in Formatter().parse(template):
                if field is not None and (field not in FIELDS[name] or spec or conversion):  # a width could fill the memory
                    raise KeyError(field)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"prompts[{name!r}]: not a template over {{{'}, {'.join(FIELDS[name])}}} ({error!r}); double other braces"
            ) from None
        out[name] = template
    return out
