"""Cells are run once, continued when killed, and refused when they are another's."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from skillsd.errors import ConfigError
from skillsd.study.runner import locked
from skillsd.study.settings import StudySettings


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


def cells_of(studies: Any) -> list[tuple[str, str]]:
    """Method and seed of each row of results.csv."""
    return [(r["method"], r["seed"]) for r in read_csv(studies.folder / "results.csv")]


def test_a_study_from_beginning_to_end(studies):
    assert studies("--threads=2", "--set.trainer.max_epochs=3", '--set.data.splits={"train": 8}') == 0
    assert studies.calls() == ["grpo 0 2", "skillsd 0 2", "grpo 1 2", "skillsd 1 2"], "seed by seed"
    assert "4 cells: 0 finished, 4 to run" in studies.out and "3 left, about" in studies.out
    record = studies.record("skillsd", 1)
    assert (record["state"], record["attempts"], record["exit_code"], record["method"], record["seed"]) == ("finished", 1, 0, "skillsd", 1)
    assert record["arguments"] == [
        *["-c", "plain", "-c", "skillsd"], "--seed_everything=1", "--trainer.max_epochs=3", '--data.splits={"train": 8}',
    ]  # fmt: skip
    assert 0 < record["wall_s"] < 60 and record["version"] and str(studies.base) not in json.dumps(record)
    assert cells_of(studies) == [("grpo", "0"), ("skillsd", "0"), ("grpo", "1"), ("skillsd", "1")]
    assert {p.name for p in studies.folder.iterdir()} >= {"report.md", "report.html", "results.csv", "curves.csv", "differences.png"}
    assert not list(studies.folder.rglob("*.skillsd-tmp"))
    before = {p: p.read_bytes() for p in studies.folder.glob("*.*") if p.suffix != ".lock"}
    assert studies("--threads=2", "--set.trainer.max_epochs=3", '--set.data.splits={"train": 8}') == 0
    assert studies.calls() == [] and "4 finished, 0 to run" in studies.out
    assert {p: p.read_bytes() for p in before} == before, "the same study gives the same report"


def test_a_killed_cell_continues(studies):
    studies.plan = {"grpo-1": {"kill_at": 1}}
    assert studies() == 1
    assert "failed: grpo seed 1 (exit code -9)" in studies.out and "fake fit grpo 1" in studies.out
    assert studies.record("grpo", 1)["state"] == "failed" and len(read_csv(studies.folder / "results.csv")) == 3
    wall = studies.record("grpo", 1)["wall_s"]
    studies.calls()
    assert studies() == 0
    assert studies.calls() == ["grpo 1 1"]
    record = studies.record("grpo", 1)
    assert (record["state"], record["attempts"]) == ("finished", 2) and record["wall_s"] > wall
    log = (studies.folder / "cells/grpo/seed-1/cell.log").read_text()
    assert log.count("fake fit") == 2 and "--- attempt 2" in log
    assert [r["iteration"] for r in read_csv(studies.folder / "cells/grpo/seed-1/metrics.csv")] == list("0123")


def test_a_failing_cell_stops_no_other(studies):
    studies.plan = {"grpo-0": {"fail_at": 2}, "skillsd-1": {"no_after": True}}
    assert studies() == 1
    assert len(studies.calls()) == 4
    assert "error: made to fail" in studies.out and "without `after` in panel.json" in studies.out
    report = (studies.folder / "report.md").read_text()
    assert "Missing cells: failed: grpo 0, skillsd 1." in report
    assert "skillsd cannot be compared with grpo: no seed was finished by both." in report
    studies.plan = {}
    assert studies() == 0 and len(studies.calls()) == 2, "failed cells are tried again"


def test_nothing_finished_makes_no_report(studies):
    studies.plan = {f"{m}-{s}": {"fail_at": 0} for m in ("grpo", "skillsd") for s in (0, 1)}
    assert studies() == 1
    assert not (studies.folder / "report.md").exists()
    with pytest.raises(ConfigError, match=r"no cell of .* is finished"):
        studies("--only_report=true")


@pytest.mark.parametrize("deaf", [False, True])
def test_the_time_limit_interrupts_and_the_same_command_continues(studies, deaf):
    studies.plan = {"skillsd-0": {"sleep": 0.4, "deaf": deaf}}
    assert studies("--time_limit=1.2", grace=0.2) == 0
    assert "3 of 4 cells are left: the same command continues." in studies.out
    record = studies.record("skillsd", 0)
    assert record["state"] == "interrupted" and record["exit_code"] == -(signal.SIGKILL if deaf else signal.SIGINT)
    n_rows = len(read_csv(studies.folder / "cells/skillsd/seed-0/metrics.csv"))
    assert 0 < n_rows < 4
    assert "Missing cells: interrupted: skillsd 0; not started: grpo 1, skillsd 1." in (studies.folder / "report.md").read_text()
    studies.plan = {}
    assert studies() == 0 and "1 finished, 3 to run" in studies.out
    assert studies.record("skillsd", 0)["attempts"] == 2


def test_workers_run_side_by_side(studies):
    studies.plan = {f"{m}-{s}": {"meet": 4} for m in ("grpo", "skillsd") for s in (0, 1)}
    assert studies("--workers=4") == 0
    assert cells_of(studies) == [("grpo", "0"), ("skillsd", "0"), ("grpo", "1"), ("skillsd", "1")]


@pytest.mark.parametrize(
    ("visible", "used"), [("0,1", ["0", "0", "1", "1"]), ("3, 5,", ["3", "3", "5", "5"]), ("2", ["2"] * 4), ("", [""] * 4)]
)
def test_cells_are_spread_over_the_visible_gpus(studies, monkeypatch, visible, used):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    studies.plan = {f"{m}-{s}": {"meet": 4} for m in ("grpo", "skillsd") for s in (0, 1)}
    assert studies("--workers=4") == 0
    logs = [p.read_text() for p in sorted(studies.folder.glob("cells/*/*/cell.log"))]
    assert sorted(log.splitlines()[-1].removeprefix("fake fit").split(" on gpu ")[1] for log in logs) == used


def test_a_gpu_that_is_free_again_gets_the_next_cell(studies, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    studies.plan = {"grpo-0": {"meet": 4}}  # the first GPU is busy until the last cell has begun
    assert studies("--workers=2") == 0
    log = (studies.folder / "cells/grpo/seed-0/cell.log").read_text()
    assert "on gpu 0" in log
    others = [p.read_text() for p in studies.folder.glob("cells/*/*/cell.log") if p.parts[-3:-1] != ("grpo", "seed-0")]
    assert all("on gpu 1" in x for x in others), "one cell keeps the first GPU busy"


CHANGED = {
    "a flag": ("--set.trainer.max_epochs=9", r"grpo seed 0 was made with other arguments: --trainer\.max_epochs=9: delete"),
    "an overlay for all": ("--overlays=[shuffled]", "grpo seed 0 was made with other arguments: shuffled"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_other_arguments_are_refused_before_anything_runs(studies, case):
    flag, message = CHANGED[case]
    assert studies(seeds=(0,)) == 0
    studies.calls()
    with pytest.raises(ConfigError, match=message):
        studies(flag)
    assert studies.calls() == []


def test_a_changed_file_is_refused_but_not_a_comment(studies):
    assert studies(seeds=(0,)) == 0
    (studies.base / "skillsd.yaml").write_text("# a comment\nname:   skillsd\n")
    assert studies(seeds=(0,)) == 0
    (studies.base / "skillsd.yaml").write_text("name: other\n")
    with pytest.raises(ConfigError, match=r"the cell skillsd seed 0 was made with another skillsd: delete"):
        studies()


def test_what_is_edited_while_a_study_runs_is_for_the_next(studies):
    studies.plan = {"grpo-0": {"sleep": 0.3}}
    edited = studies.base / "skillsd.yaml"
    thread = threading.Thread(target=lambda: (until_running(studies), edited.write_text("name: edited\n")))
    thread.start()
    assert studies() == 0
    thread.join()
    for seed in (0, 1):
        log = (studies.folder / f"cells/skillsd/seed-{seed}/cell.log").read_text()
        assert "name: plain name: skillsd" in log and "edited" not in log
    with pytest.raises(ConfigError, match=r"the cell skillsd seed 0 was made with another skillsd: delete"):
        studies()


def test_more_methods_and_seeds_may_be_added_or_left_out(studies):
    assert studies(seeds=(0,)) == 0
    studies.calls()
    assert studies(methods=("grpo", "skillsd", "shuffled")) == 0
    assert len(studies.calls()) == 4
    assert studies(methods=("grpo", "shuffled"), seeds=(1,)) == 0 and studies.calls() == []
    assert cells_of(studies) == [("grpo", "1"), ("shuffled", "1")]


def test_a_cell_that_no_study_made_is_refused(studies):
    folder = studies.folder / "cells/grpo/seed-0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("")
    with pytest.raises(ConfigError, match="no study"):
        studies()
    (folder / "metrics.csv").unlink()
    (folder / "cell.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cell\.json is damaged: delete"):
        studies()
    assert studies.calls() == []


def test_results_are_never_half_written(studies):
    studies.plan = {f"{m}-{s}": {} for m in ("grpo", "skillsd") for s in range(3)}
    path, odd, seen, over = studies.folder / "results.csv", [], set(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            for name in ("results.csv", "curves.csv"):
                if (studies.folder / name).is_file():
                    text = (studies.folder / name).read_text()
                    lines = text.splitlines()
                    seen.add((name, len(lines)))
                    if not text.endswith("\n") or len({line.count(",") for line in lines}) != 1:
                        odd.append(text)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert studies(seeds=(0, 1, 2)) == 0
    finally:
        over.set()
        thread.join()
    assert odd == [] and {n for name, n in seen if name == path.name} == set(range(2, 8))


def until_running(studies: Any) -> None:
    """Wait until the first cell has finished an iteration."""
    metrics, until = studies.folder / "cells/grpo/seed-0/metrics.csv", time.monotonic() + 60
    while not (metrics.is_file() and metrics.read_text().count("\n") > 1) and time.monotonic() < until:
        time.sleep(0.05)


def start(studies: Any, *flags: str) -> subprocess.Popen:
    """The study in a process of its own."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom skillsd.study import study\nbase, fake, *args = sys.argv[1:]\n"
        "sys.exit(study(args, lambda n: f'{base}/{n}.yaml', [sys.executable, fake], 5.0))"
    )
    fake = studies.command()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(studies.base), fake, *studies.args(*flags)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until_running(studies)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_cells_and_loses_nothing(studies, number):
    studies.plan = {"grpo-0": {"sleep": 0.5}}
    thread = threading.Thread(target=lambda: (until_running(studies), os.kill(os.getpid(), number)))
    thread.start()
    assert studies() == 128 + number
    thread.join()
    assert "4 of 4 cells are left: the same command continues." in studies.out
    assert studies.record("grpo", 0)["state"] == "interrupted"
    assert 0 < len(read_csv(studies.folder / "cells/grpo/seed-0/metrics.csv")) < 4
    studies.plan = {}
    assert studies() == 0


def test_the_lock_outlives_a_killed_study_until_its_cells_end(studies):
    studies.plan = {"grpo-0": {"sleep": 0.6}}
    process = start(studies)
    with pytest.raises(ConfigError, match="still runs in"):
        studies()
    process.kill()
    process.communicate()
    with pytest.raises(ConfigError, match="a cell of one that was killed, still runs in"):
        studies()
    panel, until = studies.folder / "cells/grpo/seed-0/panel.json", time.monotonic() + 30
    while not panel.is_file() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.5)
    studies.calls()
    assert studies() == 0
    assert studies.record("grpo", 0)["attempts"] == 2 and len(studies.calls()) == 4


def test_the_cells_obey_ctrl_c_even_where_the_shell_ignores_it(studies, monkeypatch):
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a background job
    try:
        studies.plan = {"grpo-0": {"sleep": 0.5}}
        begun = time.monotonic()
        assert studies("--time_limit=0.8", grace=20.0) == 0
        assert time.monotonic() - begun < 15 and studies.record("grpo", 0)["exit_code"] != -signal.SIGKILL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


def test_a_folder_of_somebody_else_is_no_study_s(tmp_path):
    for name in ("results.csv", "report.md", "notes.png", "cells"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(ConfigError, match=f"folder: .* holds {name}"), locked(tmp_path):
            pass
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "precious")]
        (tmp_path / name).unlink()
    for place in ("file", "file/below", "n" * 300):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="folder: "), locked(tmp_path / place):
            pass


def test_a_path_is_read_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert StudySettings(configs=["a"], methods={"grpo": []}, folder="~/study").folder == str(tmp_path / "study")
