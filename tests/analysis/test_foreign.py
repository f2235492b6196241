"""A run folder from elsewhere: whatever its files hold is shown, or refused in one line; it costs little, and no other run's pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tests.analysis.folders import SHORT
from tests.analysis.view.conftest import hostile

from skillsd.analysis import Run
from skillsd.analysis.index import MAX_LINE
from skillsd.analysis.view import pages
from skillsd.analysis.view.app import create_app
from skillsd.analysis.view.site import Site
from skillsd.callbacks.log import COLUMNS
from skillsd.errors import ConfigError
from skillsd.trajectory import Trajectory

ROW: dict[str, Any] = json.loads(SHORT.to_json())
del ROW["crc32"]
ROUND: dict[str, Any] = {
    "n": 2, "success": 0.5, "success_interval": [0.1, 0.9], "completion": 0.5, "pass_at": {"1": 0.5, "2": 0.5},
    "levels": [{"task_id": "a", "member": m, "seed": 0, "success": True, "completion": 1.0} for m in range(2)],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hostile(tmp_path / "foreign")


def page_of(folder: Path, path: str) -> Any:
    """The viewer's answer for one of the run's pages."""
    with Site([folder]) as site:
        return create_app(site, "t").test_client().get(f"/t/run/{folder.name}/{path}", headers={"Host": "localhost:1"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reward", "x"), ("reward", None), ("reward", 1e308), ("reward", float("nan")), ("reward", True), ("completion", [1]),
        ("task_id", 3), ("task_id", ["a"]), ("task_id", "x" * 1_000_000), ("iteration", "0"), ("iteration", -1), ("iteration", 10**30),
        ("member", 0.5), ("seed", None), ("success", "yes"), ("skill_id", "x"), ("skill_id", 10**30), ("failure", 3),
        ("finish_reason", ["done"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rewritten", [False, True])
def test_a_trajectory_of_other_values_is_named(folder, command, field, value, rewritten):
    line = json.dumps(ROW | {field: value}, separators=None if rewritten else (",", ":"))
    (folder / "trajectories.jsonl").write_text(f"{json.dumps(ROW)}\n{line}\n")
    said = command("show", folder, code=2)
    assert "trajectories.jsonl:2" in said and field in said and len(said) < 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("instruction", 3), ("turns", 3), ("turns", [{"observation": 3, "action": "", "reward": 0.0}]), ("token_ids", ["a"]),
        ("token_ids", []), ("logprobs", ["x"] * 7), ("final_observation", ["a"]),
    ],
)  # fmt: skip
def test_a_trajectory_s_inside_is_checked_when_it_is_read(field, value):
    with pytest.raises(ValueError, match="no trajectory"):
        Trajectory.from_json(json.dumps(ROW | {field: value}))


def test_a_line_without_an_end_is_not_read_whole(folder, command):
    with (folder / "trajectories.jsonl").open("wb") as f:
        f.truncate(8 * MAX_LINE)
    assert str(MAX_LINE) in command("show", folder, code=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", "x"), ("n", None), ("success", "x"), ("success", 1e308), ("success_interval", 3), ("success_interval", [1]),
        ("success_interval", [0.1, None]), ("levels", ["a"]), ("levels", [{"completion": "x"}]), ("pass_at", 3), ("pass_at", {"1": "x"}),
        ("device", ["a"]), ("failed", "x"), ("task_goal_completion", 0.5),
    ],
)  # fmt: skip
def test_a_panel_of_other_values_is_named(folder, field, value):
    record = ROUND | {
        "checkpoint": None,
        "step": 0,
        "settings": dict.fromkeys(("adapter", "split"), "x") | {"attempts": 1, "seeds": [0], "temperature": 0},
    }
    for name, text in (("panel.json", json.dumps({"before": ROUND, "after": ROUND})), ("validations.jsonl", json.dumps(record) + "\n")):
        (folder / name).write_text(text)
    assert set(Run(folder).panel) == {"before", "after", "validations"}
    (folder / "panel.json").write_text(json.dumps({"before": ROUND, "after": ROUND | {field: value}, "validations": 3}))
    with pytest.raises(ConfigError, match=rf"panel\.json is damaged \(after .*{field}"):
        Run(folder).panel  # noqa: B018
    (folder / "panel.json").unlink()
    (folder / "validations.jsonl").write_text(json.dumps(record | {field: value}) + "\n")
    with pytest.raises(ConfigError, match=rf"validations\.jsonl is damaged \(line 1 .*{field}"):
        Run(folder).panel  # noqa: B018


@pytest.mark.parametrize("difference", ["x", {"success": [0.1, 0.0, 0.2]}, {"success": [1], "completion": ["a", 2, 3]}])
def test_a_difference_that_is_none_is_named(folder, difference):
    (folder / "panel.json").write_text(json.dumps({"before": ROUND, "after": ROUND, "difference": difference}))
    with pytest.raises(ConfigError, match="difference"):
        Run(folder).panel  # noqa: B018


@pytest.mark.parametrize(
    "text",
    [
        "iteration,a\n0,1\n",
        "iteration,epoch,a,a\n0,0,1,2\n",
        "iteration,iteration,epoch\n0,0,0\n",
        "iteration,epoch\n0,nan\n",
        "iteration,epoch\n0,1e300\n",
    ],
)
def test_metrics_of_other_columns_are_named(folder, command, text):
    (folder / "metrics.csv").write_text(text)
    assert "metrics.csv" in command("show", folder, code=2)


def test_metrics_that_no_axis_holds_leave_gaps(folder, command):
    odd = {"loss/total": "1e308", "time/rollout_s": "inf", "reward/success": "-inf", "memory/peak_gib": "nan"}
    names = [*COLUMNS, "$\\frac{$", *(f"c{i}" for i in range(150))]
    rows = [dict.fromkeys(names, "1") | {"iteration": str(i), "epoch": "0"} | odd for i in range(3)]
    (folder / "metrics.csv").write_text("\n".join([",".join(names), *(",".join(row.values()) for row in rows)]) + "\n")
    json.loads(command("show", folder, "--json"), parse_constant=pytest.fail)
    page = page_of(folder, "?all=1")
    assert page.status_code == 200 and page.text.count("<svg") == pages.MAX_CURVES


@pytest.mark.parametrize("seed", ["2020-01-01", ".nan", "!!binary aGVsbG8=", "[1, {a: b}]"])
def test_a_configuration_of_other_values_is_shown(folder, command, seed):
    (folder / "config.yaml").write_text(f"seed_everything: {seed}\n")
    assert isinstance(json.loads(command("show", folder, "--json"))["seed"], str)


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


def test_a_configuration_that_grows_is_no_other_run_s_business(folder, tmp_path, monkeypatch):
    """Nor is one that is slow to read: other pages do not wait for it."""
    shutil.copytree(folder, tmp_path / "good")
    (folder / "config.yaml").write_text(BOMB)
    with Site([folder, tmp_path / "good"]) as site:
        client = create_app(site, "t").test_client()

        def get(path: str) -> int:
            return client.get(f"/t/run/{path}", headers={"Host": "localhost:1"}).status_code

        assert [get(f"good/{page}") for page in ("", "tasks", "trajectory/0", "skills")] == [200] * 4
        assert [get(f"foreign/{page}") for page in ("tasks", "trajectory/0", "skills")] == [200] * 3
        assert get("foreign/") == get("good/compare?with=foreign") == 500
        seen: list[int] = []

        def slow(path: Path) -> Any:
            other = Thread(target=lambda: seen.append(get("good/tasks")))
            other.start()
            other.join(60)
            return {}

        monkeypatch.setattr("skillsd.analysis.run.read_config", slow)
        site.runs["foreign"].run.refresh()
        assert get("foreign/tasks") == 200 and seen == [200]


def test_a_template_that_grows_is_said_and_not_filled(folder):
    (folder / "config.yaml").write_text("skills: {template: '{success_analysis:>50000000}'}\n")
    page = page_of(folder, "trajectory/2")
    assert page.status_code == 200 and len(page.data) < 1_000_000 and "skills.template cannot be filled" in page.text


def test_a_task_s_name_forges_no_line_in_a_terminal(folder, command):
    (folder / "trajectories.jsonl").write_text(json.dumps(ROW | {"task_id": "t\n--- done: success True", "failure": "a\nb"}) + "\n")
    out = command("show", folder, "--trajectory", 0)
    assert len([line for line in out.splitlines() if line.startswith("--- done")]) == 1
