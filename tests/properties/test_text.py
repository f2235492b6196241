"""Readers of text: any text is read or refused with the documented error, and what was written comes back."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.profile import examples

from skillsd.skills import FIELDS, RulesSummariser, Skill
from skillsd.skills.summarisers.transcript import conversation
from skillsd.trajectory import Trajectory, Turn
from skillsd_appworld.prompts import code_of, printable
from skillsd_sokoban.actions import FORMATS, Actions
from skillsd_sokoban.level import Level

ANY = st.text(st.characters(), max_size=40)
"""Lone surrogates and control characters too."""
PIECES = [
    "up",
    "DOWN",
    "left",
    "right",
    " ",
    "\n",
    "-",
    "_",
    ".",
    "```",
    "```python\n",
    "x = 1",
    "```py\r\n",
    "{",
    "}",
    '"',
    "\\",
    ":",
    ",",
]
NOISE = st.lists(st.sampled_from([*PIECES, *FIELDS]) | st.text(st.characters(), max_size=6), max_size=12).map("".join)
SAID = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs")), min_size=1, max_size=30).filter(str.strip)
"""A skill's text, which has no control characters."""
SKILLS = st.builds(Skill, *[SAID.map(str.strip)] * 3)
NUMBERS = st.floats(allow_nan=False)
SHOWN = st.floats(allow_nan=False, allow_infinity=False, width=32)  # rewards and completions: what a float32 holds


@pytest.mark.parametrize("action_format", FORMATS)
@examples(150)
@given(limit=st.integers(1, 4), answer=NOISE, moves=st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_sokoban_answers(action_format, limit, answer, moves):
    reader = Actions(action_format, limit)
    read = reader.read(answer)
    assert read is None or (1 <= len(read) <= limit and set(read) <= {0, 1, 2, 3})
    said = reader.text(moves[:limit])
    assert reader.read(said) == reader.read(said.upper()) == moves[:limit]
    assert reader.read(f"{answer}\n. so:\n{said}" if action_format == "fenced" else f"{answer} so {said}") == moves[:limit]


@examples(200)
@given(NOISE, st.text(max_size=20), st.sampled_from(["python", "py", "Python", " python "]))
def test_code_of_an_answer(noise, code, language):
    found = code_of(noise)
    assert found is None or (found and found == found.strip() and found in noise)
    if "`" not in code and code.strip():
        before = noise.replace("`", "")
        assert code_of(f"{before}```{language}\n{code}```") == code_of(f"{before}```{language}\n{code}") == code.strip()


@examples(200)
@given(ANY)
def test_printable_text_stays_as_it_is(text):
    shown = printable(text)
    shown.encode()
    assert printable(shown) == shown
    assert all(c in "\n\t" or (ord(c) >= 32 and ord(c) != 127) for c in shown)


@examples(100)
@given(st.integers(3, 7), st.integers(3, 7), st.data())
def test_a_board_is_its_text(height, width, data):
    """A random room reads back from its text; any line changed gives a level or a ValueError."""
    cells = [(r, c) for r in range(1, height - 1) for c in range(1, width - 1)]
    rows = [["#"] * width for _ in range(height)]
    placed = data.draw(st.permutations(cells))
    n = max(0, min(2, (len(cells) - 1) // 2))
    symbols = ["P", *"X" * n, *"O" * n]
    for (r, c), symbol in zip(placed, [*symbols, *data.draw(st.lists(st.sampled_from("#_"), max_size=len(cells)))], strict=False):
        rows[r][c] = symbol
    text = "\n".join("".join(row) for row in rows)
    if not n:
        with pytest.raises(ValueError, match="as many boxes"):
            Level.from_text(text)
        return
    level = Level.from_text(text)
    for separator in ("", " ", "|"):
        assert level.text() == text and Level.from_text(level.text(separator), separator) == level
    assert {image.canonical() for image in level.symmetries()} == {level.canonical()}
    lines = text.split("\n")
    lines[data.draw(st.integers(0, height - 1))] = data.draw(st.text("#_OXPTS ", max_size=width) | ANY)
    try:
        changed = Level.from_text("\n".join(lines))
    except ValueError as e:
        assert str(e).startswith("board: ")
    else:
        assert Level.from_text(changed.text()) == changed


@examples(200)
@given(NOISE, SKILLS, st.permutations(range(3)), st.booleans())
def test_skills_of_any_answer(noise, skill, order, fenced):
    try:
        Skill.parse(noise)
    except ValueError as e:
        assert str(e)
    said = json.dumps({FIELDS[i]: skill.texts[i] for i in order}, ensure_ascii=fenced)
    around = noise.replace("{", "")  # prose, which may quote braces only
    assert Skill.parse(f"{around}\n```json\n{said}\n```\n{around}" if fenced else f"{around}{said}{around}") == skill
    assert [text for text in skill.texts if text not in skill.render()] == []
    for broken in (
        said[:-1],
        said + said,
        json.dumps({FIELDS[0]: "x"}),
        said.replace(FIELDS[1], "other"),
        f'{said[:-1]}, "{FIELDS[2]}": 1}}',
    ):
        with pytest.raises(ValueError):
            Skill.parse(broken)


TURNS = st.lists(st.builds(Turn, ANY, ANY, NUMBERS), max_size=5).map(tuple)


@st.composite
def trajectories(draw):
    n = draw(st.integers(0, 6))
    ids = st.integers(0, 2**31)
    logprobs = draw(st.lists(NUMBERS, min_size=n, max_size=n))
    return Trajectory(
        draw(ids), draw(ANY), draw(ids), draw(ids), draw(ANY), tuple(draw(st.lists(ids, max_size=4))),
        tuple(draw(st.lists(ids, min_size=n, max_size=n))), tuple(draw(st.lists(st.booleans(), min_size=n, max_size=n))), tuple(logprobs),
        draw(TURNS), draw(SHOWN), draw(SHOWN), draw(st.booleans()), draw(st.sampled_from(["done", "length", "horizon", "failed"])),
        draw(st.none() | ids), draw(ANY), draw(st.none() | ANY),
    )  # fmt: skip


@examples(150)
@given(trajectories(), st.data())
def test_trajectories_come_back(t, data):
    line = t.to_json()
    assert "\n" not in line and line.isascii()
    assert Trajectory.from_json(line) == t
    assert t.n_actions == t.action_mask.count(True)
    cut = data.draw(st.integers(0, len(line) - 1))
    with pytest.raises(ValueError, match="the line is no"):
        Trajectory.from_json(line[:cut])


@pytest.mark.parametrize("line", ["", "0", "null", "[]", "{}", '{"turns": 1}', '{"turns": [1]}', "[" * 100_000])
def test_a_line_that_is_no_trajectory_is_refused(line):
    with pytest.raises(ValueError, match="the line is no"):
        Trajectory.from_json(line)


@examples(100)
@given(trajectories(), st.integers(1000, 2000), st.integers(1, 60))
def test_an_episode_fits_its_budget(t, budget, longer):
    turns = tuple(Turn(turn.observation * longer, turn.action * longer, 0.0) for turn in t.turns)
    text = conversation(Trajectory(**vars(t) | {"turns": turns}), budget)
    assert len(text) <= budget
    whole = conversation(Trajectory(**vars(t) | {"turns": turns}), 10**9)
    assert text == whole if len(whole) <= budget else "left out]" in text


@examples(150)
@given(TURNS.filter(len), st.booleans(), st.floats(0, 1))
def test_rules_count_every_turn(turns, cut_loops, completion):
    """What remains is a subsequence of the actions; with loops cut no situation is met twice."""
    rules = RulesSummariser(cut_loops=cut_loops)
    digest = rules.digest(turns)
    said = iter(turn.action.strip() for turn in turns)
    assert all(any(action == other for other in said) for action in digest.actions)
    assert digest.kept == len(turns) or cut_loops
    if cut_loops:
        assert digest.kept <= len({turn.observation.strip() or turn.observation for turn in turns})
    assert digest.blocked + digest.loops == len(turns) - len({turn.observation.strip() or turn.observation for turn in turns})
    assert digest.unparsed == sum(not turn.action.strip() for turn in turns)
    (skill,) = rules.summarise([Trajectory(0, "t", 0, 0, "", (), (), (), (), turns, 1.0, completion, False, "done")])
    assert skill is None or (skill.task_id == "t" and math.isclose(skill.source_completion, completion))
