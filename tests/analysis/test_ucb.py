"""Scores over time are those of the bank at that moment."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from skillsd.analysis import Run
from skillsd.analysis.ucb import ucb_scores
from skillsd.errors import ConfigError
from skillsd.files.run_folder import write_record
from skillsd.skills import Skill, SkillBank, ucb_score


def played(folder: Path, value_estimate: str, unused_first: bool, c: float) -> list[dict]:
    """A bank with inserts, merges, uses and drops, and how it stood before each iteration by its own account."""
    write_record(folder)
    (folder / "config.yaml").write_text(f"skills: {{context: {{init_args: {{c: {c}, unused_first: {str(unused_first).lower()}}}}}}}\n")
    rng, stood = random.Random(0), []
    with SkillBank(folder / "bank.sqlite", capacity=2, value_estimate=value_estimate) as bank:
        for iteration in range(12):
            stood.append({t: (bank.skills(t), bank.retrieve(t, c, unused_first)) for t in bank.tasks()})
            if iteration == 5:
                continue  # nothing happens
            for task_id in ("a", "b"):
                if rng.random() < 0.7 and (best := bank.retrieve(task_id, c, unused_first)) is not None:
                    bank.record_use(best.skill_id, iteration, reward=rng.random(), gap=rng.gauss(0, 1))
            made = [
                Skill(*[str(rng.randrange(5))] * 3, task_id, source_iteration=iteration, source_reward=rng.random())
                for task_id in ("a", "b", "a")[: rng.randrange(4)]
            ]
            bank.insert(made, iteration)
        stood.append({t: (bank.skills(t), bank.retrieve(t, c, unused_first)) for t in bank.tasks()})
        assert bank.stats()["merged"] > 0 and bank.stats()["evicted"] > 0
    return stood


@pytest.mark.parametrize(("value_estimate", "unused_first", "c"), [("source", True, 2.0), ("next_visit", False, 0.5), ("gap", True, 0.5)])
def test_scores_are_the_bank_s_at_that_moment(tmp_path, value_estimate, unused_first, c):
    stood = played(tmp_path, value_estimate, unused_first, c)
    frame = ucb_scores(Run(tmp_path))
    seen = {}
    for iteration, bank in enumerate(stood):
        for task_id, rows in frame[frame["iteration"] == iteration].groupby("task_id"):
            seen[task_id] = rows
        assert seen.keys() == bank.keys()
        for task_id, (skills, best) in bank.items():
            rows, min_uses = seen[task_id], int(not unused_first)
            total = sum(max(min_uses, s.uses) for s in skills)
            expected = [
                ucb_score(s.mean_reward, max(min_uses, s.uses), total, c) if max(min_uses, s.uses) else float("inf") for s in skills
            ]
            assert rows["skill_id"].tolist() == [s.skill_id for s in skills] and rows["score"].tolist() == expected
            assert rows["uses"].tolist() == [s.uses for s in skills] and rows["mean_reward"].tolist() == [s.mean_reward for s in skills]
            assert rows.loc[rows["best"], "skill_id"].tolist() == [best.skill_id]
    assert not (frame["iteration"] == 6).any()  # nothing had changed
    assert frame["iteration"].is_monotonic_increasing and frame["score"].nunique() > 10


def test_scores_can_be_of_some_tasks_and_by_another_rule(tmp_path):
    played(tmp_path, "source", "first", 2.0)
    run = Run(tmp_path)
    assert set(ucb_scores(run, ["b"])["task_id"]) == {"b"} and ucb_scores(run, []).empty
    whole = ucb_scores(run)
    assert ucb_scores(run, ["b"]).to_dict("records") == whole[whole["task_id"] == "b"].to_dict("records")
    greedy = ucb_scores(run, c=0.0, unused_first=False)
    assert (greedy["score"] == greedy["mean_reward"]).all()


def test_no_bank_and_a_damaged_one(tmp_path):
    write_record(tmp_path)
    (tmp_path / "config.yaml").write_text("{}\n")
    assert list(ucb_scores(Run(tmp_path)))[:3] == ["iteration", "task_id", "skill_id"]
    (tmp_path / "bank.sqlite").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="not a skill bank"):
        ucb_scores(Run(tmp_path))
