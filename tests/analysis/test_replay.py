"""Paired replay: what differs between a pair is the skill alone."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import yaml

from skillsd import conf_dir
from skillsd.analysis import Run, Scorer
from skillsd.analysis.replay import effect, paired, replay
from skillsd.environment import make_env
from skillsd.errors import ConfigError
from skillsd.files.run_folder import write_record
from skillsd.policy.load import adapter_folder
from skillsd.skills import Skill, SkillBank

N = 12
ENV = {"splits": {"train": {"short": N}, "test": {"short": 1}}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has not trained: the nano agent, and a bank that holds each task's solution (skills 1 to N), then an unhelpful one."""
    folder = tmp_path_factory.mktemp("run")
    config = yaml.safe_load((conf_dir() / "sokoban.yaml").read_text())
    config["data"]["env_kwargs"] |= ENV
    write_record(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    init = config["data"]
    env = make_env(init["env"], init["env_kwargs"])
    skills = []
    for task in env.tasks("train"):
        env.reset(task)
        skills.append(Skill("solved", "none", " ".join(env.solution()), task.task_id, source_reward=1.0))
    env.close()
    with SkillBank(folder / "bank.sqlite") as bank:
        bank.insert([*skills, Skill("unsolved", "avoid", "up up up up up up up up", skills[0].task_id)], 0)
    return Run(folder)


@pytest.fixture(scope="module")
def scorer(run: Run) -> Scorer:
    return Scorer(run, adapter_folder("nano-recover", "nano"))


def test_the_solution_helps(run, scorer):
    frame = replay(scorer, range(1, N + 1), members=2)
    assert list(frame) == ["task_id", "skill", "member", "success", "completion", "turns", "finish_reason"] and len(frame) == 4 * N
    without = frame[frame["skill"].isna()]
    assert without["member"].tolist() == [0, 1] * N and without["task_id"].nunique() == N
    assert frame["skill"].dropna().tolist() == [k for k in range(1, N + 1) for _ in range(2)]
    mean, low, high = effect(frame)
    assert mean > 0.1 and low <= mean <= high
    pd.testing.assert_frame_equal(frame, replay(scorer, range(1, N + 1), members=2))
    others = replay(scorer, range(1, N + 1), tasks=[run.skill(k % N + 1).task_id for k in range(1, N + 1)], members=2)
    assert effect(others)[0] < mean
    pd.testing.assert_frame_equal(
        others[others["skill"].isna()].sort_values(["task_id", "member"]).reset_index(drop=True),
        without.sort_values(["task_id", "member"]).reset_index(drop=True),
    )


def test_a_pair_shares_its_noise(run, scorer, monkeypatch):
    """A skill that says nothing changes nothing, also where draws differ between members and seeds."""
    monkeypatch.setattr(scorer, "template", "")
    frames = [replay(scorer, [1, N + 1, 2], members=6, temperature=3.0, seed=seed) for seed in (0, 1)]
    for frame in frames:
        for _, rows in frame.groupby(["task_id", "member"]):
            assert rows[["success", "completion", "turns"]].drop_duplicates().shape[0] == 1
        assert frame["skill"].isna().sum() == 12 and len(frame) == 30  # two tasks without a skill, three skills
        assert effect(frame, "turns") == (0.0, 0.0, 0.0)
        assert frame[frame["skill"].isna()].groupby("task_id")[["completion", "turns"]].nunique().to_numpy().max() > 1
    assert not frames[0].equals(frames[1])


def test_the_chosen_adapter_acts(scorer):
    teacher, base = (replay(scorer, range(1, N + 1), members=1, temperature=0.0, adapter=a) for a in ("teacher", None))
    assert not teacher.equals(base)
    pd.testing.assert_frame_equal(teacher, replay(scorer, range(1, N + 1), members=1, temperature=0.0, seed=5))  # both are greedy


def test_tasks_of_a_file_bring_their_boards(run, scorer, monkeypatch, tmp_path):
    board = "######\n#P___#\n#_XO_#\n#____#\n#____#\n######"
    path = tmp_path / "tasks.jsonl"
    lines = [{"task_id": name, "split": split, "board": board} for name, split in (("a", "train"), ("b", "test"))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = run.config["data"]
    monkeypatch.setitem(run.config, "data", data | {"tasks_file": str(path)})
    frame = replay(scorer, [1, 2], tasks=["a", "b"], members=1)
    assert set(frame["task_id"]) == {"a", "b"} and set(frame["finish_reason"]) <= {"done", "horizon"}


def test_bad_members_tasks_and_skills_are_refused(scorer):
    with pytest.raises(ConfigError, match="members: 0 episodes"):
        replay(scorer, [1], members=0)
    with pytest.raises(ConfigError, match="tasks: 1 tasks for 2 skills"):
        replay(scorer, [1, 2], tasks=["x"])
    with pytest.raises(KeyError):
        replay(scorer, [99])
    assert replay(scorer, []).empty and paired(replay(scorer, [])).empty


def test_differences_are_those_worked_out_by_hand():
    def rows(task, skill, *successes, end="done"):
        return [(task, skill, m, bool(s), s / 2, 3 + s, end) for m, s in enumerate(successes)]

    listed = [*rows("a", None, 0, 1), *rows("b", None, 0, 0), *rows("a", 1, 1, 1), *rows("b", 2, 1, 1), *rows("b", 3, 0, 1)]
    frame = pd.DataFrame(listed, columns=["task_id", "skill", "member", "success", "completion", "turns", "finish_reason"])
    frame = frame.astype({"skill": "Int64"})
    pairs = paired(frame)
    assert pairs["difference"].groupby(pairs["skill"]).mean().to_dict() == {1: 0.5, 2: 1.0, 3: 0.5}
    assert pairs.loc[pairs["skill"] == 1, ["with", "without"]].to_numpy().tolist() == [[1.0, 0.0], [1.0, 1.0]]
    mean, low, high = effect(frame)
    assert (mean, low, high) == (0.625, 0.5, 0.75)  # tasks 0.5 and 0.75
    assert effect(frame, "completion")[0] == 0.3125 and effect(frame, "turns")[0] == 0.625
    one = effect(frame[frame["task_id"] == "a"])
    assert one[0] == 0.5 and pd.isna(one[1]) and pd.isna(one[2]) and pd.isna(effect(frame[:0])[0])
    frame.loc[4, "finish_reason"] = "failed"  # member 0 of skill 1
    assert paired(frame).query("skill == 1")["member"].tolist() == [1]
