"""The picture of a map: tiles drawn from code, and the map found in a text."""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from skillsd_sokoban.level import SYMBOLS, WALL, Level

CELL = 32
"""Pixels of a cell's side."""
MAX_CELLS = 64 * 64
"""A larger map has no picture."""

Image = NDArray[np.uint8]
_FINE = 4  # a tile is drawn so many times larger, then averaged: smooth edges
_y, _x = (np.mgrid[: CELL * _FINE, : CELL * _FINE] + 0.5) / _FINE
_RIM = 5  # rows of pixels under a wall that lie in its shadow

_SLAB, _JOINT = 0xE6DDCB, 0xD3C8B3
_BRICKS, _MORTAR = (0x6B7592, 0x5F6984, 0x707B99, 0x646E8A), 0x434B61
_RING = 0xD0405C
_WOOD = 0xD9A15B, 0xC28643, 0x87572A  # planks, frame, outline
_WOOD_ON_TARGET = 0x7DBB73, 0x589A55, 0x2F6136  # the same, on a target
_SKIN, _CAP, _PEAK, _SHIRT, _TROUSERS, _INK = 0xF3C9A0, 0xE2502F, 0xAD3418, 0x2F7ED8, 0x1D4C94, 0x1F2536


def draw(level: Level) -> Image:
    """[H * CELL, W * CELL, 3]."""
    grid = np.array([SYMBOLS.index(c) for c in level.cells()]).reshape(level.height, level.width)
    shaded = (grid[1:] != SYMBOLS.index(WALL)) & (grid[:-1] == SYMBOLS.index(WALL))  # a wall stands above
    index = grid + len(SYMBOLS) * np.pad(shaded, ((1, 0), (0, 0)))
    return _tiles()[index].transpose(0, 2, 1, 3, 4).reshape(level.height * CELL, level.width * CELL, 3)


def find(text: str, separator: str = "") -> Level | None:
    """The last map in a text; words may stand before its first row and behind its last one. None where there is none to draw."""
    step, symbol = 1 + len(separator), f"[{SYMBOLS}]"
    row = re.compile(f"{symbol}(?:{re.escape(separator)}{symbol}){{2,}}")
    lines = text.split("\n")
    for first, last in reversed(list(_blocks([len(line) if row.fullmatch(line) else 0 for line in lines]))):
        rows = lines[first:last]
        width = len(rows[0][::step])
        wall = separator.join(WALL * width)
        if first and lines[first - 1].endswith(wall):
            rows.insert(0, wall)
        if last < len(lines) and lines[last].startswith(wall):
            rows.append(wall)
        if width * len(rows) <= MAX_CELLS:
            try:
                return Level.from_text("\n".join([line[::step] for line in rows]))
            except ValueError:
                pass  # it looks like rows and is no map
    return None


def _blocks(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """[start, end) of each run of one length; 0 is none."""
    end = 0
    for length, run in groupby(lengths):
        start, end = end, end + len(list(run))
        if length:
            yield start, end


# -- tiles: float canvases [CELL * _FINE, CELL * _FINE, 3], coordinates in pixels of the tile ------------------------------------------


@lru_cache(maxsize=1)
def _tiles() -> Image:
    """[2 * len(SYMBOLS), CELL, CELL, 3]: a tile for each symbol, then the same ones in the shadow of a wall."""
    layers: list[list[Callable[[NDArray], None]]] = [[_wall], [], [_target], [_box], [_player], [_box_on_target], [_target, _player]]
    out = []
    for shadow in (False, True):
        for things in layers:  # in the order of SYMBOLS
            canvas = _floor(shadow)
            for thing in things:
                thing(canvas)
            out.append(canvas.reshape(CELL, _FINE, CELL, _FINE, 3).mean((1, 3)).round())
    tiles = np.array(out).astype(np.uint8)
    tiles.flags.writeable = False
    return tiles


def _paint(canvas: NDArray, where: NDArray, colour: int, opacity: float = 1.0) -> None:
    rgb = np.array([colour >> 16, colour >> 8 & 255, colour & 255], float)
    canvas[where] += (rgb - canvas[where]) * opacity


def _disc(x: float, y: float, rx: float, ry: float | None = None) -> NDArray:
    return ((_x - x) / rx) ** 2 + ((_y - y) / (ry or rx)) ** 2 <= 1


def _rect(x0: float, y0: float, x1: float, y1: float, r: float = 0.0) -> NDArray:
    """With corners of radius `r`."""
    dx = np.maximum(abs(_x - (x0 + x1) / 2) - (x1 - x0) / 2 + r, 0)
    dy = np.maximum(abs(_y - (y0 + y1) / 2) - (y1 - y0) / 2 + r, 0)
    return np.hypot(dx, dy) <= r + 1e-9


def _floor(shadow: bool) -> NDArray:
    canvas = np.zeros((*_x.shape, 3))
    _paint(canvas, np.full(_x.shape, True), _JOINT)
    _paint(canvas, _rect(0.5, 0.5, CELL - 0.5, CELL - 0.5, 1.5), _SLAB)
    if shadow:
        for row in range(_RIM):
            _paint(canvas, (row <= _y) & (_y < row + 1), _INK, 0.4 * (1 - row / _RIM))
    return canvas


def _wall(canvas: NDArray) -> None:
    """Four courses; bricks run on across tiles."""
    _paint(canvas, np.full(_x.shape, True), _MORTAR)
    for course in range(4):
        for k in range(3):
            x, y = 16 * k - 8 * (course % 2), 8 * course
            brick = _rect(x + 0.75, y + 0.75, x + 15.25, y + 7.25, 1)
            _paint(canvas, brick, _BRICKS[(2 * course + k % 2) % 4])
            _paint(canvas, brick & (_y < y + 1.75), 0xFFFFFF, 0.22)
            _paint(canvas, brick & (_y > y + 6.25), 0, 0.18)


def _target(canvas: NDArray) -> None:
    _paint(canvas, _disc(16, 16, 11.5) & ~_disc(16, 16, 8.5), _RING)
    _paint(canvas, _disc(16, 16, 4), _RING)


def _box(canvas: NDArray, planks: int = _WOOD[0], frame: int = _WOOD[1], outline: int = _WOOD[2]) -> None:
    _paint(canvas, _rect(3.5, 5, 30, 31, 3), _INK, 0.25)
    _paint(canvas, _rect(2, 2, 30, 30, 2.5), outline)
    _paint(canvas, _rect(3, 3, 29, 29, 1.5), frame)
    _paint(canvas, _rect(3, 3, 29, 4, 0.5), 0xFFFFFF, 0.35)
    inner = _rect(7, 7, 25, 25)
    _paint(canvas, _rect(6, 6, 26, 26, 1), outline)
    _paint(canvas, inner, planks)
    for x in (11.5, 16, 20.5):
        _paint(canvas, inner & (abs(_x - x) < 0.5), outline, 0.5)
    brace = inner & (abs(_x + _y - 32) < 5)
    _paint(canvas, inner & (abs(_x + _y - 32) < 6.4), outline)
    _paint(canvas, brace, frame)
    _paint(canvas, brace & (_x + _y < 28.5), 0xFFFFFF, 0.3)
    for x in (4.6, 27.4):
        for y in (5.0, 27.4):
            _paint(canvas, _disc(x, y, 0.9), outline)


def _box_on_target(canvas: NDArray) -> None:
    _box(canvas, *_WOOD_ON_TARGET)


def _player(canvas: NDArray) -> None:
    """A warehouse keeper, from the front."""
    _paint(canvas, _disc(16, 29, 8, 2), _INK, 0.25)
    for x in (11.5, 16.5):  # legs
        _paint(canvas, _rect(x, 23, x + 4, 29.5, 1), _INK)
    _paint(canvas, _rect(8, 16, 24, 22.5, 3), _INK)  # arms
    _paint(canvas, _rect(9, 17, 23, 21.5, 2.2), _SHIRT)
    for x in (10, 22):
        _paint(canvas, _disc(x, 21.5, 1.9), _SKIN)
    _paint(canvas, _rect(11, 15.5, 21, 26.5, 2), _INK)
    _paint(canvas, _rect(12, 16, 20, 25.5, 1.5), _TROUSERS)
    _paint(canvas, _rect(12, 16, 20, 18.5, 1), _SHIRT)
    _paint(canvas, _disc(16, 10, 7.6), _INK)  # head
    _paint(canvas, _disc(16, 10, 6.6), _SKIN)
    _paint(canvas, _disc(16, 9, 6.8) & (_y < 8), _CAP)
    _paint(canvas, _rect(9, 7, 23, 9, 1), _PEAK)
    for x in (13.5, 18.5):
        _paint(canvas, _disc(x, 11.2, 0.95, 1.3), _INK)
    _paint(canvas, _disc(16, 13, 2.4, 1.9) & (_y > 13.3), _PEAK)
