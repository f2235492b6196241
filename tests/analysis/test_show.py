"""`skillsd show`: the run's own numbers, as text and as JSON, and no text of an episode can command the terminal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tests.analysis.folders import SHORT, append, write_metrics

from skillsd.files.run_folder import write_record
from skillsd.files.run_lock import RunLock
from skillsd.skills import Skill, SkillBank
from skillsd.statistics import bootstrap_mean
from skillsd.trajectory import Turn

EVIL = "\x1b[31m[bold]red[/bold] :smile: \ud800"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two iterations: task t1 twice, the second time with equal rewards, and t2 once, which failed."""
    write_record(tmp_path)
    (tmp_path / "config.yaml").write_text("seed_everything: 7\n")
    groups = [(0, "t1", None, (1.0, 0.0)), (0, "t2", None, (0.0, 0.0)), (1, "t1", 1, (1.0, 1.0))]
    rows = [replace(SHORT, iteration=i, task_id=t, member=m, skill_id=s, reward=r) for i, t, s, rs in groups for m, r in enumerate(rs)]
    rows[1] = replace(rows[1], success=False, turns=(Turn(EVIL, "a [b] c", 0.0),), instruction=EVIL, final_observation=EVIL)
    rows[2:4] = [replace(t, success=False, finish_reason="failed", failure=f"raised: {EVIL}") for t in rows[2:4]]
    append(tmp_path / "trajectories.jsonl", rows)
    write_metrics(tmp_path, [{"reward/success": "0.125"}, {"reward/success": "0.225"}])
    result = {"n": 3, "pass_at": {"1": 0.5}, "levels": [{"completion": 0.75}] * 3}
    panel = {when: {**result, "success": s, "success_interval": [s / 2, 0.9]} for when, s in (("before", 0.25), ("after", 0.5))}
    (tmp_path / "panel.json").write_text(json.dumps(panel))
    with SkillBank(tmp_path / "bank.sqlite", capacity=1) as bank:
        bank.insert(
            [Skill("s", "m", "go [bold]red[/bold] left", "t1", source_reward=0.5), Skill("s", "m", "right", "t1", source_reward=1.0)], 0
        )
        bank.record_use(2, 1, reward=1.0)
    return tmp_path


@pytest.fixture
def shown(folder: Path, command: Callable[..., str]) -> Callable[..., str]:
    """`skillsd show` of that run."""
    return partial(command, "show", folder)


def words(text: str) -> list[list[str]]:
    """Each line's words, without the table's frame."""
    return [line.translate({ord(c): " " for c in "│┃"}).split() for line in text.splitlines()]


def test_the_trend_averages_first_and_last_iterations(shown, folder):
    """The means of the first and the last ones, whatever a single one is; a gap that no teacher was scored for is none."""
    success, scored = [i in (0, 3, 11) for i in range(12)], [i > 8 for i in range(12)]
    write_metrics(
        folder,
        [
            {"reward/success": str(float(s)), "teacher/k3": str(int(k)), "teacher/gap_mean": str(float(k))}
            for s, k in zip(success, scored, strict=True)
        ],
    )
    lines = words(shown())
    assert ["first", "5", "last", "5"] in lines and ["reward/success", "0.400", "0.200"] in lines
    assert ["teacher/gap_mean", "-", "1.000"] in lines
    assert json.loads(shown("--json"))["averaged"] == 5


def test_a_run_in_progress_is_shown_as_running(shown, folder):
    """And one that was killed does not, although its lock is still there."""
    lock = RunLock(folder)
    assert f"running now: process {os.getpid()} on " in shown() and json.loads(shown("--json"))["running"]
    held = (folder / "run.lock").read_text()
    lock.release()
    (folder / "run.lock").write_text(held.replace(f'"pid": {os.getpid()}', '"pid": 999999999'))
    assert "running" not in shown() and json.loads(shown("--json"))["running"] is None


def test_show_prints_a_run_s_own_numbers(shown, folder):
    text = shown()
    assert "2 iterations, 6 trajectories of 2 tasks (4 done, 2 failed)" in " ".join(text.split())
    lines = words(text)
    assert ["reward/success", "0.125", "0.225"] in lines and ["first", "last"] in lines and ["loss/total", "-", "-"] in lines
    assert "panel of 3 held-out episodes, 95% intervals" in " ".join(text.split())
    completion = "{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap_mean([0.75] * 3, bounds=(0.0, 1.0))).split()
    assert ["before", "0.250", "[0.125,", "0.900]", *completion] in lines and ["after", "0.500", "[0.250,", "0.900]", *completion] in lines
    assert "skills: 1 held, 2 ever, of 1 task" in text
    seen = json.loads(shown("--json"))
    assert seen["skills"] == {"held": 1, "ever": 2, "tasks": 1} and seen["seed"] == 7 and seen["folder"] == str(folder)
    assert seen["metrics"]["last"]["reward/success"] == 0.225 and seen["metrics"]["last"]["loss/total"] is None
    assert seen["panel"]["after"] == {"n": 3, "success": 0.5, "success_interval": [0.25, 0.9], "pass_at": {"1": 0.5}}
    assert seen["finish_reasons"] == {"done": 4, "failed": 2}


def test_show_prints_a_trajectory(shown):
    text = shown("--trajectory", "1")
    assert text.startswith("trajectory 1: iteration 0, task t1, member 1, no skill\n")
    evil = "\\x1b[31m[bold]red[/bold] :smile: \\ud800"
    last = f"--- at the end\n{evil}\n--- done: success False, completion 1.00, reward 0.00, 1 turn\n"
    assert f"\n{evil}\n--- turn 1\n{evil}\n> a [b] c\n{last}" in text
    assert f"--- failed (raised: {evil}): success False" in " ".join(shown("--trajectory", "2").split())
    assert "its teacher saw skill 1" in shown("--trajectory", "4")
    seen = json.loads(shown("--trajectory", "1", "--json"))
    assert seen["turns"] == [{"observation": EVIL, "action": "a [b] c", "reward": 0.0, "valid": None}] and seen["trajectory"] == 1
    assert not {"token_ids", "prompt_ids", "logprobs", "action_mask"} & seen.keys()


def test_show_prints_a_task_s_groups(shown):
    assert json.loads(shown("--task", "t1", "--json")) == {
        "task_id": "t1",
        "groups": [
            {"iteration": 0, "skill_id": None, "trajectories": [0, 1], "rewards": [1.0, 0.0], "solved": 1, "failed": 0, "turns": [2, 1]},
            {"iteration": 1, "skill_id": 1, "trajectories": [4, 5], "rewards": [1.0, 1.0], "solved": 2, "failed": 0, "turns": [2, 2]},
        ],
    }
    lines = words(shown("--task", "t1"))
    assert ["0", "-", "1", "of", "2", "1", "0", "2", "1", "0", "to", "1"] in lines
    assert any(line[:5] == ["1", "1", "2", "of", "2"] for line in lines) and any("equal)" in line for line in lines)


def test_show_prints_the_skills(shown):
    seen = json.loads(shown("--skills", "--json"))
    assert [(s["skill_id"], s["uses"], s["evicted"], s["mean_reward"]) for s in seen] == [(1, 0, 0, 0.5), (2, 1, None, 1.0)]
    assert seen[0]["golden_workflow"] == "go [bold]red[/bold] left" and seen[1]["inserted"] == 0
    text = " ".join(shown("--skills").split())
    assert "[bold]red[/bold]" in text.replace(" ", "") and "right" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trajectory", "6"], "--trajectory: trajectory 6: .*has 6"),
        (["--task", "t3"], r"--task t3: .* has no trajectory of it \(it has t1, t2"),
        (["--trajectory", "1", "--skills"], "not allowed with"),
        (["--nosuch"], "unrecognized arguments: --nosuch .*`skillsd show --help`"),
    ],
)
def test_show_refuses_what_is_not_there(shown, args, message):
    assert re.search(message, shown(*args, code=2))


def test_a_run_that_has_just_begun(tmp_path, command):
    assert "is no run folder" in command("show", tmp_path / "nosuch", code=2)
    write_record(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert "0 iterations, 0 trajectories of 0 tasks" in " ".join(command("show", tmp_path).split())
