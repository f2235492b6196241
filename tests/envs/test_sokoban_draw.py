"""Pictures: what `render` and `picture` draw, and the map found in any text."""

from itertools import combinations

import gymnasium as gym
import numpy as np
import pytest

from skillsd_sokoban.draw import CELL, MAX_CELLS, draw
from skillsd_sokoban.level import SYMBOLS, Level

BOARD = "#######\n#PXO__#\n#__XO_#\n#_____#\n#######"
EACH = "#########\n#_______#\n#_XOPT__#\n#########", "########\n#______#\n#_SX___#\n########"


def make(**arguments):
    return gym.make("skillsd_sokoban:skillsd/Sokoban-v0", **{"splits": {"train": {"all": 4}}, "action_format": "bare", **arguments})


def cell(picture, row, column):
    return picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


def drawn(text):
    return draw(Level.from_text(text))


def test_each_symbol_has_a_tile_of_its_own():
    first, second = map(drawn, EACH)
    tiles = {
        s: cell(p, 2, text.split("\n")[2].index(s)) for text, p in zip(EACH, (first, second), strict=True) for s in text.split("\n")[2]
    }
    assert set(tiles) == set(SYMBOLS)
    for a, b in combinations(tiles.values(), 2):
        assert (np.abs(a.astype(int) - b).max(2) > 40).mean() > 0.1  # easily told apart
    floor = cell(first, 2, 6).astype(int)
    assert np.array_equal(floor, floor[:, ::-1]) and floor.min() > 160  # nothing lies on it
    assert np.array_equal(cell(first, 2, 6), cell(first, 2, 7)) and not np.array_equal(
        cell(first, 1, 6), cell(first, 2, 6)
    )  # a wall's shadow


def test_render_rgb_array_is_the_present_map():
    env = make(render_mode="rgb_array")
    assert env.reset(options={"board": BOARD})[0] == BOARD
    first = env.render()
    assert first.shape == (5 * CELL, 7 * CELL, 3) and first.dtype == np.uint8 and np.array_equal(first, drawn(BOARD))
    seen = env.step("right")[0]
    assert np.array_equal(env.render(), drawn(seen)) and not np.array_equal(env.render(), first)
    env.render()[:] = 0  # the caller's own
    assert np.array_equal(env.render(), drawn(seen))


@pytest.mark.parametrize("separator", ["", " ", " | ", ".*"])
def test_picture_of_whatever_the_environment_says(separator):
    prompts = {"observation": "Turn {turn}, ## the map: {board} <- {turns_left} left.\n#\n", "invalid": "{message}\n\n{board}"}
    for env in (make(separator=separator), make(separator=separator, prompts=prompts)):
        said, _ = env.reset(options={"board": BOARD})
        assert np.array_equal(env.unwrapped.picture(said), drawn(BOARD))
        said, *_, info = env.step("what? ### no")
        assert not info["valid"] and np.array_equal(env.unwrapped.picture(said), drawn(BOARD))
        said, *_ = env.step("right")
        assert np.array_equal(env.unwrapped.picture(said), drawn(BOARD.replace("PXO", "_PT")))


def test_picture_takes_the_last_map_and_thick_walls():
    thick = "######\n######\n#PXO_#\n######\n######"
    picture = make().unwrapped.picture
    assert np.array_equal(picture(f"{BOARD}\nand\n{thick}"), drawn(thick))
    assert np.array_equal(picture(f"{thick}\nand\n{BOARD}\n#P#\n#P#"), drawn(BOARD))


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"###",
        "",
        "no map",
        "#" * 10_000,
        "###\n" * 10_000,
        "#_#\n" * 10_000,
        BOARD.replace("P", "_"),
        BOARD.replace("O", "_"),
        BOARD[8:],
        BOARD.replace("P", "\ud800"),
        BOARD.replace("\n", "\r\n"),
        "\x1b[2J" + BOARD.replace("#_", "#<"),
        "\n".join(["#" * MAX_CELLS, "#PXO" + "#" * (MAX_CELLS - 4), "#" * MAX_CELLS]),
    ],
    ids=range(14),
)
def test_no_picture_where_there_is_no_map(text):
    assert make(separator="").unwrapped.picture(text) is None
