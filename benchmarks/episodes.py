"""An environment that only costs tokens: a prompt that the task's episodes share, then turns, as many as seeded noise says."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium


class Episodes(gymnasium.Env[str, str]):
    """Episodes of `turns[0]` to `turns[1]` turns, all equally likely; the reward is noise, so that groups have an advantage.

    The n-th episode of a task is the same in every process: it is drawn from (task_id, n).

    Args:
        n_tasks: Tasks of each split.
        prompt: Words of the first observation; a word is a token of the nano tokenizer.
        words: Words of every further observation.
        turns: Fewest and most.
    """

    observation_space = action_space = gymnasium.spaces.Text(1)
    played: ClassVar[Counter[str]] = Counter()

    def __init__(self, n_tasks: int, prompt: int, words: int, turns: Sequence[int]) -> None:
        self.n_tasks, self.prompt, self.words, self.turns = n_tasks, prompt, words, tuple(turns)

    def tasks(self, split: str) -> list[dict[str, Any]]:
        return [{"task_id": f"{split}-{i}", "split": split, "difficulty": ""} for i in range(self.n_tasks)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        assert options is not None
        task = options["task_id"]
        rng = random.Random(f"{task}/{self.played[task]}")
        self.played[task] += 1
        self.left, self.completion = rng.randint(*self.turns), rng.random()
        # The number first: tasks do not share their prompts' beginnings.
        return f"{task.rpartition('-')[2]} " + "up " * (self.prompt - 16), {"task_id": task, "instruction": ""}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        ended = self.left == 0
        final = {"completion": self.completion, "success": self.completion > 0.5} if ended else {}
        return f"{self.left} " + "down " * (self.words - 3), self.completion if ended else 0.0, ended, False, final


gymnasium.register("bench/Episodes-v0", Episodes, disable_env_checker=True, order_enforce=False)
