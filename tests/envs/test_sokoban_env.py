"""The environment: its contract, its texts, its rewards."""

import gymnasium as gym
import pytest
from gymnasium.error import ResetNeeded

from skillsd.testing import check_text_env
from skillsd_sokoban.actions import Actions
from skillsd_sokoban.prompts import DEFAULTS

BOARD = "#######\n#PXO__#\n#__XO_#\n#_____#\n#######"
UP, DOWN, LEFT, RIGHT = range(4)


def make(**arguments):
    return gym.make("skillsd_sokoban:skillsd/Sokoban-v0", **{"splits": {"train": {"all": 4}, "test": {"all": 3}}, **arguments})


def play(env, answers, **options):
    env.reset(options={"board": BOARD, **options})
    return [env.step(answer) for answer in answers]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"action_format": "bare"},
        {"action_format": "bare", "separator": " ", "boxes": 1},
        {"actions_per_turn": 4},
        {"source": "reverse_play"},
        {"max_turns": 1, "boxes": 1, "splits": {"train": {"all": 1}}, "difficulties": {"all": {"lengths": [1, 1]}}},
    ],
)
def test_keeps_the_contract(arguments):
    check_text_env(make(**arguments))


def test_first_observation_and_info():
    env = make()
    obs, info = env.reset(options={"board": BOARD})
    assert obs == BOARD == env.render()
    assert info["optimal_length"] == len(env.unwrapped.solution()) == 3
    assert info["completion"] == 0 and info["success"] is False
    assert all(f"\n{symbol} " in info["instruction"] for symbol in "#_OXPTS")
    assert "40 turns" in info["instruction"] and "triple backticks" in info["instruction"]
    assert env.reset(options={"board": BOARD, "instruction": "Go."})[1]["instruction"] == "Go."
    assert make(separator=" ").reset(options={"board": BOARD})[0].splitlines()[1] == "# P X O _ _ #"


def test_the_seed_picks_a_level_of_the_first_split():
    env = make()
    picked = [env.reset(seed=seed) for seed in range(20)]
    assert picked == [env.reset(seed=seed) for seed in range(20)]
    assert {info["task_id"] for _, info in picked} == {f"train-{i:04d}" for i in range(4)}
    assert env.reset(seed=0, options={"split": "test"})[1]["split"] == "test"
    assert env.reset()[1]["split"] == "train"


def test_moves_pushes_and_blocks():
    env = make(action_format="bare")
    steps = play(env, ["up", "right", "right", "right", "right"])
    assert [obs.splitlines()[1] for obs, *_ in steps] == ["#PXO__#", "#_PT__#", "#__SX_#", "#__OPX#", "#__OPX#"]
    assert [info["completion"] for *_, info in steps] == [0, 0.5, 0, 0, 0]
    assert env.unwrapped.solution() is None and env.unwrapped.distance() is None and not env.unwrapped.solvable


def test_a_box_is_not_pushed_into_a_box():
    env = make(action_format="bare")
    env.reset(options={"board": "######\n#PXX_#\n#_OO_#\n######"})
    assert env.step("right")[0].splitlines()[1] == "#PXX_#"


def test_a_solved_level_pays_1_and_ends():
    env = make()
    env.reset(options={"board": BOARD})
    plan = env.unwrapped.solution()
    assert plan[0].startswith("```") and plan[0].endswith("```")
    steps = play(env, plan)
    assert [reward for _, reward, *_ in steps] == [0, 0, 1]
    assert steps[-1][2] is True and steps[-1][3] is False and steps[-1][4]["success"] is True
    assert env.unwrapped.solution() == [] and env.unwrapped.distance() == 0
    with pytest.raises(ResetNeeded):
        env.step("```up```")


def test_truncation_pays_the_completion():
    env = make(max_turns=3, action_format="bare")
    *before, last = play(env, ["right", "no idea", "up"])
    assert [reward for _, reward, *_ in before] == [0, 0]
    assert last[1:4] == (0.5, False, True)
    assert last[4] == {"task_id": last[4]["task_id"], "success": False, "completion": 0.5, "turn": 3, "valid": True}
    solved_last = make(max_turns=3)
    solved_last.reset(options={"board": BOARD})
    assert play(solved_last, solved_last.unwrapped.solution())[-1][1:4] == (1.0, True, False)


def test_step_needs_reset_and_str():
    env = make()
    with pytest.raises(ResetNeeded):
        env.step("```up```")
    env.reset(seed=0)
    with pytest.raises(TypeError, match="str"):
        env.step(1)


def test_unreadable_action_costs_a_turn_and_says_why():
    env = make(invalid_penalty=0.25)
    obs, reward, terminated, truncated, info = play(env, ["up"])[0]
    assert "between triple backticks" in obs and obs.endswith(BOARD)
    assert (reward, terminated, truncated, info["turn"], info["valid"]) == (-0.25, False, False, 1, False)
    assert env.step("```up```")[1] == 0


@pytest.mark.parametrize(
    "answer, moves",
    [
        ("```up```", [UP]),
        ("```\nUP\n```", [UP]),
        ("I think ```left``` is bad, so ```text\ndown\n``` it is", [DOWN]),
        ("```move right```", [RIGHT]),
        ("```setup```", None),
        ("```set-up```", None),
        ("```up left```", None),
        ("up", None),
        ("```up", None),
        ("``````", None),
        ("```up``` or ```none```", None),
        ("", None),
    ],
)
def test_fenced_answers_are_read(answer, moves):
    assert Actions("fenced", 1).read(answer) == moves


@pytest.mark.parametrize(
    "answer, moves",
    [
        ("up", [UP]),
        ("Not left. I go Down.", [DOWN]),
        ("setup", None),
        ("upward", None),
        ("left_1", None),
        ("up, right", [RIGHT]),
        ("\u2191", None),
        ("", None),
    ],
)
def test_bare_answers_are_read(answer, moves):
    assert Actions("bare", 1).read(answer) == moves


def test_answers_with_several_actions():
    fenced, bare = Actions("fenced", 3), Actions("bare", 3)
    assert fenced.read("```up, left\ndown```") == [UP, LEFT, DOWN]
    assert fenced.read("```up up up up```") is None
    assert bare.read("up is blocked, so: left, right down") == [LEFT, RIGHT, DOWN]
    assert bare.read("up left right down") == [LEFT, RIGHT, DOWN]
    for actions in (fenced, bare):
        assert actions.read(actions.text([UP, DOWN])) == [UP, DOWN]


def test_several_actions_a_turn_stop_when_solved():
    env = make(actions_per_turn=10, action_format="bare")
    env.reset(options={"board": BOARD})
    (plan,) = env.unwrapped.solution()
    obs, reward, terminated, *_ = env.step(plan + " left left left")
    assert terminated and reward == 1
    env = make(actions_per_turn=2)
    env.reset(options={"board": BOARD})
    plan = env.unwrapped.solution()
    assert len(plan) == 2
    assert play(env, plan)[-1][2]


def test_plans_solve_every_task():
    env = make()
    for split in ("train", "test"):
        for task in env.unwrapped.tasks(split):
            _, info = env.reset(options=task)
            for left in range(info["optimal_length"], 0, -1):
                plan = env.unwrapped.solution()
                assert len(plan) == left == env.unwrapped.distance()
                last = env.step(plan[0])
            assert last[2] and last[4]["success"]


def test_shaping_is_off_by_default_and_counts_distance():
    answers = ["right", "left", "down", "right", "right"]
    assert [step[1] for step in play(make(action_format="bare"), answers)] == [0, 0, 0, 0, 1]
    env = make(action_format="bare", distance_reward=0.5)
    env.reset(options={"board": BOARD})
    expected = [env.unwrapped.distance()]
    for answer in answers[:4]:
        reward = env.step(answer)[1]
        expected.append(env.unwrapped.distance())
        assert reward == 0.5 * (expected[-2] - expected[-1])
    lost = play(env, ["right", "right", "right", "right"])
    assert lost[2][1] < 0 and lost[3][1] == 0


def test_prompts_can_be_replaced():
    env = make(prompts={"instruction": "", "observation": "{turn}/{turns_left}\n{board}", "invalid": "?{format}"}, action_format="bare")
    obs, info = env.reset(options={"board": BOARD})
    assert obs == "0/40\n" + BOARD and info["instruction"] == ""
    assert env.step("up")[0] == "1/39\n" + BOARD
    assert env.step("?")[0] == "?end with one of up, down, left or right"
    assert set(DEFAULTS) == {"instruction", "observation", "invalid"}


def test_tasks_are_listed_in_the_order_of_their_split():
    env = make(difficulties={"a": {"lengths": [2, 4]}, "b": {"lengths": [8, 9]}}, splits={"dev": {"b": 2, "a": 1}}).unwrapped
    assert env.tasks("dev") == [
        {"task_id": "dev-0000", "split": "dev", "difficulty": "b"},
        {"task_id": "dev-0001", "split": "dev", "difficulty": "b"},
        {"task_id": "dev-0002", "split": "dev", "difficulty": "a"},
    ]
    assert [env.stream("dev", i)["difficulty"] for i in range(6)] == list("bbabba")
    with pytest.raises(ValueError, match="the splits are 'dev'"):
        env.tasks("train")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task_id": "train-0009"}, "train-0000 to train-0003"),
        ({"task_id": "train-1"}, "unknown"),
        ({"task_id": "dev-0000"}, "the splits are"),
        ({"task_id": 3}, "not a task"),
        ({"split": "dev"}, "the splits are"),
        ({"level": 1}, "unknown key 'level'"),
        ({"board": "####\n#TP#\n####"}, "solved already"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make().reset(options=options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": 3}, "size"),
        ({"size": 6.5}, "size"),
        ({"boxes": 0}, "boxes"),
        ({"source": "magic"}, "source"),
        ({"path": "x"}, "path"),
        ({"source": "boxoban"}, "path"),
        ({"source": "boxoban", "path": "/nowhere"}, "path"),
        ({"difficulties": {}}, "difficulties"),
        ({"difficulties": {"all": {"depth": 3}}}, "lengths"),
        ({"difficulties": {"all": {"lengths": [5, 4]}}}, "lengths"),
        ({"difficulties": {"all": {}}}, "lengths"),
        ({"source": "reverse_play", "difficulties": {"all": {"depth": 1}}}, "depth"),
        ({"splits": {}}, "splits"),
        ({"splits": {"train": {"hard": 3}}}, "unknown difficulty 'hard'"),
        ({"splits": {"train": {"all": 0}}}, "splits"),
        ({"splits": {f"name{i}": {"all": 1} for i in range(30)}}, "rename"),
        ({"level_seed": -1}, "level_seed"),
        ({"max_turns": 0}, "max_turns"),
        ({"actions_per_turn": True}, "actions_per_turn"),
        ({"action_format": "json"}, "action_format"),
        ({"separator": "#"}, "separator"),
        ({"prompts": {"greeting": ""}}, "greeting"),
        ({"prompts": {"observation": "{bord}"}}, "observation"),
        ({"prompts": {"observation": "{board:>50000000}"}}, "observation"),
        ({"invalid_penalty": -1}, "invalid_penalty"),
        ({"distance_reward": float("inf")}, "distance_reward"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_large_levels_fall_back_to_search():
    inner = ["#" + "_" * 8 + "#" for _ in range(8)]
    inner[1], inner[2] = "#PXXXX___#", "#_OOOO___#"
    env = make(action_format="bare")
    _, info = env.reset(options={"board": "\n".join(["#" * 10, *inner, "#" * 10])})
    assert info["optimal_length"] is None
    plan = env.unwrapped.solution()
    for answer in plan:
        last = env.step(answer)
    assert last[4]["success"]
    with pytest.raises(ValueError, match="distance_reward"):
        make(distance_reward=1).reset(options={"board": "\n".join(["#" * 10, *inner, "#" * 10])})
