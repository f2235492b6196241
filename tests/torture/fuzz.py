"""Coverage-guided fuzzing of everything that reads text or bytes from outside.

    python tests/torture/fuzz.py --minutes 10 --seed 0 [--targets actions,skill]

For each target there are seeds, words, and the errors that it documents. An input that reaches a new arc (a pair of lines executed one
after the other in the target's own files, by sys.settrace) joins the corpus, from which the next inputs are made by flips, splices,
repetitions and words. The targets take turns. Any other exception, and any broken promise (`assert` below), is printed with an input
that reproduces it; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "envs")]

import skillsd.callbacks.panel  # noqa: E402
import skillsd.study.results  # noqa: E402
import skillsd.study.settings  # noqa: E402
import skillsd.tasks  # noqa: E402
from skillsd import conf_dir  # noqa: E402
from skillsd.errors import ConfigError, one_line  # noqa: E402
from skillsd.skills import BaseSummariser, RulesSummariser, Skill, SkillBank, skill  # noqa: E402
from skillsd.skills.summarisers import transcript  # noqa: E402
from skillsd.trajectory import Trajectory, Turn  # noqa: E402
from skillsd_appworld.prompts import check_prompts, code_of, printable  # noqa: E402
from skillsd_sokoban import actions, level  # noqa: E402

FOLDER = Path(tempfile.mkdtemp(prefix="skillsd-fuzz-"))
MOVES = "up down left right ``` ```python ```py import\n".split(" ")


@dataclass
class Target:
    """What is fuzzed.

    Args:
        call: Takes bytes.
        files: Parts of the paths of the source files whose arcs count.
        raises: Documented errors.
        seeds: Where the corpus begins.
        words: What mutations put in.
    """

    call: Callable[[bytes], Any]
    files: tuple[str, ...]
    raises: tuple[type[Exception], ...]
    seeds: list[bytes]
    words: list[bytes]
    arcs: set[tuple[CodeType, int, int]] = field(default_factory=set)
    corpus: list[bytes] = field(default_factory=list)
    runs: int = 0
    crashes: dict[str, bytes] = field(default_factory=dict)

    def run(self, data: bytes) -> None:
        """Run one input; keep it if it reaches something new."""
        found: set[tuple[CodeType, int, int]] = set()

        def enter(frame: FrameType, event: str, arg: Any) -> Any:
            if not frame.f_code.co_filename.endswith(self.files):
                return None
            last = 0
            code = frame.f_code

            def line(frame: FrameType, event: str, arg: Any) -> Any:
                nonlocal last
                found.add((code, last, frame.f_lineno))
                last = frame.f_lineno
                return line

            return line

        self.runs += 1
        sys.settrace(enter)
        try:
            self.call(data)
        except self.raises:
            pass
        except Exception as e:
            sys.settrace(None)
            where = traceback.extract_tb(e.__traceback__)[-1]
            name = f"{type(e).__name__} at {Path(where.filename).name}:{where.lineno}"
            if name not in self.crashes or len(data) < len(self.crashes[name]):
                self.crashes[name] = data
        finally:
            sys.settrace(None)
        if not found <= self.arcs:
            self.arcs |= found
            self.corpus.append(data)


def mutate(target: Target, rng: random.Random, longest: int = 4096) -> bytes:
    """A new input from one or two of the corpus."""
    data = bytearray(rng.choice(target.corpus or [b""]))
    for _ in range(1 << rng.randrange(4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 16, 64)))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = rng.choice((0, 10, 32, 34, 92, 127, 128, 255, rng.randrange(256)))
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end] * rng.choice((1, 2, 8))
        elif kind == 4:
            other = rng.choice(target.corpus or [b""])
            data[at:] = other[rng.randrange(len(other) + 1) :]
        elif kind == 5:
            data[at:at] = rng.choice(("é", "漢", "🙂", "\u2028", "\x85", "\x1c", "\ufeff", "\u0130", "\u00b2")).encode()
        elif target.words:
            data[at : end if kind == 6 else at] = rng.choice(target.words)
    return bytes(data[:longest])


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def sokoban(data: bytes) -> None:
    for action_format in actions.FORMATS:
        for limit in (1, 3):
            reader = actions.Actions(action_format, limit)
            moves = reader.read(_text(data))
            assert moves is None or (1 <= len(moves) <= limit and set(moves) <= set(range(4)))
            assert moves is None or reader.read(reader.text(moves)) == moves


def appworld(data: bytes) -> None:
    text = printable(_text(data))
    assert printable(text) == text and text.encode() is not None
    code = code_of(_text(data))
    assert code is None or (code and code == code.strip())
    check_prompts({"output": _text(data)})


def board(data: bytes) -> None:
    for separator in ("", " "):
        found = level.Level.from_text(_text(data), separator)
        assert level.Level.from_text(found.text(separator), separator) == found and len(set(map(repr, found.symmetries()))) <= 8


def boxoban(data: bytes) -> None:
    path = FOLDER / "levels.txt"
    path.write_bytes(data)
    assert all(found.boxes for found in level.read_boxoban(path))


def answer(data: bytes) -> None:
    found = Skill.parse(_text(data))
    assert Skill.parse(json.dumps(dict(zip(skill.FIELDS, found.texts, strict=True)))) == found
    assert all(text in found.render() for text in found.texts)


def summary(data: bytes) -> None:
    """An episode from the text: lines are observations and answers in turn."""
    lines = _text(data).split("\n")
    turns = tuple(Turn(a, b, 0.0) for a, b in zip(lines[::2], lines[1::2], strict=False))
    t = Trajectory(0, "t", 0, 0, lines[0], (1,), (2,), (True,), (0.0,), turns, 0.0, 0.0, False, "done")
    for summariser in (RulesSummariser(), RulesSummariser(action_pattern="a(b)?|c", observation_pattern="o+", joiner=" ")):
        (found,) = summariser.summarise([t])
        assert (found is None) or (turns and found.task_id == "t")
    base = BaseSummariser(max_chars=1000)
    base.bind(lambda messages, tokens, keys: [_text(data)] * len(messages))
    base.summarise([t])
    assert len(transcript.conversation(t, 1000)) <= 1000


def trajectory(data: bytes) -> None:
    line = _text(data)
    found = Trajectory.from_json(line)
    assert Trajectory.from_json(found.to_json()).to_json() == found.to_json()


def tasks(data: bytes) -> None:
    path = FOLDER / "tasks.jsonl"
    path.write_bytes(data)
    found = skillsd.tasks.read_tasks(path, "train", "train_split")
    assert found and len({t.task_id for t in found}) == len(found)


def metrics(data: bytes) -> None:
    (FOLDER / "metrics.csv").write_bytes(data)
    skillsd.study.results.read_metrics(FOLDER)


def panel(data: bytes) -> None:
    (FOLDER / "panel.json").write_bytes(data)
    skillsd.callbacks.panel.read_panel(FOLDER)


def study(data: bytes) -> None:
    path = FOLDER / "study.yaml"
    path.write_bytes(data)
    skillsd.study.settings.read_settings(["-c", str(path)])


def bank(data: bytes) -> None:
    path = FOLDER / "bank.sqlite"
    path.write_bytes(data)
    try:
        with SkillBank(path, read_only=True) as found:
            for task in found.tasks():
                assert found.retrieve(task) is not None
    finally:
        assert path.read_bytes() == data  # left as it is


def message(data: bytes) -> None:
    assert "\n" not in one_line(_text(data))


def _bank_seed() -> bytes:
    path = FOLDER / "seed.sqlite"
    with SkillBank(path) as made:
        made.insert([Skill("a", "b", "c", "t", source_reward=1.0), Skill("d", "e", "f", "u")], 0)
        made.record_use(1, 1, reward=0.5)
    return path.read_bytes()


def targets() -> dict[str, Target]:
    """By name."""
    from argparse import ArgumentError

    t = Trajectory(0, "t", 0, 0, "do", (1,), (2, 3), (True, False), (-0.5, 0.0), (Turn("o", "a", 1.0),), 1.0, 1.0, True, "done", 1)
    fields = dict.fromkeys(skill.FIELDS, "x")
    marks = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"null", b"true", b"NaN", b"1e999", b"-1", b"\\ud800", b"0"]
    names = [f'"{name}"'.encode() for name in (*skill.FIELDS, *vars(t), "observation", "action")]
    head = ",".join(skillsd.callbacks.log.COLUMNS).encode()
    row = b",".join([b"0", *[b"1.0"] * (len(skillsd.callbacks.log.COLUMNS) - 1)])
    yaml = (conf_dir() / "study" / "sokoban-nano.yaml").read_bytes()
    ends = [
        *map(str.encode, ("\n  x: |- > # ' - &a *a << {} [] ${a} ${ !!python/name:os.system .nan ? %").split(" ")),
        b" ",
        b"\t",
    ]
    moves = [w.encode() for w in MOVES] + [b"UP", b"-", b"_"]
    boards = [b"#####\n#PXO#\n#####", b"# # # # #\n# S X _ #\n# # # # #"]
    symbols = [c.encode() for c in (*level.SYMBOLS, *" .$@*+;\n")]
    blocks = [b"```python\nprint(1)\n```", b"{output}"]
    texts = ("summarisers/rules.py", "summarisers/transcript.py", "summarisers/base.py", "skills/skill.py")
    stored = ("skills/bank_file.py", "skills/bank.py", "skills/ledger.py")
    task = b'{"task_id": "a", "split": "train", "board": "x"}\n'
    nested = b'Parser key "a": x\n  - Parser key "b": y'
    return {
        "actions": Target(sokoban, ("skillsd_sokoban/actions.py",), (), [b"up", b"```up left```", b"up, then down\nright"], moves),
        "code": Target(appworld, ("skillsd_appworld/prompts.py",), (ValueError,), blocks, [*moves, *marks]),
        "board": Target(board, ("skillsd_sokoban/level.py",), (ValueError,), boards, symbols),
        "boxoban": Target(boxoban, ("skillsd_sokoban/level.py",), (ValueError,), [b"; 0\n#####\n#@$.#\n#####\n; 1\n"], symbols),
        "skill": Target(answer, ("skills/skill.py",), (ValueError,), [json.dumps(fields).encode()], [*marks, *names[:3]]),
        "summary": Target(summary, texts, (), [b"o\na\noo\nab", json.dumps(fields).encode()], [*marks, b"\n", b"o", b"ab"]),
        "trajectory": Target(trajectory, ("skillsd/trajectory.py",), (ValueError,), [t.to_json().encode()], [*marks, *names]),
        "tasks": Target(tasks, ("skillsd/tasks.py",), (ConfigError,), [task], [*marks, b"\n", task]),
        "metrics": Target(metrics, ("study/results.py",), (ConfigError,), [head + b"\n" + row], [b",", b"\n", b"1", b'"', b"nan"]),
        "panel": Target(panel, ("callbacks/panel.py",), (ConfigError,), [b'{"after": {"n": 1}}'], marks),
        "study": Target(study, ("study/settings.py",), (ConfigError, ArgumentError), [yaml], [*ends, *marks]),
        "bank": Target(bank, stored, (ValueError, OSError), [_bank_seed()], [b"SKSD", b"insert", b"use", b"drop"]),
        "message": Target(message, ("skillsd/errors.py",), (), [nested], [b'Parser key "a"', b"\n", b"- "]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default="", help="names, with commas between; all by default")
    args = parser.parse_args()
    found = targets()
    found = {name: found[name] for name in args.targets.split(",")} if args.targets else found
    rng = random.Random(args.seed)
    longest = {"bank": 1 << 16, "study": 2048}
    for target in found.values():
        for data in [*target.seeds, b""]:
            target.run(data)
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        for name, target in found.items():
            slice_end = time.monotonic() + 0.5  # by time: a slow reader must not starve the others
            while time.monotonic() < slice_end:
                target.run(mutate(target, rng, longest.get(name, 4096)))
    for name, target in found.items():
        print(f"{name:11} {target.runs:8} executions, {len(target.corpus):4} in the corpus, {len(target.arcs):4} arcs")
        for what, data in target.crashes.items():
            print(f"{name:11} CRASH {what}: {data[:2000]!r}")
    return int(any(target.crashes for target in found.values()))


if __name__ == "__main__":
    sys.exit(main())
