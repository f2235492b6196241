"""The command with the real `skillsd fit` on the nano agent."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from skillsd import cli

pytestmark = pytest.mark.slow
STUDY = {
    "configs": ["sokoban.yaml"],
    "methods": {"grpo": ["method/grpo.yaml"], "skillsd": []},
    "seeds": [0, 1],
    "folder": "study",
    "set": {
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False,
        "data.env_kwargs.splits": {"train": {"short": 8}, "test": {"short": 16}},
        "data.batch_tasks": 4,
        "data.group_size": 2,
    },
}


def test_two_methods_and_two_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    assert cli.main(["study", "-c", "study.yaml"]) == 0, capsys.readouterr().out
    assert "4 cells: 0 finished, 4 to run" in capsys.readouterr().out
    with open("study/results.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [(r["method"], r["seed"]) for r in rows] == [("grpo", "0"), ("skillsd", "0"), ("grpo", "1"), ("skillsd", "1")]
    for r in rows:
        folder = Path("study/cells") / r["method"] / f"seed-{r['seed']}"
        panel, config = json.loads((folder / "panel.json").read_text()), yaml.safe_load((folder / "config.yaml").read_text())
        assert float(r["after_success"]) == panel["after"]["success"] and panel["after"]["n"] == 16
        assert config["seed_everything"] == int(r["seed"]) and config["data"]["group_size"] == 2
        assert (config["model"]["objective"]["distillation_weight"] == 0) == (r["method"] == "grpo")
        assert r["iterations"] == "2" and float(r["entropy"]) > 0
    assert len({r["panel"] for r in rows}) == 1 and len({r["before_success"] for r in rows}) == 1
    assert "skillsd" in Path("study/report.md").read_text(encoding="utf-8")
    records = {p: p.stat().st_mtime_ns for p in Path("study/cells").glob("*/*/*")}
    report = Path("study/report.html").read_bytes()
    assert cli.main(["study", "-c", "study.yaml"]) == 0
    assert "4 finished, 0 to run" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in records} == records and Path("study/report.html").read_bytes() == report
    assert cli.main(["study", "-c", "study.yaml", "--set.trainer.max_epochs=2"]) == 2
    assert "was made with other arguments: --trainer.max_epochs=1, --trainer.max_epochs=2" in capsys.readouterr().err
