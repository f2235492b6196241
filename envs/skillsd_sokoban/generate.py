"""Two sources of random levels. Each turns a stream of random numbers into a room, and a room into a level or None (a rejected try).

solver: walls and targets -> all solvable states with their exact distance -> a start whose distance lies in a band.
reverse_play: gym-sokoban's way, as in the paper: from the solved state, a depth-first search that walks and pulls boxes; the start is
the state with the largest (pulls x displacement of the boxes). Its depth says little about the length of the solution.
"""

from dataclasses import dataclass
from functools import lru_cache

from skillsd_sokoban.level import Level, border, cells_of
from skillsd_sokoban.rng import Rng
from skillsd_sokoban.solve import MAX_ARRANGEMENTS, arrangements, reverse_layers

# The cells that a step of the walk opens, as (row, column) offsets: lines, corners and a square, as in gym-sokoban.
_SHAPES = (
    ((0, -1), (0, 0), (0, 1)),
    ((-1, 0), (0, 0), (1, 0)),
    ((0, -1), (0, 0), (1, 0)),
    ((0, -1), (0, 0), (1, -1), (1, 0)),
    ((0, 0), (0, 1), (1, 0)),
)
_DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1))

MAX_STATES = 300_000
"""Where the reverse-play search stops, as in gym-sokoban."""


@dataclass(frozen=True, slots=True)
class Room:
    """Walls and targets (masks as in Level) of a map of `size` x `size`."""

    size: int
    walls: int
    targets: int

    @property
    def floor(self) -> int:
        return ((1 << self.size * self.size) - 1) & ~self.walls


def random_room(rng: Rng, size: int, boxes: int) -> Room | None:
    """A connected room opened by a random walk, with `boxes` random targets; None if it is too small for the boxes and the player."""
    opened = 0
    masks = _shape_masks(size)
    inside = ((1 << size * size) - 1) & ~border(size, size)
    last = size - 2
    row, column = 1 + rng.below(last), 1 + rng.below(last)
    down, right = rng.choice(_DIRECTIONS)
    bits = rng.bits
    for _ in range(17 * 2 * size // 10):
        # rng.below and rng.choice written out, for 4 directions and 5 shapes: most rooms drawn belong to other splits.
        while (turn := bits(5)) >= 20:
            pass
        if turn < 7:
            while (draw := bits(3)) >= 4:
                pass
            down, right = _DIRECTIONS[draw]
        row += down
        column += right
        row = 1 if row < 1 else last if row > last else row
        column = 1 if column < 1 else last if column > last else column
        while (draw := bits(3)) >= 5:
            pass
        opened |= masks[row * size + column][draw]
    opened &= inside
    if opened.bit_count() < boxes + 2:
        return None
    targets = sum(1 << cell for cell in rng.sample(cells_of(opened), boxes))
    return Room(size, ((1 << size * size) - 1) & ~opened, targets)


def solver_level(rng: Rng, room: Room, shortest: int, longest: int) -> Level | None:
    """A start with every box off the targets whose optimal solution has `shortest` to `longest` moves; None if the room has none.

    The length is uniform over those that the room offers within the band, the start uniform over the states of that length. A room too
    large for a table counts as one without.
    """
    if arrangements(room.floor, room.targets) > MAX_ARRANGEMENTS:
        return None
    layers = reverse_layers(room.size, room.floor, room.targets, longest)
    lengths = list(range(shortest, min(longest, len(layers) - 1) + 1))
    for length in rng.sample(lengths, len(lengths)):
        starts = [(boxes, players) for boxes, players in layers[length].items() if not boxes & room.targets]
        if not starts:
            continue
        pick = rng.below(sum(players.bit_count() for _, players in starts))
        for boxes, players in starts:
            if pick < players.bit_count():
                return Level(room.size, room.size, room.walls, room.targets, boxes, cells_of(players)[pick])
            pick -= players.bit_count()
    return None


def reverse_play_level(rng: Rng, room: Room, depth: int) -> Level | None:
    """The best-scored start that a reverse depth-first search of `depth` steps meets; None if no start leaves all targets uncovered."""
    size, floor, targets = room.size, room.floor, room.targets
    steps = (-size, size, -1, 1)
    homes = cells_of(targets)
    seen: set[tuple[int, int]] = set()
    best: tuple[int, int, int] = (0, 0, 0)

    def visit(player: int, places: tuple[int, ...], pulls: int, left: int) -> None:
        nonlocal best
        boxes = 0
        for place in places:
            boxes |= 1 << place
        if left <= 1 or (player, boxes) in seen or len(seen) >= MAX_STATES:
            return
        seen.add((player, boxes))
        if not targets & (boxes | 1 << player):
            # Displacement follows each box from its own target, as in the original.
            away = sum(abs(a // size - b // size) + abs(a % size - b % size) for a, b in zip(homes, places, strict=True))
            if pulls * away > best[0]:
                best = (pulls * away, player, boxes)
        for pull in (True, False):
            for step in steps:
                to = player + step
                if not (floor & ~boxes) >> to & 1:
                    continue
                if pull and boxes >> player - step & 1:
                    visit(to, tuple(player if place == player - step else place for place in places), pulls + 1, left - 1)
                else:
                    visit(to, places, pulls, left - 1)

    visit(rng.choice(cells_of(floor & ~targets)), tuple(homes), 0, depth)
    score, player, boxes = best
    return Level(size, size, room.walls, targets, boxes, player) if score else None


@lru_cache(maxsize=32)
def _shape_masks(size: int) -> list[tuple[int, ...]]:
    """For every cell, the masks of the shapes around it; empty on the border, where the walk never stands."""
    edge = border(size, size)
    return [
        tuple(0 if edge >> cell & 1 else sum(1 << cell + r * size + c for r, c in shape) for shape in _SHAPES)
        for cell in range(size * size)
    ]
