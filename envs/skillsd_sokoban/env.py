"""The environment: text in, text out."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium as gym
from gymnasium.error import ResetNeeded

from skillsd_sokoban import settings
from skillsd_sokoban.actions import FORMATS, Actions
from skillsd_sokoban.draw import Image, draw, find
from skillsd_sokoban.level import BOX, BOX_ON_TARGET, FLOOR, PLAYER, PLAYER_ON_TARGET, TARGET, Level
from skillsd_sokoban.prompts import check_prompts
from skillsd_sokoban.rng import digest
from skillsd_sokoban.solve import solver
from skillsd_sokoban.spaces import AnyText
from skillsd_sokoban.splits import buckets, shared


class SokobanEnv(gym.Env[str, str]):
    """Push every box onto a target, by words.

    ## Action
    A text that holds one of up, down, left, right (see `action_format`). One that cannot be read costs a turn and is answered with the
    map and a message saying what is accepted; it never raises.

    ## Observation
    The map, one row a line, in `prompts["observation"]`: # wall, _ floor, O target, X box, P player, T box on target, S player on target.

    ## Reward
    At the end boxes on targets / boxes, before it 0; minus `invalid_penalty` on a turn whose action cannot be read; plus
    `distance_reward` x (moves to go before - after). A state that cannot be solved any more counts as one move further than the room's
    furthest state.

    ## Episode end
    Terminated when solved, truncated after `max_turns` turns. `step` after the end raises `ResetNeeded`.

    ## Info
    Always task_id, success (bool), completion (0..1), turn, valid (whether the last action could be read). From `reset` also instruction,
    split, difficulty and optimal_length (moves; None if the room is too large for a table).

    ## reset options
    {"task_id": id} a task of `tasks(split)` or of `stream`; {"board": map} that map, named task_id if given, else after its content;
    {"split": name} a level of that split, picked by the seed. Without options the seed picks a level of the first split. "instruction", if
    not empty, replaces the instruction in info; "difficulty" is passed on to info.

    ## Arguments (all keyword; an unknown or out-of-range value is a ValueError that names it)
    size: rows and columns with the walls around, 4 to 32. Not used by boxoban.
    boxes: number of boxes, 1 to 8. Not used by boxoban.
    source: "solver" (exact optimal lengths), "reverse_play" (gym-sokoban's generator, as in the paper) or "boxoban" (files).
    path: a Boxoban .txt file, or a folder that is searched for them; only with boxoban.
    difficulties: name -> {"lengths": [shortest, longest]} in moves for solver, {"depth": search depth} for reverse_play, {"files": glob}
        or {} for boxoban. Default: {"all": {"lengths": [4, 30]}}, {"all": {"depth": 15}} or {"all": {}}.
    splits: split -> {difficulty: number of levels}. Default: 96 train and 64 test levels of the first difficulty. Splits are disjoint up to
        rotation and reflection whatever their names and sizes (splits.py).
    level_seed: another number, other levels, 0 or more. Not used by boxoban.
    max_turns: turns until truncation.
    actions_per_turn: moves that one answer may hold; they are made in order until the level is solved.
    action_format: "fenced", the last span between triple backticks, or "bare", the last move words of the answer.
    separator: put between the symbols of a row; " " keeps a BPE tokenizer from merging them.
    prompts: replaces any of the templates instruction, observation and invalid (prompts.py).
    invalid_penalty: taken off the reward of a turn whose action cannot be read.
    distance_reward: shaping coefficient, 0 is off; needs levels small enough for a table.
    render_mode: "rgb_array", `render` returns a picture; None or "ansi", it returns the map as text.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(
        self,
        *,
        size: int = 6,
        boxes: int = 2,
        source: str = "solver",
        path: str | None = None,
        difficulties: Mapping[str, Mapping[str, Any]] | None = None,
        splits: Mapping[str, Mapping[str, int]] | None = None,
        level_seed: int = 0,
        max_turns: int = 40,
        actions_per_turn: int = 1,
        action_format: str = "fenced",
        separator: str = "",
        prompts: Mapping[str, str] | None = None,
        invalid_penalty: float = 0.0,
        distance_reward: float = 0.0,
        render_mode: str | None = None,
    ) -> None:
        settings.one_of("source", source, settings.SOURCES)
        chosen = settings.check_difficulties(source, difficulties)
        self._levels = shared(
            json.dumps(
                {
                    "size": settings.whole("size", size, 4, 32),
                    "boxes": settings.whole("boxes", boxes, 1, 8),
                    "source": source,
                    "path": settings.check_path(source, path, chosen),
                    "difficulties": chosen,
                    "splits": settings.check_splits(splits, chosen),
                    "level_seed": settings.whole("level_seed", level_seed, 0, 2**63 - 1),
                }
            )
        )
        self._max_turns = settings.whole("max_turns", max_turns, 1, 1_000_000)
        self._per_turn = settings.whole("actions_per_turn", actions_per_turn, 1, 1_000)
        self._actions = Actions(settings.one_of("action_format", action_format, FORMATS), self._per_turn)
        self._separator = settings.check_separator(separator)
        self._prompts = check_prompts(prompts)
        self._plain = self._prompts["observation"] == "{board}"
        self._invalid_penalty = settings.number("invalid_penalty", invalid_penalty)
        self._distance_reward = settings.number("distance_reward", distance_reward)
        self.render_mode = settings.one_of("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._level: Level | None = None
        self._running = False

    def tasks(self, split: str) -> list[dict[str, str]]:
        """All tasks of a split in fixed order, each with task_id, split and difficulty. ValueError for an unknown split."""
        self._check_split(split)
        return [
            {"task_id": f"{split}-{i:04d}", "split": split, "difficulty": name} for i, (name, _) in enumerate(self._levels.listed(split))
        ]

    def stream(self, split: str, index: int) -> dict[str, str]:
        """Task `index` (>= 0) of an endless stream of the split's levels, with its board; a pure function of the settings and `index`.

        `reset(options=...)` takes it as it is. Levels repeat, and a split's stream contains its tasks: for training data use a split that
        nothing is evaluated on. Any split name will do, listed in `splits` or not.
        """
        settings.whole("index", index, 0, 2**63 - 1)
        if not isinstance(split, str) or not split:
            raise ValueError(f"split = {split!r}: give a name, such as 'pretrain'")
        for other in self._levels.splits:
            if other != split and buckets(other) == buckets(split):
                raise ValueError(f"split = {split!r}: owns the same levels as {other!r}; use another name")
        return {
            "task_id": f"{split}-stream-{index}",
            "split": split,
            "difficulty": self._levels.difficulty_at(split, index),
            "board": self._levels.at(split, index).text(self._separator),
        }

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode. ValueError for an unknown option, task or split, and for a board that is not a level or is solved already."""
        super().reset(seed=seed)
        task, level = self._pick(dict(options or {}))
        if level.solved:
            raise ValueError("board: it is solved already; give one with a box off its target")
        self._level, self._task_id = level, task["task_id"]
        self._solver = solver(level)
        if self._distance_reward and not self._solver.exact:
            raise ValueError("distance_reward: this level is too large for a table of distances; set it to 0 or use smaller levels")
        self._player, self._boxes, self._targets, self._walls = level.player, level.boxes, level.targets, level.walls
        self._count = level.boxes.bit_count()
        self._steps = (-level.width, level.width, -1, 1)
        self._paint(level)
        self._turn, self._running = 0, True
        self._left = self.distance() if self._solver.exact else None
        board = "".join(self._cells)
        fields = {"board": board, "format": self._actions.accepted, "turns_left": self._max_turns}
        info = {
            **self._info(True, False),
            "instruction": (options or {}).get("instruction") or self._prompts["instruction"].format(**fields),
            "split": task["split"],
            "difficulty": task["difficulty"],
            "optimal_length": self._left,
        }
        return self._prompts["observation"].format(message="", turn=0, **fields), info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """One turn. TypeError if the action is not a str, ResetNeeded outside an episode."""
        if not self._running:
            raise ResetNeeded("step() needs a running episode; call reset() first, and again after terminated or truncated")
        if not isinstance(action, str):
            raise TypeError(f"the action must be a str, not {type(action).__name__}")
        moves = self._actions.read(action)
        self._turn += 1
        solved = False
        for move in moves or ():
            self._move(self._steps[move])
            if self._boxes == self._targets:
                solved = True
                break
        truncated = not solved and self._turn >= self._max_turns
        info = self._info(moves is not None, solved)
        reward = 0.0
        if solved or truncated:
            self._running = False
            reward = info["completion"]
        if moves is None:
            reward -= self._invalid_penalty
        if self._distance_reward:
            reward += self._distance_reward * self._progress()
        board = "".join(self._cells)
        if moves is not None and self._plain:
            return board, reward, solved, truncated, info
        fields = {"board": board, "format": self._actions.accepted, "turn": self._turn, "turns_left": self._max_turns - self._turn}
        if moves is None:
            text = self._prompts["invalid"].format(message=f"Your answer could not be read: {self._actions.accepted}.", **fields)
        else:
            text = self._prompts["observation"].format(message="", **fields)
        return text, reward, solved, truncated, info

    def render(self) -> str | Image:  # type: ignore[override]
        """The current map: a text, or with render_mode "rgb_array" a picture, [H, W, 3] uint8."""
        level = self._started()
        if self.render_mode == "rgb_array":
            return draw(replace(level, boxes=self._boxes, player=self._player))
        return "".join(self._cells)

    def picture(self, observation: str) -> Image | None:
        """The map in an observation as a picture, [H, W, 3] uint8; None where there is none, whatever the text is.

        `separator` is this environment's; the templates may have put words before and behind the map.
        """
        level = find(observation, self._separator) if isinstance(observation, str) else None
        return None if level is None else draw(level)

    def distance(self) -> int | None:
        """Fewest moves from the current state to a solved one, None if there is none. SearchLimit if a large level is too hard to tell."""
        self._started()
        return self._solver.distance(self._player, self._boxes)

    @property
    def solvable(self) -> bool:
        """Return whether the current state can still be solved. SearchLimit as for `distance`."""
        return self.distance() is not None

    @property
    def actions(self) -> tuple[str, ...]:
        """The answers that make a single move, in the order up, down, left, right."""
        return tuple(self._actions.text([move]) for move in range(4))

    def solution(self) -> list[str] | None:
        """A shortest plan from the current state, each item a full valid answer for one turn; None if there is none, [] if solved.

        Among equally short plans it is the first in the order up, down, left, right. SearchLimit as for `distance`.
        """
        self._started()
        plan = self._solver.plan(self._player, self._boxes)
        if plan is None:
            return None
        return [self._actions.text(plan[i : i + self._per_turn]) for i in range(0, len(plan), self._per_turn)]

    def _pick(self, options: dict[str, Any]) -> tuple[dict[str, Any], Level]:
        if unknown := set(options) - {"task_id", "split", "difficulty", "board", "instruction"}:
            raise ValueError(f"options: unknown key {sorted(unknown)[0]!r}; use task_id, split or board")
        task_id, split = options.get("task_id"), options.get("split")
        if options.get("board") is not None:
            level = Level.from_text(options["board"], self._separator)
            name = task_id or f"board-{digest(level.text()):016x}"
            return {"task_id": name, "split": split, "difficulty": options.get("difficulty")}, level
        if task_id is None:
            split = split if split is not None else next(iter(self._levels.splits))
            self._check_split(split)
            index = int(self.np_random.random() * len(self._levels.listed(split)))
            task_id = f"{split}-{index:04d}"
        else:
            match = re.fullmatch(r"(.+?)(-stream)?-(\d+)", task_id) if isinstance(task_id, str) else None
            if match is None:
                known = " or ".join(f"tasks({name!r})" for name in self._levels.splits)
                raise ValueError(f"options['task_id'] = {task_id!r}: not a task; take one from {known}")
            if match[2]:
                task = self.stream(match[1], int(match[3]))
                return task, Level.from_text(task.pop("board"), self._separator)
            split, index = match[1], int(match[3])
            self._check_split(split)
        levels = self._levels.listed(split)
        if index >= len(levels) or task_id != f"{split}-{index:04d}":
            raise ValueError(
                f"options['task_id'] = {task_id!r}: unknown; split {split!r} has {split}-0000 to {split}-{len(levels) - 1:04d}"
            )
        difficulty, level = levels[index]
        return {"task_id": task_id, "split": split, "difficulty": difficulty}, level

    def _check_split(self, split: Any) -> None:
        if split not in self._levels.splits:
            raise ValueError(f"split = {split!r}: unknown; the splits are {', '.join(map(repr, self._levels.splits))}")

    def _started(self) -> Level:
        if self._level is None:
            raise ResetNeeded("there is no level yet; call reset() first")
        return self._level

    def _info(self, valid: bool, success: bool) -> dict[str, Any]:
        completion = (self._boxes & self._targets).bit_count() / self._count
        return {"task_id": self._task_id, "success": success, "completion": completion, "turn": self._turn, "valid": valid}

    def _paint(self, level: Level) -> None:
        """The text of the map as a list with one item a cell and one a gap, so that a move rewrites two or three items."""
        text, width, gap = level.cells(), level.width, 2 if self._separator else 1
        self._cells: list[str] = []
        self._places: list[int] = []
        for row in range(0, len(text), width):
            for column in range(width):
                if column and gap == 2:
                    self._cells.append(self._separator)
                self._places.append(len(self._cells))
                self._cells.append(text[row + column])
            self._cells.append("\n")
        self._cells.pop()

    def _move(self, step: int) -> None:
        player, to = self._player, self._player + step
        targets, cells, places = self._targets, self._cells, self._places
        if self._walls >> to & 1:
            return
        if self._boxes >> to & 1:
            beyond = to + step
            if (self._walls | self._boxes) >> beyond & 1:
                return
            self._boxes ^= 1 << to | 1 << beyond
            cells[places[beyond]] = BOX_ON_TARGET if targets >> beyond & 1 else BOX
        cells[places[player]] = TARGET if targets >> player & 1 else FLOOR
        cells[places[to]] = PLAYER_ON_TARGET if targets >> to & 1 else PLAYER
        self._player = to

    def _progress(self) -> int:
        """Moves to go before this turn minus after it."""
        beyond = self._solver.longest + 1
        before, self._left = self._left, self.distance()
        return (beyond if before is None else before) - (beyond if self._left is None else self._left)
