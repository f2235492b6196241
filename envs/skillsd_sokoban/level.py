"""A Sokoban level: masks over cells, its text, its symmetries, and Boxoban's files."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

WALL, FLOOR, TARGET, BOX, PLAYER, BOX_ON_TARGET, PLAYER_ON_TARGET = SYMBOLS = "#_OXPTS"
_BOXOBAN = str.maketrans(" .$@*+", FLOOR + TARGET + BOX + PLAYER + BOX_ON_TARGET + PLAYER_ON_TARGET)


@dataclass(frozen=True, slots=True)
class Level:
    """One start position, immutable.

    Cells are numbered row by row from 0. `walls`, `targets` and `boxes` are integers whose bit `c` is set where cell `c` holds one;
    `player` is a cell. The border is all walls, so that a move never leaves the map or wraps round.
    """

    height: int
    width: int
    walls: int
    targets: int
    boxes: int
    player: int

    @classmethod
    def from_text(cls, text: str, separator: str = "") -> "Level":
        """Read a map: one row a line, symbols `# _ O X P T S`.

        `separator` (what `text` put between the symbols of a row), blanks around rows and empty lines are skipped.
        ValueError if a symbol is unknown, rows differ in length, the border is open, there is not exactly one player, or boxes and targets
        differ in number or are none.
        """
        rows = [(row.replace(separator, "") if separator else row).replace(" ", "").strip() for row in text.splitlines()]
        rows = [row for row in rows if row]
        if not rows:
            raise ValueError("board: no rows; give one row of symbols a line")
        height, width, cells = len(rows), len(rows[0]), "".join(rows)
        if any(len(row) != width for row in rows):
            raise ValueError("board: rows differ in length; fill the short ones up with #")
        if odd := sorted(set(cells) - set(SYMBOLS)):
            raise ValueError(f"board: unknown symbols {odd}; use {' '.join(SYMBOLS)}")
        if cells.count(PLAYER) + cells.count(PLAYER_ON_TARGET) != 1:
            raise ValueError("board: needs exactly one player (P, or S on a target)")
        level = cls(
            height,
            width,
            _mask(cells, WALL),
            _mask(cells, "OTS"),
            _mask(cells, "XT"),
            max(cells.find(PLAYER), cells.find(PLAYER_ON_TARGET)),
        )
        if border(height, width) & ~level.walls:
            raise ValueError("board: the border must be walls; frame the map with #")
        if not level.boxes or level.boxes.bit_count() != level.targets.bit_count():
            raise ValueError("board: needs as many boxes (X, T) as targets (O, T, S), at least one")
        return level

    @property
    def floor(self) -> int:
        """Mask of the cells that are not walls."""
        return ((1 << self.height * self.width) - 1) & ~self.walls

    @property
    def solved(self) -> bool:
        return self.boxes == self.targets

    def cells(self) -> str:
        """The symbols of all cells, row by row, without line breaks."""
        walls, targets, boxes = self.walls, self.targets, self.boxes
        out = [
            WALL if walls >> c & 1 else (FLOOR, TARGET, BOX, BOX_ON_TARGET)[(targets >> c & 1) + 2 * (boxes >> c & 1)]
            for c in range(self.height * self.width)
        ]
        out[self.player] = PLAYER_ON_TARGET if targets >> self.player & 1 else PLAYER
        return "".join(out)

    def text(self, separator: str = "") -> str:
        """The map, one row a line, `separator` between the symbols of a row."""
        cells, width = self.cells(), self.width
        return "\n".join(separator.join(cells[i : i + width]) for i in range(0, len(cells), width))

    def symmetries(self) -> list["Level"]:
        """The 8 images under rotation and reflection, this level first; images that coincide are repeated."""
        out = []
        for height, width, cells in images(self.height, self.width, self.cells()):
            out.append(Level.from_text("\n".join(cells[i : i + width] for i in range(0, height * width, width))))
        return out

    def canonical(self) -> str:
        """Text that is equal for two levels exactly when one is a rotation or reflection of the other."""
        return canonical(self.height, self.width, self.cells())

    def canonical_room(self) -> str:
        """The same for the room alone: walls and targets, whatever stands in it."""
        return room_form(self.height, self.width, self.walls, self.targets)


def images(height: int, width: int, cells: str) -> list[tuple[int, int, str]]:
    """(height, width, cells) under the 8 symmetries, the identity first."""
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    flip = "".join(rows[::-1])
    turn = "".join([cells[i::width] for i in range(width)])
    turn_flip = "".join([flip[i::width] for i in range(width)])
    upright, lying = (cells, cells[::-1], flip, flip[::-1]), (turn, turn[::-1], turn_flip, turn_flip[::-1])
    return [(height, width, c) for c in upright] + [(width, height, c) for c in lying]


def canonical(height: int, width: int, cells: str) -> str:
    """The smallest of the 8 images, as text."""
    h, w, best = min(images(height, width, cells))
    return f"{h}x{w} {best}"


def room_form(height: int, width: int, walls: int, targets: int) -> str:
    """Canonical form of walls and targets."""
    symbols = FLOOR, WALL, TARGET
    return canonical(height, width, "".join([symbols[(walls >> c & 1) + 2 * (targets >> c & 1)] for c in range(height * width)]))


@lru_cache(maxsize=64)
def border(height: int, width: int) -> int:
    """Mask of the outermost cells."""
    return sum(1 << r * width + c for r in range(height) for c in range(width) if r in (0, height - 1) or c in (0, width - 1))


def cells_of(mask: int) -> list[int]:
    """The cells of a mask, in rising order."""
    out = []
    while mask:
        low = mask & -mask
        out.append(low.bit_length() - 1)
        mask ^= low
    return out


def read_boxoban(path: str | Path) -> Iterator[Level]:
    """Levels of a Boxoban .txt file: maps in `# @ $ . * +` and blanks, each under a line `; number`.

    ValueError, naming the file and the level's number, for a map that is not a level.
    """
    rows: list[str] = []
    name = "0"
    for line in [*Path(path).read_text(encoding="utf-8").splitlines(), ";"]:
        line = line.rstrip("\r\n")
        if line.strip() and not line.startswith(";"):
            rows.append(line)
            continue
        if rows:
            width = max(map(len, rows))
            try:
                yield Level.from_text("\n".join(row.ljust(width) for row in rows).translate(_BOXOBAN))
            except ValueError as error:
                raise ValueError(f"{path}, level {name}: {error}") from None
            rows = []
        if line.startswith(";"):
            name = line[1:].strip()


def _mask(cells: str, symbols: str) -> int:
    return sum(1 << c for c, symbol in enumerate(cells) if symbol in symbols)
