"""Exact solving: a table of distances for small levels, A* for large ones.

The table is a breadth-first search backwards from ALL solved states over (player, boxes), so it knows every solvable state of the room,
not only those that follow from one start. Players are kept as masks: one entry stands for all player cells at the same distance with the
same boxes.
"""

from functools import lru_cache
from heapq import heappop, heappush
from math import comb

from skillsd_sokoban.level import Level, cells_of

MOVES = ("up", "down", "left", "right")
MAX_ARRANGEMENTS = 20_000
"""Largest number of box arrangements for which a table is made: well under a second and a few MB."""
MAX_NODES = 2_000_000
"""Where A* gives up."""


class SearchLimit(RuntimeError):
    """The level is too large to be solved within `MAX_NODES` states."""


def arrangements(floor: int, targets: int) -> int:
    """In how many ways the boxes can stand on the floor."""
    return comb(floor.bit_count(), targets.bit_count())


def reverse_layers(width: int, floor: int, targets: int, limit: int | None = None) -> list[dict[int, int]]:
    """Solvable states by distance: item `d` maps boxes (mask) -> players (mask) for states exactly `d` moves from solved.

    Stops after distance `limit`, if given. The order of the entries is fixed.
    """
    frontier = {targets: floor & ~targets}
    layers, seen = [frontier], dict(frontier)
    known = seen.get
    while limit is None or len(layers) <= limit:
        found: dict[int, int] = {}
        have = found.get
        for boxes, players in frontier.items():
            free = floor & ~boxes
            walked = (players << 1 | players >> 1 | players << width | players >> width) & free & ~seen[boxes]
            if walked:
                found[boxes] = have(boxes, 0) | walked
            # A pull: the player steps away from a box and the box follows onto the cell it left.
            for step in (1, width):
                pulls = players & boxes >> step & free << step
                while pulls:
                    low = pulls & -pulls
                    pulls ^= low
                    moved, to = boxes ^ (low | low << step), low >> step
                    if not known(moved, 0) & to:
                        found[moved] = have(moved, 0) | to
                pulls = players & boxes << step & free >> step
                while pulls:
                    low = pulls & -pulls
                    pulls ^= low
                    moved, to = boxes ^ (low | low >> step), low << step
                    if not known(moved, 0) & to:
                        found[moved] = have(moved, 0) | to
        if not found:
            break
        for boxes, players in found.items():
            seen[boxes] = known(boxes, 0) | players
        layers.append(found)
        frontier = found
    return layers


def push_move(walls: int, player: int, boxes: int, step: int) -> tuple[int, int]:
    """(player, boxes) after a move by `step` cells (-width, width, -1, 1); unchanged if it is blocked."""
    to = player + step
    if walls >> to & 1:
        return player, boxes
    if boxes >> to & 1:
        beyond = to + step
        if (walls | boxes) >> beyond & 1:
            return player, boxes
        boxes ^= 1 << to | 1 << beyond
    return to, boxes


class Solver:
    """Distances and plans from any state of one room (walls and targets)."""

    def __init__(self, width: int, walls: int, floor: int, targets: int) -> None:
        self._walls, self._floor, self._targets = walls, floor, targets
        self._steps = (-width, width, -1, 1)
        self.exact = arrangements(floor, targets) <= MAX_ARRANGEMENTS
        """True if a table serves all questions at once; False if each is an A* search that may raise SearchLimit."""
        self._table: dict[int, list[tuple[int, int]]] = {}
        if self.exact:
            layers = reverse_layers(width, floor, targets)
            for distance, layer in enumerate(layers):
                for boxes, players in layer.items():
                    self._table.setdefault(boxes, []).append((distance, players))
            self.longest = len(layers) - 1
        else:
            self._push_distance = [self._pushes_from(target) for target in cells_of(targets)]

    def distance(self, player: int, boxes: int) -> int | None:
        """Fewest moves to a solved state, None if there is no way."""
        if self.exact:
            for distance, players in self._table.get(boxes, ()):
                if players >> player & 1:
                    return distance
            return None
        plan = self._search(player, boxes)
        return None if plan is None else len(plan)

    def plan(self, player: int, boxes: int) -> list[int] | None:
        """A shortest list of moves (indices into MOVES) to a solved state; of equals, the first in the order of MOVES."""
        if not self.exact:
            return self._search(player, boxes)
        left = self.distance(player, boxes)
        if left is None:
            return None
        plan = []
        while left:
            left -= 1
            for move, step in enumerate(self._steps):
                state = push_move(self._walls, player, boxes, step)
                if self.distance(*state) == left:
                    player, boxes = state
                    plan.append(move)
                    break
        return plan

    def _pushes_from(self, target: int) -> dict[int, int]:
        """Cell -> pushes that a lone box there needs to reach `target`; cells from which it cannot are absent."""
        out, queue = {target: 0}, [target]
        for cell in queue:
            for step in self._steps:
                origin = cell - step
                # A push from `origin` needs the player on its far side.
                if self._floor >> origin & 1 and self._floor >> origin - step & 1 and origin not in out:
                    out[origin] = out[cell] + 1
                    queue.append(origin)
        return out

    def _search(self, player: int, boxes: int) -> list[int] | None:
        def bound(boxes: int) -> int | None:
            total = 0
            for cell in cells_of(boxes):
                nearest = min((d[cell] for d in self._push_distance if cell in d), default=None)
                if nearest is None:
                    return None
                total += nearest
            return total

        first = bound(boxes)
        if first is None:
            return None
        bounds: dict[int, int | None] = {boxes: first}
        came: dict[tuple[int, int], tuple[int, int, int] | None] = {(player, boxes): None}
        cost = {(player, boxes): 0}
        heap = [(first, 0, 0, player, boxes)]
        pushed = 0
        while heap:
            _, negative_cost, _, player, boxes = heappop(heap)
            here = -negative_cost
            if cost[player, boxes] < here:
                continue
            if boxes == self._targets:
                plan = []
                link = came[player, boxes]
                while link:
                    plan.append(link[0])
                    link = came[link[1], link[2]]
                return plan[::-1]
            for move, step in enumerate(self._steps):
                state = push_move(self._walls, player, boxes, step)
                if cost.get(state, here + 2) <= here + 1:
                    continue
                if state[1] not in bounds:
                    bounds[state[1]] = bound(state[1])
                rest = bounds[state[1]]
                if rest is None:
                    continue
                cost[state], came[state] = here + 1, (move, player, boxes)
                pushed += 1
                if pushed > MAX_NODES:
                    raise SearchLimit(f"no plan within {MAX_NODES} states; use fewer boxes or smaller levels where a solver is needed")
                heappush(heap, (here + 1 + rest, -here - 1, pushed, *state))
        return None


@lru_cache(maxsize=64)
def _cached(width: int, walls: int, floor: int, targets: int) -> Solver:
    return Solver(width, walls, floor, targets)


def solver(level: Level) -> Solver:
    """The solver of the level's room, from a small cache shared by all environments of the process."""
    return _cached(level.width, level.walls, level.floor, level.targets)
