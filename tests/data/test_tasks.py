"""Tasks from a file."""

from __future__ import annotations

import pytest
from tests.sokoban import BOARD, ENV, KWARGS, TWO_TASKS, write_jsonl

from skillsd.environment import make_env
from skillsd.errors import ConfigError


def test_tasks_bring_their_own_boards(set_up_data, tmp_path):
    boards = [BOARD, BOARD.replace("O", "_").replace("#___#", "#__O#")]
    lines = [{"task_id": f"own-{i}", "split": "train", "difficulty": "x", "board": b} for i, b in enumerate(boards)]
    held_out = {"task_id": "held\u2028out", "split": "test", "board": boards[0], "instruction": "move the box ."}
    data = set_up_data(tasks_file=write_jsonl(tmp_path / "tasks.jsonl", *lines, "", held_out))
    assert [(t.task_id, t.difficulty, dict(t.options)) for t in data.train_tasks] == [
        (f"own-{i}", "x", {"board": b}) for i, b in enumerate(boards)
    ]
    (batch,) = data.train_dataloader()
    assert {g.task.task_id: g.trajectories[0].turns[0].observation for g in batch} == {f"own-{i}": b for i, b in enumerate(boards)}
    ((t,),) = data.val_dataloader()
    assert t.instruction == "move the box ." and t.task_id == "held\u2028out"


def test_scenarios_come_from_the_environment_or_the_file(set_up_data, tmp_path, monkeypatch):
    """From the environment's tasks, or a file's; most have none."""
    assert {t.scenario for t in set_up_data().panel_tasks} == {""}
    lines = [{"task_id": f"own-{i}", "split": s, "board": BOARD, **more} for i, (s, more) in enumerate(
        [("train", {"scenario": "a"}), ("test", {"scenario": "b"}), ("test", {"scenario": None}), ("test", {})]
    )]  # fmt: skip
    data = set_up_data(tasks_file=write_jsonl(tmp_path / "tasks.jsonl", *lines))
    tasks = data.train_tasks + data.panel_tasks
    assert [t.scenario for t in tasks] == ["a", "b", "", ""] and all(dict(t.options) == {"board": BOARD} for t in tasks)
    listed = type(make_env(ENV, KWARGS).unwrapped).tasks
    monkeypatch.setattr(
        "skillsd_sokoban.env.SokobanEnv.tasks", lambda env, split: [t | {"scenario": t["task_id"][:6]} for t in listed(env, split)]
    )
    assert [t.scenario for t in set_up_data().panel_tasks] == ["test-0"] * 3


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{not json", "JSON object"),
        ('{"task_id": "c"', "JSON object"),
        ("[1, 2]", "JSON object"),
        ("3", "JSON object"),
        ('"text"', "JSON object"),
        ('{"split": "train"}', "task_id"),
        ('{"task_id": "c"}', "split"),
        ('{"task_id": null, "split": "train"}', "task_id"),
        ('{"task_id": ["c"], "split": "train"}', "task_id"),
        ('{"task_id": "a", "split": "train"}', "repeats the task_id a"),
    ],
)
def test_a_bad_line_is_named(set_up_data, tmp_path, line, why):
    path = write_jsonl(tmp_path / "tasks.jsonl", *TWO_TASKS, line)
    with pytest.raises(ConfigError, match=rf"data\.tasks_file: .*tasks\.jsonl:3 .*{why}"):
        set_up_data(tasks_file=path)


def test_bad_task_files_are_refused(set_up_data, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tasks_file: no file"):
        set_up_data(tasks_file=str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match=r"data\.panel_split: .* no task of split test"):
        set_up_data(tasks_file=write_jsonl(tmp_path / "a.jsonl", TWO_TASKS[0]))
    both = write_jsonl(tmp_path / "b.jsonl", *TWO_TASKS, {"task_id": "a", "split": "test"})
    with pytest.raises(ConfigError, match=r"train_split and panel_split share 1 tasks \(a"):
        set_up_data(tasks_file=both)
    (tmp_path / "c.jsonl").write_bytes(b'{"task_id": "\xff", "split": "test"}\n')
    with pytest.raises(ConfigError, match=r"data\.tasks_file: .*c\.jsonl"):
        set_up_data(tasks_file=str(tmp_path / "c.jsonl"))
