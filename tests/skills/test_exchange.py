"""Skills as lines: nothing of them is lost or added, and what is no skill is named by its line."""

import io
import json
from dataclasses import asdict, replace
from itertools import islice

import pytest

from skillsd.errors import ConfigError
from skillsd.skills import SkillBank
from skillsd.skills.exchange import FORMAT, MAX_LINE, MAX_TASK_ID, bounded_lines, from_lines, to_lines
from skillsd.skills.skill import MAX_CHARS


def lines(bank, evicted=False):
    return [line.encode() for line in to_lines(bank, evicted)]


@pytest.fixture
def bank(make_skill):
    with SkillBank(capacity=1, eviction="oldest") as bank:
        bank.insert([make_skill("a", reward=0.5, iteration=4, source_member=1), make_skill("é\x1b\n", task_id="t2", reward=0.1)], 4)
        bank.insert([make_skill("b", iteration=5)], 5)
        bank.record_use(2, 6)
        yield bank


def test_skills_written_as_lines_are_read_back(bank, make_skill):
    held = [make_skill("é \n", task_id="t2", reward=0.1), make_skill("b", iteration=5)]  # \x1b commands a terminal
    assert from_lines(lines(bank)) == held
    assert from_lines(lines(bank, evicted=True)) == [make_skill("a", reward=0.5, iteration=4, source_member=1), *held]
    assert from_lines([b"\n", *lines(bank), b"  \n"]) == held and from_lines([]) == []


def test_a_line_says_how_a_skill_fares_and_is_ascii(bank):
    used = json.loads(lines(bank)[0])
    stored = asdict(bank.get(2))
    assert used == {"format": FORMAT} | stored and used["uses"] == 1
    assert "evicted" not in used and [json.loads(line).get("evicted") for line in lines(bank, True)] == [5, None, None]
    assert all(line.isascii() and line.decode().isprintable() for line in lines(bank, True))


GOOD = {"format": FORMAT, "task_id": "t", "success_analysis": "s", "mistake_analysis": "m", "golden_workflow": "g"}
BAD = {
    "no JSON": (b"{", "Expecting"),
    "no object": (b"[1]", "no skill"),
    "no UTF-8": (b'{"format": "\xff"}', "utf-8"),
    "nested": (b"[" * 100_000, "recursion"),
    "another format": (GOOD | {"format": "skillsd.skill.v2"}, r"no skill .*skillsd\.skill\.v1"),
    "no format": ({k: v for k, v in GOOD.items() if k != "format"}, "no skill"),
    "a text missing": ({k: v for k, v in GOOD.items() if k != "golden_workflow"}, "missing: golden_workflow"),
    "a key misspelt": (GOOD | {"source_rewards": 1}, "unexpected: 'source_rewards'"),
    "a key that commands": (GOOD | {"\x1b[31m": 1}, r"unexpected: '\\x1b\[31m'"),
    "a blank text": (GOOD | {"mistake_analysis": " "}, "mistake_analysis is empty"),
    "a text of controls": (GOOD | {"mistake_analysis": "\x00\x1b"}, "mistake_analysis is empty"),
    "a text that is none": (GOOD | {"mistake_analysis": 3}, "mistake_analysis must be a string"),
    "a long text": (GOOD | {"golden_workflow": "x" * (MAX_CHARS + 1)}, f"more than {MAX_CHARS}"),
    "a surrogate": (GOOD | {"golden_workflow": "\ud800"}, "lone surrogate"),
    "no task": (GOOD | {"task_id": ""}, "task_id is no text"),
    "a task that is a number": (GOOD | {"task_id": 3}, "task_id is no text"),
    "a task with a surrogate": (GOOD | {"task_id": "\ud800"}, "task_id"),
    "a task that forges a line": (GOOD | {"task_id": "t\n0.999  skill 1"}, "task_id"),
    "a task that turns text around": (GOOD | {"task_id": "t\u202e"}, "task_id"),
    "a task without end": (GOOD | {"task_id": "t" * 1_000_000}, "task_id has 1000000"),
    "a line without end": (b" " * (MAX_LINE + 1) + b"{", "bytes"),
    "an endless reward": (GOOD | {"source_reward": float("inf")}, "source_reward is no finite number"),
    "a huge reward": (GOOD | {"source_reward": 10**400}, "source_reward is no finite number"),
    "a reward whose sums overflow": (GOOD | {"source_reward": 1e308}, "source_reward is no finite number"),
    "a reward that is none": (GOOD | {"source_reward": float("nan")}, "source_reward is no finite number"),
    "a reward that is true": (GOOD | {"source_reward": True}, "source_reward is no finite number"),
    "a reward as text": (GOOD | {"source_completion": "1"}, "source_completion is no finite number"),
    "half an iteration": (GOOD | {"source_iteration": 0.5}, "source_iteration is no whole number"),
    "a huge member": (GOOD | {"source_member": 2**63}, "source_member is no whole number"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named(bad):
    given, message = BAD[bad]
    line = given if isinstance(given, bytes) else json.dumps(given).encode()
    with pytest.raises(ConfigError, match=rf"^FILE: line 3: .*{message}"):
        from_lines([json.dumps(GOOD).encode(), b"\n", line])


def test_no_line_is_read_whole_that_is_too_long():
    file = io.BytesIO(b"x" * (3 * MAX_LINE) + b"\ny\n")
    assert max(map(len, bounded_lines(file))) == MAX_LINE + 1


def test_a_line_written_by_hand_is_read(make_skill):
    (skill,) = from_lines([json.dumps(GOOD | {"source_reward": 1, "uses": "many"}).encode()])
    assert skill == replace(make_skill(), success_analysis="s", mistake_analysis="m", golden_workflow="g", task_id="t", source_reward=1.0)
    assert isinstance(skill.source_reward, float)


def test_evicted_skills_are_left_out_by_default(bank):
    assert list(to_lines(bank)) == list(to_lines(bank, evicted=False)) != list(to_lines(bank, evicted=True))


@pytest.mark.parametrize(("field", "most"), [("source_reward", 2.0**53), ("source_member", 2**53)])
def test_the_largest_number(field, most):
    assert getattr(from_lines([json.dumps(GOOD | {field: most - 1}).encode()])[0], field) == most - 1
    with pytest.raises(ConfigError, match=field):
        from_lines([json.dumps(GOOD | {field: most}).encode()])


def test_the_longest_task_and_line():
    line = json.dumps(GOOD | {"task_id": "t" * MAX_TASK_ID}).encode()
    assert len(from_lines([line.ljust(MAX_LINE)])[0].task_id) == MAX_TASK_ID
    for long in (line.ljust(MAX_LINE + 1), json.dumps(GOOD | {"task_id": "t" * (MAX_TASK_ID + 1)}).encode()):
        with pytest.raises(ConfigError, match="line 1"):
            from_lines([long])


def test_lines_end_with_the_file():
    assert list(islice(bounded_lines(io.BytesIO(b"a\nb")), 9)) == [b"a\n", b"b"]
