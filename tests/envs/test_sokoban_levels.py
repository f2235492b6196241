"""Levels, solving, generation and splits."""

import random
from hashlib import blake2b

import gymnasium as gym
import pytest

from skillsd_sokoban import Level, solve
from skillsd_sokoban.level import read_boxoban
from skillsd_sokoban.rng import Rng
from skillsd_sokoban.solve import Solver
from skillsd_sokoban.splits import buckets, level_bucket

MAP = "######\n#_P__#\n#_X__#\n#__OX#\n#_T_O#\n######"
BOXOBAN = "; 0\n#####\n#@$.#\n#   #\n#####\n\n; 1\n######\n#+$ *#\n# $. #\n#    #\n######\n"


def make(**arguments):
    return gym.make("skillsd_sokoban:skillsd/Sokoban-v0", **arguments).unwrapped


def levels(env, split):
    return [level for _, level in env._levels.listed(split)]


def forward_distance(level, player, boxes):
    """Brute force: breadth-first over sets of coordinates, sharing no code with the solver."""
    rows = level.text().splitlines()
    wall = {(r, c) for r, row in enumerate(rows) for c, s in enumerate(row) if s == "#"}
    goal = frozenset(divmod(i, level.width) for i in range(level.height * level.width) if level.targets >> i & 1)
    start = divmod(player, level.width), frozenset(divmod(i, level.width) for i in range(level.height * level.width) if boxes >> i & 1)
    queue, seen = [(start, 0)], {start}
    for ((r, c), now), distance in queue:
        if now == goal:
            return distance
        for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            to, beyond = (r + dr, c + dc), (r + 2 * dr, c + 2 * dc)
            if to in wall or (to in now and (beyond in wall or beyond in now)):
                continue
            state = to, (now - {to} | {beyond} if to in now else now)
            if state not in seen:
                seen.add(state)
                queue.append((state, distance + 1))
    return None


def test_a_level_is_its_text():
    level = Level.from_text(MAP)
    assert level.text() == MAP
    assert Level.from_text(level.text(" "), " ") == level
    assert Level.from_text(level.text("."), ".") == level
    assert not level.solved


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no rows"),
        ("###\n##", "differ in length"),
        ("####\n#?P#\n####", "unknown symbols"),
        ("####\n#XO#\n####", "exactly one player"),
        ("#####\n#PXO_\n#####", "border"),
        ("#####\n#PXX#\n#####", "as many boxes"),
        ("####\n#P_#\n####", "as many boxes"),
    ],
)
def test_bad_maps_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Level.from_text(text)


def test_symmetric_levels_share_form_bucket_and_distance():
    level = Level.from_text("#####\n#PXO#\n#___#\n#_#_#\n#___#\n#####")
    images = level.symmetries()
    assert len(set(images)) == 8
    assert images[0] == level
    assert {image.canonical() for image in images} == {level.canonical()}
    assert {level_bucket(image) for image in images} == {level_bucket(level)}
    assert {solve.solver(image).distance(image.player, image.boxes) for image in images} == {1}
    assert level.canonical() != Level.from_text("#####\n#_XO#\n#P__#\n#_#_#\n#___#\n#####").canonical()


@pytest.mark.parametrize("boxes", [1, 2, 3])
def test_the_solver_agrees_with_brute_force(boxes, monkeypatch):
    env = make(boxes=boxes, difficulties={"all": {"lengths": [1, 60]}})
    chance = random.Random(boxes)
    unsolvable = 0
    for i in range(8):
        level = env._levels.at("pretrain", i)
        floor = [c for c in range(36) if level.floor >> c & 1]
        table = solve.solver(level)
        monkeypatch.setattr(solve, "MAX_ARRANGEMENTS", 0)
        search = Solver(level.width, level.walls, level.floor, level.targets)
        monkeypatch.undo()
        assert table.exact and not search.exact
        for _ in range(12):
            player, *rest = chance.sample(floor, boxes + 1)
            mask = sum(1 << c for c in rest)
            expected = forward_distance(level, player, mask)
            unsolvable += expected is None
            assert table.distance(player, mask) == expected
            assert search.distance(player, mask) == expected
            assert (table.plan(player, mask) is None) == (expected is None)
    assert unsolvable


def test_lengths_are_exact_and_in_the_band():
    env = make(difficulties={"short": {"lengths": [3, 5]}, "long": {"lengths": [18, 24]}}, splits={"train": {"short": 12, "long": 6}})
    for task in env.tasks("train"):
        low, high = (3, 5) if task["difficulty"] == "short" else (18, 24)
        _, info = env.reset(options=task)
        assert low <= info["optimal_length"] <= high
        assert info["completion"] == 0
        level = env._level
        assert forward_distance(level, level.player, level.boxes) == info["optimal_length"]


def test_reverse_play_levels_are_valid():
    env = make(source="reverse_play", difficulties={"d": {"depth": 20}}, splits={"train": {"d": 20}})
    for level in levels(env, "train"):
        assert level.boxes.bit_count() == level.targets.bit_count() == 2
        assert not level.targets & (level.boxes | 1 << level.player)
        assert solve.solver(level).distance(level.player, level.boxes)


@pytest.mark.parametrize("source", ["solver", "reverse_play"])
def test_splits_are_disjoint_up_to_symmetry(source):
    names = ("train", "val", "test", "pretrain", "own")
    env = make(source=source, boxes=1, splits={name: {"all": 25} for name in names})
    forms = {name: [level.canonical() for level in levels(env, name)] for name in names}
    for name in names:
        assert len(set(forms[name])) == 25
        for other in names:
            assert name == other or not set(forms[name]) & set(forms[other])
    rooms = {name: {level.canonical_room() for level in levels(env, name)} for name in names}
    assert not rooms["train"] & rooms["test"]


def test_every_bucket_has_one_owner():
    owned = [bucket for name in ("pretrain", "train", "val", "test") for bucket in buckets(name)]
    assert len(set(owned)) == len(owned)
    assert not set(buckets("anything else")) & set(owned)


def test_list_is_the_stream_without_duplicates():
    env = make(size=5, boxes=1, splits={"train": {"all": 40}})
    seen, expected, index = set(), [], 0
    while len(expected) < 40:
        level = Level.from_text(env.stream("train", index)["board"])
        index += 1
        if level.canonical() not in seen:
            seen.add(level.canonical())
            expected.append(level)
    assert index > 40
    assert levels(env, "train") == expected


def test_stream_depends_on_the_index_alone():
    forward, backward = make(boxes=1), make(boxes=1, level_seed=0, splits={"val": {"all": 3}})
    ahead = [forward.stream("pretrain", i) for i in range(10)]
    assert [backward.stream("pretrain", i) for i in range(9, -1, -1)] == ahead[::-1]
    assert [make(boxes=1, level_seed=1).stream("pretrain", i)["board"] for i in range(10)] != [task["board"] for task in ahead]
    for task in ahead[:3]:
        obs, info = forward.reset(options=task)
        assert (obs, info["task_id"]) == (task["board"], task["task_id"])
        assert forward.reset(options={"task_id": task["task_id"]})[0] == task["board"]


GOLDEN = {("solver", 1): "5842201a24da6565", ("solver", 2): "b42b4624e9f383c8", ("reverse_play", 2): "a2b25aca514a8495"}


def test_golden_levels():
    """Levels must not change with the Python version or the machine; a change here changes every published split."""
    golden = {}
    for source, boxes in (("solver", 1), ("solver", 2), ("reverse_play", 2)):
        env = make(source=source, boxes=boxes, splits={"train": {"all": 20}, "test": {"all": 10}})
        text = "\n\n".join(level.text() for split in ("train", "test") for level in levels(env, split))
        golden[source, boxes] = blake2b(text.encode(), digest_size=8).hexdigest()
    assert golden == GOLDEN


def test_random_numbers_are_fixed():
    rng = Rng("key")
    assert [rng.below(10) for _ in range(8)] == [3, 1, 1, 6, 7, 1, 6, 7]
    assert sorted(rng.sample(range(5), 5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(size=5, boxes=1, difficulties={"all": {"lengths": [5, 6]}}, splits={"train": {"all": 5000}}),
            r"splits\['train'\]\['all'\] = 5000: only",
        ),
        (dict(difficulties={"all": {"lengths": [90, 95]}}, splits={"train": {"all": 1}}), r"difficulties\['all'\]"),
    ],
)
def test_a_split_that_cannot_be_filled_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments).tasks(next(iter(arguments["splits"])))


def test_boxoban_files_are_read(tmp_path):
    (tmp_path / "a.txt").write_text(BOXOBAN)
    first, second = read_boxoban(tmp_path / "a.txt")
    assert first.text() == "#####\n#PXO#\n#___#\n#####"
    assert second.text() == "######\n#SX_T#\n#_XO_#\n#____#\n######"
    (tmp_path / "bad.txt").write_text("; 7\n####\n#@$#\n####\n")
    with pytest.raises(ValueError, match="level 7"):
        list(read_boxoban(tmp_path / "bad.txt"))


def test_boxoban_levels_are_split_by_their_form(tmp_path):
    to_boxoban = str.maketrans("_OXPTS", " .$@*+")
    made = [Level.from_text(make().stream("train" if i % 2 else "test", i)["board"]) for i in range(16)]
    (tmp_path / "hard").mkdir()
    for name, part in (("hard/000.txt", made[:8]), ("001.txt", [*made[8:], made[0].symmetries()[3]])):
        (tmp_path / name).write_text("".join(f"; {i}\n{level.text().translate(to_boxoban)}\n\n" for i, level in enumerate(part)))
    env = make(source="boxoban", path=str(tmp_path), splits={"train": {"all": 8}, "test": {"all": 8}})
    assert {level.canonical() for level in levels(env, "train")} == {level.canonical() for level in made[1::2]}
    assert {level.canonical() for level in levels(env, "test")} == {level.canonical() for level in made[::2]}
    assert env.stream("train", 0)["board"] == env.stream("train", 8)["board"]
    hard = {"hard": {"files": "hard/*"}}
    assert levels(make(source="boxoban", path=str(tmp_path), difficulties=hard, splits={"train": {"hard": 4}}), "train") == made[1:8:2]
    with pytest.raises(ValueError, match="only 8 distinct"):
        make(source="boxoban", path=str(tmp_path), splits={"test": {"all": 9}}).tasks("test")
    with pytest.raises(ValueError, match="no Boxoban level"):
        make(source="boxoban", path=str(tmp_path)).stream("other", 0)
