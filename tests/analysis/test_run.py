"""A run folder as data frames: what is in them is what the run wrote, also while it writes."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.analysis.folders import SHORT, append
from tests.properties.profile import examples

from skillsd.analysis import Run
from skillsd.analysis.index import Index
from skillsd.callbacks.log import COLUMNS
from skillsd.errors import ConfigError
from skillsd.files.run_folder import write_record
from skillsd.skills import Skill, SkillBank
from skillsd.trajectory import COUNTS, FIELDS, Trajectory, Turn


def numbered(n: int) -> list[Trajectory]:
    return [replace(SHORT, iteration=i // 4, member=i % 4, reward=i / 8, skill_id=i or None) for i in range(n)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    write_record(tmp_path)
    (tmp_path / "config.yaml").write_text("seed_everything: 7\nmodel: {class_path: X}\n")
    append(tmp_path / "trajectories.jsonl", numbered(6))
    return Run(tmp_path)


def expected(t: Trajectory) -> tuple[Any, ...]:
    counts = {"n_turns": len(t.turns), "prompt_tokens": len(t.prompt_ids), "tokens": len(t.token_ids), "action_tokens": t.n_actions}
    return tuple((asdict(t) | counts)[name] for name in (*FIELDS, *COUNTS))


TEXTS = st.text(max_size=20) | st.sampled_from(['"prompt_ids":[', '],"reward":', '{"observation":', ',"crc32":"', "\\", "true", "\ud800"])
TURNS = st.lists(st.builds(Turn, TEXTS, TEXTS, st.floats(-1, 1)), max_size=3).map(tuple)
TRAJECTORIES = st.builds(
    lambda n, m, flags, *rest: Trajectory(*rest[:5], tuple(range(n)), tuple(range(m)), tuple(flags[:m]), (0.0,) * m, *rest[5:]),
    st.integers(0, 3), st.integers(0, 5), st.lists(st.booleans(), min_size=5, max_size=5),
    st.integers(0, 9), TEXTS, st.integers(0, 9), st.integers(0, 9), TEXTS, TURNS, st.floats(-1, 1), st.floats(0, 1), st.booleans(),
    st.sampled_from(["done", "failed"]), st.none() | st.integers(1, 99), TEXTS,
)  # fmt: skip


@examples(100)
@given(st.lists(TRAJECTORIES, max_size=3), st.booleans())
def test_the_index_is_what_the_trajectories_say(tmp_path, rows, foreign):
    path = tmp_path / "trajectories.jsonl"
    append(path, rows, "w")
    if foreign:  # written anew by another program, with spaces and in another order
        path.write_text("".join(json.dumps(json.loads(line), sort_keys=True) + "\n" for line in path.read_text().splitlines()))
    index = Index(path)
    assert index.update() is bool(rows) and index.rows == list(map(expected, rows))
    assert [index.read(i) for i in range(len(rows))] == rows


def test_what_is_appended_is_read_and_what_is_cut_is_forgotten(run):
    path, index = run.folder / "trajectories.jsonl", Index(run.folder / "trajectories.jsonl")
    assert index.update() and len(index) == 6 and not index.update()
    with path.open("a") as f:
        f.write(SHORT.to_json()[:-9])  # under way
    assert not index.update() and len(index) == 6
    os.truncate(path, index.starts[-1])
    append(path, numbered(8)[6:])
    assert index.update() and index.rows == list(map(expected, numbered(8)))
    os.truncate(path, index.starts[4])  # a resumed run; it has written more than there was when it is looked at again
    other = [replace(t, seed=8) for t in numbered(20)[4:]]
    append(path, other)
    assert index.update() and index.rows == list(map(expected, [*numbered(4), *other]))
    path.unlink()
    assert index.update() and not index.update() and len(index) == 0
    append(path, numbered(1))
    assert index.update() and index.read(0) == numbered(1)[0]


def test_a_line_is_read_from_the_file_that_was_looked_at(run, monkeypatch):
    """Another one that takes its place in between is not."""
    path, other, opened = run.folder / "trajectories.jsonl", run.folder / "other", Path.open
    rows = numbered(6)
    run.trajectories  # noqa: B018
    append(other, [replace(t, reward=9.0) for t in rows])
    n = 0

    def swapping(self: Path, *args: Any, **kwargs: Any) -> Any:
        nonlocal n
        n += 1
        found = opened(self, *args, **kwargs)
        other.replace(path)
        return found

    with monkeypatch.context() as m:
        m.setattr(Path, "open", swapping)
        assert run.trajectory(2) == rows[2]
    assert n == 1
    with pytest.raises(ConfigError, match="was cut back"):
        run.trajectory(2)


def test_a_damaged_line_is_named(run):
    path = run.folder / "trajectories.jsonl"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"reward":0.25,"completion"', b'"reward":0.35,"completion"'))
    with pytest.raises(ConfigError, match=r"trajectories\.jsonl:3: the line is not what was written"):
        run.trajectories  # noqa: B018
    path.write_bytes(b'{"iteration":0}\n')
    with pytest.raises(ConfigError, match=r"trajectories\.jsonl:1: the line is no trajectory"):
        run.trajectories  # noqa: B018
    path.write_bytes(data)
    assert len(run.trajectories) == 6
    path.write_bytes(data.replace(b'"seed":7', b'"seed":8'))
    with pytest.raises(ConfigError, match=r"trajectories\.jsonl:5: the line is not what was written"):
        run.trajectory(4)


def test_trajectories_are_a_frame_that_stays_until_refreshed(run):
    frame = run.trajectories
    assert frame.index.name == "trajectory" and list(frame.columns) == [*FIELDS, *COUNTS]
    assert frame["reward"].tolist() == [i / 8 for i in range(6)] and frame["member"].tolist() == [0, 1, 2, 3, 0, 1]
    assert frame["skill_id"].isna().tolist() == [True] + [False] * 5 and frame["skill_id"].dtype == "Int64"
    assert frame["action_tokens"].tolist() == [3] * 6 and frame["tokens"].tolist() == [7] * 6 and frame["success"].dtype == bool
    assert run.trajectory(5) == numbered(6)[5]
    for number in (6, -1):
        with pytest.raises(IndexError, match=f"trajectory {number}: .*has 6"):
            run.trajectory(number)
    append(run.folder / "trajectories.jsonl", [SHORT])
    with pytest.raises(IndexError):
        run.trajectory(6)  # what was read stays as it is
    run.refresh()
    assert run.trajectory(6) == SHORT and len(run.trajectories) == 7
    os.truncate(run.folder / "trajectories.jsonl", run._lines.starts[3])  # a run that goes on
    append(run.folder / "trajectories.jsonl", [replace(SHORT, seed=8)] * 9)
    with pytest.raises(ConfigError, match=r"trajectories\.jsonl was cut back since it was read.*refresh"):
        run.trajectory(1)
    run.refresh()
    assert run.trajectory(3).seed == 8 and len(run.trajectories) == 12
    (run.folder / "trajectories.jsonl").unlink()
    with pytest.raises(ConfigError, match="was cut back"):
        run.trajectory(1)
    run.refresh()
    append(run.folder / "trajectories.jsonl", [SHORT])
    path = run.folder / "trajectories.jsonl"
    path.write_text(json.dumps(json.loads(SHORT.to_json()) | {"skill_id": "x"}) + "\n")
    with pytest.raises(ConfigError, match=r"trajectories\.jsonl:1: .*skill_id"):
        run.trajectories  # noqa: B018


def test_turns_and_tokens_are_rows_of_their_trajectories(run):
    turns = run.turns([1, 3])
    assert turns.to_dict("list") == {
        "trajectory": [1, 1, 3, 3], "turn": [0, 1, 0, 1], "observation": ["s0", "s1"] * 2, "action": ["up", "left"] * 2,
        "reward": [0.0, 1.0] * 2, "next_observation": ["s1", "s2"] * 2,
    }  # fmt: skip
    tokens = run.tokens(2)
    assert tokens["token_id"].tolist() == list(SHORT.token_ids) and tokens["sampled"].tolist() == list(SHORT.action_mask)
    assert tokens["turn"].tolist() == [0, 0, 1, 1, 1, 2, 2] and set(tokens["trajectory"]) == {2}
    assert tokens.loc[tokens["sampled"], "logprob"].tolist() == [-0.5, -0.25, -1.0] and tokens["logprob"].isna().sum() == 4
    pd.testing.assert_frame_equal(run.tokens(run.trajectories.index[2]), run.tokens(np.int64(2)))
    assert list(run.turns([])) == list(turns) and list(run.tokens([])) == list(tokens)


def test_events_and_skills_are_the_bank_s(run):
    def skill(text: str, task_id: str, reward: float) -> Skill:
        return Skill(text, text, text, task_id, source_reward=reward, source_completion=reward, source_member=2)

    assert run.events.empty and run.skills.empty and run.retrievals.empty
    with SkillBank(run.folder / "bank.sqlite", capacity=1) as bank:
        bank.insert([skill("a", "t1", 0.5), skill("b", "t2", 0.25)], 0)
        bank.record_use(1, 1, reward=1.0, gap=-0.5)
        bank.record_use(2, 1)
        bank.insert([skill("a", "t1", 0.5), skill("c", "t1", 1.0)], 2)
        run.refresh()
        assert list(zip(run.events["kind"], run.events["iteration"], run.events["task_id"], run.events["skill_id"], strict=True)) == [
            ("insert", 0, "t1", 1), ("insert", 0, "t2", 2), ("use", 1, "t1", 1), ("use", 1, "t2", 2), ("merge", 2, "t1", 1),
            ("insert", 2, "t1", 3), ("evict", 2, "t1", 1),
        ]  # fmt: skip
        assert run.retrievals.index.tolist() == [3, 4] and run.retrievals["reward"].tolist()[0] == 1.0
        assert run.retrievals["gap"].isna().tolist() == [False, True]
        skills = run.skills
        assert skills.index.tolist() == [1, 2, 3] and skills["golden_workflow"].tolist() == ["a", "b", "c"]
        assert skills["uses"].tolist() == [1, 1, 0] and skills["sources"].tolist() == [2, 1, 1]
        assert skills["inserted"].tolist() == [0, 0, 2] and skills["evicted"].fillna(-1).tolist() == [2, -1, -1]
        assert run.skill(np.int64(3)) == bank.get(3)
        with pytest.raises(KeyError):
            run.skill(4)
        for i in (1, 2, 3):
            assert skills.loc[i, list(asdict(bank.get(i)).keys() - {"skill_id"})].to_dict() == {
                k: v for k, v in asdict(bank.get(i)).items() if k != "skill_id"
            }
    bank_bytes = bytearray((run.folder / "bank.sqlite").read_bytes())
    bank_bytes[:16] = b"x" * 16
    (run.folder / "bank.sqlite").write_bytes(bank_bytes)
    run.refresh()
    with pytest.raises(ConfigError, match="not a skill bank"):
        run.events  # noqa: B018


def test_metrics_panel_and_configuration_are_the_files(run):
    assert run.metrics.empty and run.panel == {} and run.config == {"seed_everything": 7, "model": {"class_path": "X"}}
    row = dict.fromkeys(COLUMNS, "0.1") | {"iteration": "0", "epoch": "0", "loss/total": repr(0.1 + 0.2), "teacher/k3": ""}
    (run.folder / "metrics.csv").write_text(",".join(COLUMNS) + "\n" + ",".join(row.values()) + "\n")
    (run.folder / "panel.json").write_text('{"before": {"n": 3, "success": 0.5, "success_interval": [0, 1], "levels": []}}')
    run.refresh()
    assert run.metrics.loc[0, "loss/total"] == 0.1 + 0.2 and pd.isna(run.metrics.loc[0, "teacher/k3"]) and run.panel["before"]["n"] == 3
    row |= {"iteration": "1", "teacher/k3": "0.0", "teacher/gap_mean": "0.0"}  # no teacher was scored, which is no agreement
    with (run.folder / "metrics.csv").open("a") as f:
        f.write(",".join(row.values()) + "\n" + "2,0,0.1")  # one is under way
    run.refresh()
    assert len(run.metrics) == 2 and run.metrics["teacher/gap_mean"].isna().tolist() == [False, True]
    (run.folder / "metrics.csv").write_text(",".join(COLUMNS) + "\n")  # begun
    run.refresh()
    assert len(run.metrics) == 0 and run.metrics["loss/total"].tolist() == []
    (run.folder / "metrics.csv").write_text("")
    run.refresh()
    assert len(run.metrics) == 0
    metrics = [b"a\n1\n", b"iteration,epoch\n0,x\n", b"\xff\n", b"iteration,epoch\n0\n", b"iteration,epoch\n1,0\n3,0\n"]
    bad = [
        *(("metrics.csv", content) for content in metrics),
        ("config.yaml", b"{"),
        ("config.yaml", b"3"),
        ("panel.json", b"["),
        ("panel.json", b'{"after": {"n": 3}}'),
        ("panel.json", b'{"after": 3}'),
    ]
    for name, content in bad:
        (run.folder / name).write_bytes(content)
        run.refresh()
        with pytest.raises(ConfigError, match=name):
            getattr(run, name.partition(".")[0])


def test_an_unknown_finish_reason_is_none_of_ours(run):
    """It would be shown as it is."""
    line = SHORT.to_json().rpartition(',"crc32"')[0].replace('"done"', '"\\u001b[2Jgone"')
    path = run.folder / "trajectories.jsonl"
    for text in (f"{line}}}\n", json.dumps(json.loads(f"{line}}}"), indent=None) + "\n"):  # as we write it, and as another program does
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"finish_reason is '\\x1b\[2Jgone'"):
            run.refresh()
            _ = run.trajectories


def test_a_folder_with_an_imported_bank_alone(tmp_path):
    with SkillBank(tmp_path / "bank.sqlite") as bank:
        bank.insert([Skill("s", "m", "w", "t1")], -1)
    run = Run(tmp_path)
    assert run.skills["inserted"].tolist() == [-1] and run.metrics.empty and run.trajectories.empty and run.config == {}


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is no run folder .*name one that fit has made"):
        Run(tmp_path)
    with pytest.raises(AttributeError, match="nosuch"):
        import skillsd.analysis

        skillsd.analysis.nosuch  # noqa: B018


def test_tokens_and_texts_stay_on_the_disk(run):
    long = replace(SHORT, token_ids=(123456,) * 4000, action_mask=(True,) * 4000, logprobs=(-0.123456,) * 4000)
    append(run.folder / "trajectories.jsonl", [long] * 100)
    size = (run.folder / "trajectories.jsonl").stat().st_size
    tracemalloc.start()
    try:
        assert run.trajectories["tokens"].iloc[-1] == 4000
        assert tracemalloc.get_traced_memory()[1] < size / 10
    finally:
        tracemalloc.stop()
