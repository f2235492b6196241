"""Everything that reads text or bytes from outside: any input is read, or refused with the error that its documentation names.

Inputs are examples in which pieces are cut out, put in and repeated; `make torture ARGS=properties` tries a hundred times as many.
"""

from __future__ import annotations

import json
import tempfile
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.profile import examples

from skillsd import conf_dir
from skillsd.callbacks.log import COLUMNS
from skillsd.config_errors import parser_error
from skillsd.errors import ConfigError
from skillsd.files.run_folder import read_panel
from skillsd.skills import FIELDS, BaseSummariser, RulesSummariser, Skill, SkillBank
from skillsd.skills.summarisers.transcript import conversation
from skillsd.study.results import read_metrics
from skillsd.study.settings import read_settings
from skillsd.tasks import read_tasks
from skillsd.trajectory import Trajectory, Turn
from skillsd_appworld.prompts import check_prompts, code_of, printable
from skillsd_sokoban.actions import FORMATS, Actions
from skillsd_sokoban.level import SYMBOLS, Level, read_boxoban

_TEMPORARY = tempfile.TemporaryDirectory(prefix="skillsd-readers-")
FOLDER = Path(_TEMPORARY.name)


class Reader(NamedTuple):
    """What reads.

    Args:
        call: Takes bytes.
        raises: Documented errors.
        seeds: Inputs to begin with.
        pieces: What is put into them.
    """

    call: Callable[[bytes], Any]
    raises: tuple[type[Exception], ...]
    seeds: Sequence[bytes]
    pieces: Sequence[bytes]


def text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def file(name: str, data: bytes) -> Path:
    (FOLDER / name).write_bytes(data)
    return FOLDER / name


def actions(data: bytes) -> None:
    for action_format in FORMATS:
        for limit in (1, 3):
            reader = Actions(action_format, limit)
            moves = reader.read(text(data))
            assert moves is None or (1 <= len(moves) <= limit and set(moves) <= set(range(4)) and reader.read(reader.text(moves)) == moves)


def code(data: bytes) -> None:
    shown = printable(text(data))
    assert printable(shown) == shown and shown.encode() is not None
    found = code_of(text(data))
    assert found is None or (found and found == found.strip())
    check_prompts({"output": text(data)})


def board(data: bytes) -> None:
    for separator in ("", " "):
        found = Level.from_text(text(data), separator)
        assert Level.from_text(found.text(separator), separator) == found and len(set(map(repr, found.symmetries()))) <= 8


def boxoban(data: bytes) -> None:
    assert all(found.boxes for found in read_boxoban(file("levels.txt", data)))


def skill(data: bytes) -> None:
    found = Skill.parse(text(data))
    assert Skill.parse(json.dumps(dict(zip(FIELDS, found.texts, strict=True)))) == found
    assert all(text in found.render() for text in found.texts)


def summary(data: bytes) -> None:
    """Summaries of an episode whose observations and answers are the lines in turn."""
    lines = text(data).split("\n")
    turns = tuple(Turn(a, b, 0.0) for a, b in zip(lines[::2], lines[1::2], strict=False))
    t = Trajectory(0, "t", 0, 0, lines[0], (1,), (2,), (True,), (0.0,), turns, 0.0, 0.0, False, "done")
    for summariser in (RulesSummariser(), RulesSummariser(action_pattern="a(b)?|c", observation_pattern="o+", joiner=" ")):
        (found,) = summariser.summarise([t])
        assert (found is None) or (turns and found.task_id == "t")
    base = BaseSummariser(max_chars=1000)
    base.bind(lambda messages, tokens, keys: [text(data)] * len(messages))
    base.summarise([t])
    assert len(conversation(t, 1000)) <= 1000


def trajectory(data: bytes) -> None:
    found = Trajectory.from_json(text(data))
    assert Trajectory.from_json(found.to_json()).to_json() == found.to_json()


def tasks(data: bytes) -> None:
    found = read_tasks(file("tasks.jsonl", data), "train", "train_split")
    assert found and len({t.task_id for t in found}) == len(found)


def metrics(data: bytes) -> None:
    read_metrics(file("metrics.csv", data).parent)


def panel(data: bytes) -> None:
    read_panel(file("panel.json", data).parent)


def study(data: bytes) -> None:
    read_settings(["-c", str(file("study.yaml", data))])


def bank(data: bytes) -> None:
    path = file("bank.sqlite", data)
    try:
        with SkillBank(path, read_only=True) as found:
            for task in found.tasks():
                assert found.retrieve(task) is not None
    finally:
        assert path.read_bytes() == data  # left as it is


def message(data: bytes) -> None:
    assert "\n" not in parser_error(text(data))


def _bank_seed() -> bytes:
    with SkillBank(FOLDER / "seed.sqlite") as made:
        made.insert([Skill("a", "b", "c", "t", source_reward=1.0), Skill("d", "e", "f", "u")], 0)
        made.record_use(1, 1, reward=0.5)
    return (FOLDER / "seed.sqlite").read_bytes()


T = Trajectory(0, "t", 0, 0, "do", (1,), (2, 3), (True, False), (-0.5, 0.0), (Turn("o", "a", 1.0),), 1.0, 1.0, True, "done", 1)
JSON = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"null", b"true", b"NaN", b"1e999", b"-1", b"\\ud800", b"0"]
NAMES = [f'"{name}"'.encode() for name in (*FIELDS, *vars(T), "observation", "action")]
MOVES = [b"up", b"down", b"left", b"right", b"UP", b"-", b"_", b"```", b"```python", b"```py", b"import\n"]
BOARDS = [b"#####\n#PXO#\n#####", b"# # # # #\n# S X _ #\n# # # # #"]
CELLS = [c.encode() for c in (*SYMBOLS, *" .$@*+;\n")]
YAML = [*map(str.encode, ("\n  x: |- > # ' - &a *a << {} [] ${a} ${ !!python/name:os.system .nan ? %").split(" ")), b" ", b"\t"]
FIELDS_JSON = json.dumps(dict.fromkeys(FIELDS, "x")).encode()
TASK = b'{"task_id": "a", "split": "train", "board": "x"}\n'
ROWS = ",".join(COLUMNS).encode() + b"\n" + b",".join([b"0", *[b"1.0"] * (len(COLUMNS) - 1)])
STUDY = (conf_dir() / "study" / "sokoban-nano.yaml").read_bytes()
REFUSED = (ValueError,)
READERS = {
    "actions": Reader(actions, (), [b"up", b"```up left```", b"up, then down\nright"], MOVES),
    "code": Reader(code, REFUSED, [b"```python\nprint(1)\n```", b"{output}"], [*MOVES, *JSON]),
    "board": Reader(board, REFUSED, BOARDS, CELLS),
    "boxoban": Reader(boxoban, REFUSED, [b"; 0\n#####\n#@$.#\n#####\n; 1\n"], CELLS),
    "skill": Reader(skill, REFUSED, [FIELDS_JSON], [*JSON, *NAMES[:3]]),
    "summary": Reader(summary, (), [b"o\na\noo\nab", FIELDS_JSON], [*JSON, b"\n", b"o", b"ab"]),
    "trajectory": Reader(trajectory, REFUSED, [T.to_json().encode()], [*JSON, *NAMES]),
    "tasks": Reader(tasks, (ConfigError,), [TASK], [*JSON, b"\n", TASK]),
    "metrics": Reader(metrics, (ConfigError,), [ROWS], [b",", b"\n", b"1", b'"', b"nan"]),
    "panel": Reader(panel, (ConfigError,), [b'{"after": {"n": 1}}'], JSON),
    "study": Reader(study, (ConfigError, ArgumentError), [STUDY], [*YAML, *JSON]),
    "bank": Reader(bank, (ValueError, OSError), [_bank_seed()], [b"SKSD", b"insert", b"use", b"evict"]),
    "message": Reader(message, (), [b'Parser key "a": x\n  - Parser key "b": y'], [b'Parser key "a"', b"\n", b"- "]),
}
UNUSUAL = [c.encode() for c in "é漢🙂\u2028\x85\x1c\ufeff\u0130\u00b2"]


@st.composite
def inputs(draw: st.DrawFn, name: str) -> bytes:
    """One of the reader's seeds after up to eight changes."""
    reader = READERS[name]
    data = bytearray(draw(st.sampled_from([*reader.seeds, b""])))
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, len(data)))
        piece = draw(st.sampled_from([*reader.pieces, *UNUSUAL]) | st.binary(max_size=4))
        data[at : at + draw(st.sampled_from([0, 0, 1, 2, 4, 16, 64]))] = piece * draw(st.sampled_from([1, 1, 1, 2, 8]))
    return bytes(data)


def check(name: str, data: bytes) -> None:
    """Nothing but a documented error comes out."""
    with suppress(*READERS[name].raises):
        READERS[name].call(data)


@pytest.mark.parametrize("name", READERS)
@examples(40)
@given(data=st.data())
def test_any_input_is_read_or_refused(name, data):
    check(name, data.draw(inputs(name)))
