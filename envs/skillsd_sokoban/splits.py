"""Which levels belong to which split, and how a split is filled.

A level's room (walls and targets), in canonical form up to the 8 symmetries, is hashed (blake2b) into one of 128 buckets, and each split
name owns some of them:

    pretrain 0-47   train 48-79   val 80-87   test 88-103   any other name: one of 104-127, by the hash of the name

So two splits never share a level, nor a rotated or reflected one, nor even a room, whatever their sizes, seeds and sources. Two custom
names that fall on one bucket are refused.

`Levels.at(split, i)` is a pure function of the settings and i: the stream. `Levels.listed(split)` walks the stream, one difficulty after
the other, and skips symmetric duplicates.
"""

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from skillsd_sokoban.generate import random_room, reverse_play_level, solver_level
from skillsd_sokoban.level import Level, read_boxoban, room_form
from skillsd_sokoban.rng import Rng, digest

BUCKETS = 128
_OWNED = {"pretrain": range(0, 48), "train": range(48, 80), "val": range(80, 88), "test": range(88, 104)}
_CUSTOM = range(104, BUCKETS)

MAX_ROOMS = 100_000
"""Rooms drawn for one level before the settings are called impossible."""
MAX_TRIES = 4_000
"""Rooms of the right split searched for a start before the settings are called impossible."""
MAX_DUPLICATES = 1_000
"""Symmetric duplicates in a row before a split is called exhausted."""


def buckets(split: str) -> range:
    """The buckets that a split name owns."""
    first = _CUSTOM.start + digest(f"split {split}") % len(_CUSTOM)
    return _OWNED.get(split, range(first, first + 1))


def bucket(height: int, width: int, walls: int, targets: int) -> int:
    """The bucket of a room; equal for all 8 symmetries."""
    return digest(room_form(height, width, walls, targets)) % BUCKETS


def level_bucket(level: Level) -> int:
    return bucket(level.height, level.width, level.walls, level.targets)


class Levels:
    """All levels of one setting of the source.

    `difficulties` maps a name to the source's settings ({"lengths": [a, b]}, {"depth": n} or, for boxoban, {"files": glob} or {});
    `splits` maps a name to {difficulty: count}. Arguments are taken as checked (see settings.py).
    """

    def __init__(
        self,
        size: int,
        boxes: int,
        source: str,
        path: str | None,
        difficulties: Mapping[str, Mapping],
        splits: Mapping[str, Mapping[str, int]],
        level_seed: int,
    ) -> None:
        self.difficulties, self.splits = dict(difficulties), {name: dict(counts) for name, counts in splits.items()}
        self._size, self._boxes, self._source = size, boxes, source
        self._key = f"{level_seed} {source} {size} {boxes}"
        self._lists: dict[str, list[tuple[str, Level]]] = {}
        self._files = _Files(path) if path is not None else None

    def difficulty_at(self, split: str, index: int) -> str:
        """The difficulty of the stream's item `index`: in proportion to the split's counts, in blocks; in turn for a split without."""
        counts = self.splits.get(split) or dict.fromkeys(self.difficulties, 1)
        place = index % sum(counts.values())
        for name, count in counts.items():
            if place < count:
                return name
            place -= count
        raise AssertionError("unreachable")

    def at(self, split: str, index: int, difficulty: str | None = None) -> Level:
        """Level `index` (>= 0) of the stream; duplicates are possible. ValueError if the settings yield no level."""
        name = difficulty or self.difficulty_at(split, index)
        wanted = self.difficulties[name]
        if self._files is not None:
            return self._files.at(split, index, wanted.get("files", "*"))
        owned = buckets(split)
        rng = Rng(f"{self._key} {split} {name} {json.dumps(wanted, sort_keys=True)} {index}")
        tries = 0
        for _ in range(MAX_ROOMS):
            room = random_room(rng, self._size, self._boxes)
            if room is None or bucket(self._size, self._size, room.walls, room.targets) not in owned:
                continue
            if self._source == "solver":
                level = solver_level(rng, room, *wanted["lengths"])
            else:
                level = reverse_play_level(rng, room, wanted["depth"])
            if level is not None:
                return level
            tries += 1
            if tries == MAX_TRIES:
                break
        raise ValueError(
            f"difficulties[{name!r}] = {wanted}: no such level of size {self._size} with {self._boxes} boxes was found "
            f"for split {split!r}; ask for other lengths or depth, a larger size or fewer boxes"
        )

    def listed(self, split: str) -> list[tuple[str, Level]]:
        """(difficulty, level) of the split, in fixed order, free of duplicates up to symmetry. ValueError if it cannot be filled."""
        if split not in self._lists:
            self._lists[split] = list(self._fill(split))
        return self._lists[split]

    def _fill(self, split: str) -> Iterator[tuple[str, Level]]:
        seen: set[str] = set()
        for name, count in self.splits[split].items():
            have = index = stale = 0
            while have < count:
                exhausted = self._files is not None and index >= self._files.count(
                    split, self.difficulties[name].get("files", "*"), index + 1
                )
                if stale == MAX_DUPLICATES or exhausted:
                    raise ValueError(
                        f"splits[{split!r}][{name!r}] = {count}: only {have} distinct levels were found; ask for fewer, "
                        "or widen the source (size, boxes, difficulties, path)"
                    )
                level = self.at(split, index, name)
                index += 1
                form = level.canonical()
                if form in seen:
                    stale += 1
                    continue
                seen.add(form)
                have, stale = have + 1, 0
                yield name, level


class _Files:
    """Boxoban levels, read in the order of their paths, only as far as needed."""

    def __init__(self, path: str) -> None:
        root = Path(path)
        self._paths = [(p.relative_to(root).as_posix(), p) for p in sorted(root.rglob("*.txt"))] if root.is_dir() else [(root.name, root)]
        self._found: dict[tuple[str, str], tuple[list[Level], Iterator[Level]]] = {}

    def _scan(self, split: str, glob: str) -> Iterator[Level]:
        owned = buckets(split)
        for name, path in self._paths:
            if fnmatch(name, glob):
                for level in read_boxoban(path):
                    if not level.solved and level_bucket(level) in owned:
                        yield level

    def _read(self, split: str, glob: str, wanted: int) -> list[Level]:
        found, rest = self._found.setdefault((split, glob), ([], self._scan(split, glob)))
        while len(found) < wanted and (level := next(rest, None)) is not None:
            found.append(level)
        return found

    def count(self, split: str, glob: str, wanted: int) -> int:
        """How many of the first `wanted` levels there are."""
        return min(wanted, len(self._read(split, glob, wanted)))

    def at(self, split: str, index: int, glob: str) -> Level:
        """Level `index`, starting again after the last."""
        found = self._read(split, glob, index + 1)
        if not found:
            raise ValueError(f"path: no Boxoban level for split {split!r} and files {glob!r}; point to more .txt files or another split")
        return found[index % len(found)]


@lru_cache(maxsize=32)
def shared(settings: str) -> Levels:
    """The Levels of settings given as JSON, one per process: a split is generated once, however many environments use it."""
    return Levels(**json.loads(settings))
