"""The panel's table, as text in the terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.callbacks.test_panel import panel, scenarios_of, scored

from skillsd.analysis.panel import print_report
from skillsd.callbacks.panel import add_validation, summarise, write_panel
from skillsd.files.run_folder import write_record
from skillsd.skills import Skill, SkillBank
from skillsd.statistics import wilson_interval


def validated(checkpoint: str | None, step: int, attempts: int = 1, temperature: float = 0.0) -> dict[str, Any]:
    """What a record of a validation says beside its result."""
    settings = {"env": "e", "env_kwargs": {}, "tasks_file": None, "split": "test", "seeds": [0], "adapter": "student"}
    return {"checkpoint": checkpoint, "step": step, "settings": settings | {"attempts": attempts, "temperature": temperature}}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_the_table_shows_panels_the_bank_and_paths(tmp_path, capsys):
    print_report(tmp_path)
    assert capsys.readouterr().out == ""
    before, after = summarise(panel(0.0, 0.5, 1.0, 0.0)), summarise(panel(1.0, 0.5, 1.0, 0.0))
    write_panel(tmp_path, {"before": before})
    write_panel(tmp_path, {"after": after})
    with SkillBank(tmp_path / "bank.sqlite") as bank:
        bank.insert([Skill("a", "b", "c", "t1"), Skill("a", "b", "d", "t1"), Skill("a", "b", "c", "t2")], 0)
    (tmp_path / "adapter" / "student").mkdir(parents=True)
    write_record(tmp_path)
    (tmp_path / "metrics.csv").touch()
    print_report(tmp_path)
    out = capsys.readouterr().out
    low, high = wilson_interval(1, 4)
    assert "panel of 4 held-out episodes" in out and f"0.250 [{low:.3f}, {high:.3f}]" in out
    assert "after - before, paired" in out and "+0.250 [+0.000, +0.750]" in out
    assert "skill bank: 3 skills of 2 tasks" in out and "pass@" not in out
    assert f"adapter: {tmp_path}/adapter/student\n" in out and f"log: {tmp_path}/metrics.csv\n" in out and "trajectories:" not in out


def test_a_validation_is_added_to_the_table(tmp_path, capsys):
    write_panel(tmp_path, {"before": summarise(panel(0.0, 0.5, 1.0, 0.0)), "after": summarise(panel(1.0, 0.5, 1.0, 0.0))})
    add_validation(tmp_path, validated("runs/a/last.ckpt", 7, 2, 0.5) | summarise(panel(1.0, 0.0, 0.0, 0.0, attempts=2)))
    print_report(tmp_path)
    out = capsys.readouterr().out
    assert "after - before, paired" in out and "+0.250 [+0.000, +0.750]" in out  # a validation takes nothing away
    assert "validate 1: student of runs/a/last.ckpt (step 7); 4 episodes of test, temperature 0.5, 2 attempts\n" in out
    assert "validate 1: pass@1 0.250, pass@2 0.500" in out
    assert "goal completion" not in out and "failed" not in out


def test_a_validation_of_scenarios_counts_failures(tmp_path, capsys):
    episodes = scored({"a": "11", "b": "10"})
    lost = [*episodes[:3], replace(episodes[3], finish_reason="failed", failure="killed")]
    add_validation(tmp_path, validated(None, 0) | summarise(lost, scenarios_of(lost)))
    old = summarise(panel(0.0, 0.5, 1.0, 0.0))
    del old["failed"]  # of an earlier version
    write_panel(tmp_path, {"before": old})
    print_report(tmp_path)
    out = capsys.readouterr().out
    (low, high), (s_low, s_high) = wilson_interval(3, 4), wilson_interval(1, 2)
    assert (
        f"validate 1: task goal completion 0.750 [{low:.3f}, {high:.3f}], scenario goal completion 0.500 [{s_low:.3f}, {s_high:.3f}]\n"
        in out
    )
    assert "validate 1: 1 of 4 episodes failed; they count as not solved\n" in out and out.count("failed") == 1
