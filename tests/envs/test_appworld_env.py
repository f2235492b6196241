"""The environment on the real engine."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import gymnasium
import pytest
from gymnasium.error import ResetNeeded
from tests.envs.conftest import block, task_of

from skillsd.testing import check_text_env
from skillsd_appworld import AppWorldEnv, paths


def test_the_contract_is_kept(appworld):
    env = gymnasium.make("skillsd_appworld:skillsd/AppWorld-v0", max_turns=3, limit=1, turn_seconds=20)
    check_text_env(env, split="dev")
    env.close()


def test_tasks_come_in_scenarios_tiers_and_families(env):
    sizes = {split: len(env.tasks(split)) for split in ("train", "dev", "test")}
    assert sum(sizes.values()) >= 120 and min(sizes.values()) >= 24
    listed = [t for split in sizes for t in env.tasks(split)]
    assert len({t["task_id"] for t in listed}) == len(listed) and {t["difficulty"] for t in listed} == {"1", "2", "3"}
    for split in sizes:
        scenarios = [t["scenario"] for t in env.tasks(split)]
        assert all(scenarios.count(s) == 3 for s in scenarios)
        assert all(t["task_id"].startswith(t["scenario"] + "_") for t in env.tasks(split))
    families = json.loads((paths.find_root("tiny") / paths.MARKER).read_text())["families"].values()
    assert len(families) >= 6 and len({app for f in families for app in f["apps"]}) >= 4
    assert {(f["tier"], len(f["apps"])) for f in families} == {(1, 1), (2, 1), (3, 2)}
    with pytest.raises(ValueError, match="the splits are 'dev', 'test', 'train'"):
        env.tasks("test_normal")


def test_tasks_are_chosen_by_tier_number_and_seed(make_env):
    env = make_env(difficulties=[1, "3"], limit=5)
    assert [t["difficulty"] in ("1", "3") for t in env.tasks("train")] == [True] * 5
    _, info = env.reset(seed=3, options={"split": "test"})
    assert info["split"] == "test" and info["difficulty"] in ("1", "3")
    assert env.reset(seed=3, options={"split": "test"})[1]["task_id"] == info["task_id"]
    for options, message in (
        ({"task_id": "t000000_1"}, "not a task"),
        ({"task_id": "../x"}, "not a task"),
        ({"board": "x"}, "unknown key"),
    ):
        with pytest.raises(ValueError, match=message):
            env.reset(options=options)


def test_turns_run_code_and_show_its_output(make_env):
    env = make_env(max_turns=4, max_chars=200)
    observation, info = env.reset(options={"task_id": task_of(env, 1)})
    assert observation.startswith("I am your supervisor: ") and "\nTask: " in observation and "@" in observation
    assert info["instruction"].startswith("You are an assistant") and (info["success"], info["completion"]) == (False, 0.0)
    observation, *_, info = env.step("I had rather talk.")
    assert "no code" in observation and "Turns left: 3." in observation and (info["valid"], info["turn"]) == (False, 1)
    observation, *_, info = env.step(block("x = 41\nprint('a' * 500)"))
    assert f"{'a' * 150}\n[... 301 of 501 characters left out ...]\n{'a' * 49}\n" in observation and info["valid"]
    observation, *_ = env.step("```python\nx = 0\n```" + block("print(x + 1)\nprint({'b': [1]})"))
    assert observation == 'Output:\n```\n42\n{"b": [1]}\n```' == env.render()
    observation, reward, terminated, truncated, info = env.step(block("1 / 0"))
    assert "ZeroDivisionError" in observation and (terminated, truncated) == (False, True)
    assert 0 < reward == info["completion"] < 1 and info["completion_effort"] == 0  # what doing nothing gives
    with pytest.raises(ResetNeeded):
        env.step("")
    env.reset(options={"task_id": task_of(env, 2)})
    assert "NameError" in env.step(block("print(x)"))[0]  # nothing is left of the former episode
    with pytest.raises(TypeError):
        env.step(None)


def test_the_example_of_the_prompt_runs(make_env):
    env = make_env(max_chars=100_000)
    observation, info = env.reset(options={"task_id": task_of(env, 1)})
    text = info["instruction"]
    codes = [part.partition("```")[0] for part in text[: text.index("Rules:")].split("```python\n")[1:]]
    assert len(codes) == 7
    for code in codes[:-1]:
        observation, _, over, *_ = env.step(block(code))
        assert "failed" not in observation and not over, (code, observation)
    assert observation.split("\n")[2].isdigit()


def test_the_task_that_the_processes_warm_up_with(env):
    """What AppWorld remembered of it while it warmed up is not used again."""
    env.reset(options={"task_id": env._pool._warm_task})
    assert env.step(env.solution()[0])[4]["success"]


@pytest.mark.parametrize("tier", [1, 2, 3])
def test_a_task_scores_its_solution_idleness_a_wrong_answer_and_damage(env, tier):
    """The solution, doing nothing, a wrong answer, and a change that nobody asked for."""
    task_id = task_of(env, tier)

    def play(*codes: str) -> dict:
        env.reset(options={"task_id": task_id})
        for code in codes[:-1]:
            assert not env.step(block(code))[2]
        _, reward, terminated, _, info = env.step(block(codes[-1]))
        assert terminated and reward == info["completion"] and "failed" not in info
        return info

    env.reset(options={"task_id": task_id})
    (answer,) = env.solution()
    *_, solved = env.step(answer)
    assert (solved["success"], solved["completion"], solved["completion_effort"], solved["tests_missed"]) == (True, 1.0, 1.0, [])
    tests = set(solved["tests_passed"])
    assert env.solution() == []

    truth = paths.find_root("tiny") / "data" / "tasks" / task_id / "ground_truth"
    labels = {t["requirement"]: t["label"] for t in json.loads((truth / "test_data.json").read_text())}
    assert set(labels) == tests
    env.reset(options={"task_id": task_id})
    nothing = env.finish()
    assert set(nothing["tests_passed"]) == {t for t in tests if labels[t] == "no_op_pass"}
    assert nothing["completion"] == len(nothing["tests_passed"]) / len(tests) and nothing["completion_effort"] == 0

    code = answer.removeprefix("```python\n").removesuffix("\n```")
    wrong = play(
        code.replace("complete_task(", "complete_task(answer='wrong') if True else (")
        if tier != 2
        else "apis.supervisor.complete_task(answer='wrong')"
    )
    assert wrong["tests_missed"] == [t for t in labels if "answer" in t] and not wrong["success"]

    write = (
        "passwords = {p['account_name']: p['password'] for p in apis.supervisor.show_account_passwords()}\n"
        "token = apis.todoist.login(username=apis.supervisor.show_profile()['email'], password=passwords['todoist'])['access_token']\n"
        "apis.todoist.create_project(name='Mine', access_token=token)"
    )
    extra = play(write, code)
    assert not extra["success"] and len(extra["tests_missed"]) == 1


def test_completion_by_effort_is_0_for_doing_nothing(make_env):
    env = make_env(completion="effort", max_turns=1)
    env.reset(options={"task_id": task_of(env, 1)})
    _, reward, *_, info = env.step("nothing")
    assert reward == info["completion"] == info["completion_effort"] == 0.0


def test_the_explorer_finds_its_way(make_env):
    """From the docs alone to a login, for every app that tasks of one app are about."""
    env = make_env(max_chars=100_000)
    for task in [t for t in env.tasks("dev") if t["difficulty"] in ("1", "2")][::3]:
        observation, _ = env.reset(options={"task_id": task["task_id"]})
        agent, seen, over = env.agents["explorer"](), [], False
        while not over:
            observation, reward, over, truncated, info = env.step(agent.act(observation))
            seen.append(observation)
        assert len(seen) == 5 and "access_token" in seen[3] and not truncated and not info["success"] and reward < 1, seen


def test_episodes_side_by_side_do_not_see_each_other(make_env: Callable[..., AppWorldEnv]):
    """Episodes side by side do not see each other, and give what one after another would."""
    envs = [make_env() for _ in range(4)]
    tasks = random.Random(0).sample(envs[0].tasks("test"), 4)

    def play(env: AppWorldEnv, at: int) -> tuple[str, float]:
        env.reset(options={"task_id": tasks[at]["task_id"]})
        seen = env.step(block(f"number = {at}\nprint(apis.supervisor.show_active_task())"))[0]
        assert f"\n{at}\n" in env.step(block("print(number)"))[0]
        return seen, env.step(env.solution()[0])[1]

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(play, envs, range(4)))
    assert together == [play(envs[0], at) for at in range(4)] and {reward for _, reward in together} == {1.0}


@pytest.mark.slow
@pytest.mark.parametrize("third", [0, *(pytest.param(i, marks=pytest.mark.torture) for i in (1, 2))])
def test_every_solution_is_accepted(make_env, third):
    """All tasks of all splits, by AppWorld's own evaluator; and doing nothing passes what is labelled so."""
    envs = [make_env() for _ in range(4)]
    tasks = [t for split in ("train", "dev", "test") for t in envs[0].tasks(split)]
    assert len(tasks) >= 120
    tasks = tasks[third::3]

    def play(at: int) -> list[str]:
        env, wrong = envs[at], []
        for task in tasks[at :: len(envs)]:
            env.reset(options={"task_id": task["task_id"]})
            *_, info = env.step(env.solution()[0])
            if not info["success"]:
                wrong.append(f"{task['task_id']}: {info}")
            env.reset(options={"task_id": task["task_id"]})
            info = env.finish()
            if info["success"] or info["completion_effort"] != 0 or "failed" in info:
                wrong.append(f"{task['task_id']}, nothing done: {info}")
        return wrong

    with ThreadPoolExecutor(len(envs)) as threads:
        assert [w for part in threads.map(play, range(len(envs))) for w in part] == []


def test_official_data_is_read_the_same_way(make_env, tmp_path):
    """A root without the marker, with AppWorld's split names, as `appworld download data` makes it."""
    tiny = paths.find_root("tiny")
    data = tmp_path / "data"
    (data / "datasets").mkdir(parents=True)
    for name in ("api_docs", "base_dbs", "tasks"):
        shutil.copytree(tiny / "data" / name, data / name)
    for name, old in (("train", "train"), ("dev", "dev"), ("test_normal", "test"), ("test_challenge", "test")):
        (data / "datasets" / f"{name}.txt").write_text((tiny / "data" / "datasets" / f"{old}.txt").read_text())
    env = make_env(source="official", root=str(tmp_path))
    assert env.tasks("test_normal") == [{**t, "split": "test_normal"} for t in make_env().tasks("test")]
    env.reset(options={"split": "dev", "task_id": env.tasks("dev")[0]["task_id"]})
    assert env.step(env.solution()[0])[4]["success"]
    with pytest.raises(ValueError, match="set source to tiny"):
        make_env(source="official", root=str(tiny))
