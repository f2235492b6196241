"""`skillsd skills`: from one run's bank into another's, all or nothing, and what is most like a text."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from skillsd.files.run_folder import write_record
from skillsd.skills import Skill, SkillBank
from skillsd.skills.tables import BEFORE

EVIL = "left \x1b[31m [bold]red[/bold]"


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Two held skills of two tasks, and one that was evicted."""
    path = tmp_path / "donor" / "bank.sqlite"
    with SkillBank(path, capacity=1) as bank:
        bank.insert([Skill("s", "m", "go up", "t1", source_reward=0.5), Skill("s", "m", "go right", "t1", source_reward=1.0)], 2)
        bank.insert([Skill("s", EVIL, "down " * 200, "[bold]t2[/bold]", source_iteration=3)], 3)
        bank.record_use(2, 4, reward=1.0)
    return path


@pytest.fixture
def skills(command: Callable[..., str]) -> Callable[..., str]:
    """`skillsd skills ARGS`."""
    return partial(command, "skills")


def held(path: Path) -> dict[str, list[str]]:
    with SkillBank(path, read_only=True) as bank:
        return {task: [skill.golden_workflow for skill in bank.skills(task)] for task in bank.tasks()}


def test_a_task_s_name_forges_no_line(skills, tmp_path):
    """A bank from elsewhere may hold any name; in print it is part of one line."""
    with SkillBank(tmp_path / "bank.sqlite") as bank:
        bank.insert([Skill("s", "m", "go\nup", "t\n9.999  skill 7, task best: \x1b[2J" + "x" * 1_000_000)], 0)
    lines = skills("search", tmp_path / "bank.sqlite", "go up").splitlines()
    assert len(lines) == 4 and not any(line.startswith("9.999") for line in lines) and max(map(len, lines)) < 500


def test_from_one_bank_to_another(skills, bank, tmp_path):
    new, file = tmp_path / "new", tmp_path / "skills.jsonl"
    assert skills("export", bank.parent, "-o", file) == f"2 skills: {file}\n"
    assert skills("export", bank) == file.read_text() and file.read_text().count("\n") == 2
    said = skills("import", new, file)
    assert "imported 2 new skills of 2 tasks" in said and f"--trainer.default_root_dir={new}\n" in said
    assert held(new / "bank.sqlite") == held(bank)
    with SkillBank(new / "bank.sqlite") as there:
        assert {e.iteration for e in there.events()} == {BEFORE}
        (skill,) = there.skills("t1")
        assert (skill.source_reward, skill.uses, skill.source_iteration) == (1.0, 0, -4)
    said = skills("import", new, file)
    assert "imported 0 new skills" in said and "holds 2\n2 were there already; 0 were evicted, as a task keeps 8" in said
    with SkillBank(new / "bank.sqlite") as there:
        assert {s.sources for s in there.skills("t1")} == {1}  # nobody has said it a second time


def test_a_bank_that_is_open_elsewhere(skills, bank, tmp_path):
    """A run that is in its first iteration has no event and no checkpoint yet."""
    new, file = tmp_path / "new", tmp_path / "skills.jsonl"
    skills("export", bank, "-o", file)
    new.mkdir()
    with SkillBank(new / "bank.sqlite") as running:
        assert "is open in another process" in skills("import", new, file, code=2)
        running.insert([Skill("s", "m", "w", "t9")], 0)  # it goes on
    assert "has begun" in skills("import", new, file, code=2)
    (tmp_path / "killed").mkdir()
    empty = tmp_path / "empty.sqlite"
    SkillBank(empty).close()
    for end in ("", "-wal", "-shm"):  # what SIGKILL leaves before the first event
        (tmp_path / "killed" / f"bank.sqlite{end}").write_bytes(b"" if end else empty.read_bytes())
    assert "imported 2 new skills" in skills("import", tmp_path / "killed", file)


def test_a_file_that_cannot_be_written(skills, bank, tmp_path):
    for out in (tmp_path, bank / "x"):
        assert "-o: " in skills("export", bank, "-o", out, code=2)


def test_skills_are_imported_from_a_pipe(skills, bank, tmp_path, monkeypatch):
    lines = skills("export", bank, "--all")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines.encode())))
    assert "imported 3 new skills of 2 tasks" in skills("import", tmp_path / "new", "-")
    assert held(tmp_path / "new" / "bank.sqlite")["t1"] == ["go up", "go right"]


def test_the_runs_settings_hold(skills, bank, tmp_path):
    new, file = tmp_path / "new", tmp_path / "skills.jsonl"
    new.mkdir()
    write_record(new)
    (new / "config.yaml").write_text("skills: {capacity: 1, eviction: oldest, value_estimate: gap, refresh: epoch}\n")
    skills("export", bank, "--all", "-o", file)
    said = skills("import", new, file)
    assert "holds 2\n0 were there already; 1 were evicted, as a task keeps 1\n" in said and "--ckpt_path last" in said
    with SkillBank(new / "bank.sqlite", value_estimate="gap") as there:
        assert [s.mean_reward for s in there.skills("t1")] == [0.0]
    (new / "config.yaml").write_text("skills: {capacity: null, value_estimate: source}\n")
    assert "is 'gap', not 'source'" in skills("import", new, file, code=2)


def test_a_bad_line_imports_nothing(skills, bank, tmp_path):
    new, file = tmp_path / "new", tmp_path / "skills.jsonl"
    skills("export", bank, "-o", file)
    file.write_text(file.read_text() + "{}\n")
    assert "FILE: line 3: " in skills("import", new, file, code=2) and not new.exists()


def test_a_run_that_has_begun_is_left_alone(skills, bank, tmp_path):
    file, other = tmp_path / "skills.jsonl", tmp_path / "other"
    skills("export", bank, "-o", file)
    before = bank.read_bytes()
    assert "has begun" in skills("import", bank.parent, file, code=2) and bank.read_bytes() == before
    (other / "checkpoints").mkdir(parents=True)  # a method without skills: no events, and yet the checkpoint counts them
    (other / "checkpoints" / "last.ckpt").touch()
    assert "has begun" in skills("import", other, file, code=2) and not (other / "bank.sqlite").exists()


def test_a_path_that_is_no_bank_or_file_is_refused(skills, bank, tmp_path):
    (empty := tmp_path / "empty.jsonl").write_text("\n")
    (foreign := tmp_path / "foreign").write_text("no bank" * 100)
    for args, said in (
        (("export", tmp_path), f"RUN_OR_BANK: there is no {tmp_path / 'bank.sqlite'}"),
        (("search", tmp_path / "nosuch", "x"), "RUN_OR_BANK: there is no"),
        (("export", foreign), "RUN_OR_BANK: .*not a skill bank"),
        (("search", foreign, "x"), "not a skill bank"),
        (("import", tmp_path / "new", tmp_path / "nosuch"), "FILE: there is no"),
        (("import", tmp_path / "new", empty), "FILE: it holds no skill"),
        (("import", foreign, empty), "RUN: .* is no folder"),
        (("search", bank, "x", "-n", "0"), "-n: 0 "),
        ((), "command"),
        (("nosuch",), "nosuch"),
    ):
        assert re.search(said, skills(*args, code=2)), args


def test_search_finds_the_most_similar_skills(skills, bank):
    found = json.loads(skills("search", bank.parent, "left red", "--json"))
    assert [(s["skill_id"], s["evicted"]) for s in found] == [(3, None)] and found[0]["mistake_analysis"] == EVIL
    assert 0 < found[0]["similarity"] < 1
    lines = skills("search", bank, "GO UP", "-n", 2).splitlines()
    assert re.fullmatch(r"0\.\d{3}  skill 1, task t1: mean reward 0\.500, 0 uses, evicted in iteration 2", lines[0])
    assert lines[3] == "       golden_workflow: go up" and "skill 2" in lines[4] and "1 use" in lines[4] and len(lines) == 8
    assert r"\x1b" in (text := skills("search", bank, "down")) and "..." in text and max(map(len, text.splitlines())) < 240
    assert skills("search", bank, "zebra") == "no skill shares a word with it\n" and skills("search", bank, "zebra", "--json") == "[]\n"
