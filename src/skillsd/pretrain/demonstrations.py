"""Solver demonstrations as token sequences: what the base of an agent is cloned from.

An episode is a noisy execution with optimal labels: at each turn the solver says what it would do, that answer is the label,
and now and then another action is executed instead, so that the agent sees states off the shortest path. Some episodes have a
skill in front, made by the `rules` summariser from another play of the same level.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from skillsd.demonstration import demonstrate
from skillsd.environment import TextEnv, make_env
from skillsd.errors import ConfigError
from skillsd.hashing import hash64
from skillsd.rollout import Chat
from skillsd.skills import RulesSummariser
from skillsd.trajectory import Task, Turn


@dataclass
class DemonstrationSettings:
    """Which episodes are shown."""

    split: str = "pretrain"
    """Split of levels, disjoint from those of training and of the panel."""
    episodes: int = 100_000
    """Episodes in the set; each level is seen once."""
    noise: float = 0.15
    """Chance that a turn executes a random action instead of the label."""
    skill_share: float = 0.5
    """Share of episodes with a skill in front."""
    noisy_skill_share: float = 0.5
    """Share of those skills that come from a noisy play, loops cut, instead of the solver's own plan."""
    noisy_skill_noise: float = 0.3
    """Noise of such a play."""
    max_turns: int = 30
    """Turns after which an episode is cut."""


@dataclass
class Demonstrations(Dataset[tuple[list[int], list[int]]]):
    """Item i is (token ids, labels): labels are -100 except in answers. A pure function of the settings, seed and i."""

    env_id: str
    env_kwargs: Mapping[str, Any]
    chat: Chat
    rules: RulesSummariser
    template: str
    settings: DemonstrationSettings = field(default_factory=DemonstrationSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        self._env: TextEnv | None = None

    def __len__(self) -> int:
        return self.settings.episodes

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        s = self.settings
        rng = random.Random(hash64(f"{self.seed}/{s.split}/{index}") % 2**64)
        task = self.env.stream(s.split, index)
        skill = ""
        if rng.random() < s.skill_share:
            skill = self.skill(task, s.noisy_skill_noise if rng.random() < s.noisy_skill_share else 0.0, rng)
        played, labels = demonstrate(self.env, task, s.noise, rng)
        return self.encode(played.turns[: s.max_turns], labels, played.instruction, skill)

    @property
    def env(self) -> TextEnv:
        """The environment, made when first used: each worker process has its own."""
        if self._env is None:
            self._env = make_env(self.env_id, self.env_kwargs)
            if not self._env.offers("solution") or not self._env.offers("stream"):
                raise ConfigError(
                    f"data.env: {self.env_id} lacks solution() or stream(), which demonstrations need: name an environment with both."
                )
        return self._env

    def skill(self, task: Task, noise: float, rng: random.Random) -> str:
        """The text in front of the prompt: the rules' summary of one play."""
        played, _ = demonstrate(self.env, task, noise, rng)
        return self.rules.summarise_one(played.turns, played.success, float(played.success)).render(self.template)

    def encode(self, turns: Sequence[Turn], labels: Sequence[str], instruction: str, skill: str) -> tuple[list[int], list[int]]:
        """Ids of the whole conversation and the labels of its answers; the stop token is learnt as part of an answer."""
        ids = self.chat.prompt_ids(instruction, turns[0].observation, skill)
        target = [-100] * len(ids)
        for i, (turn, label) in enumerate(zip(turns, labels, strict=False)):
            tail = self.chat.turn_ids(turns[i + 1].observation if i + 1 < len(turns) else "", stopped=False)
            closing = self.chat.closing_ids
            executed, wanted = ([*self.chat.encode(answer), *closing] for answer in (turn.action, label))
            split = next((k for k, (a, b) in enumerate(zip(executed, wanted, strict=False)) if a != b), len(executed))
            # Where the executed answer leaves the label, one token says what should have come; what follows is not to be learnt.
            target += wanted[: split + 1]
            ids += executed + (tail[len(closing) :] if i + 1 < len(turns) else [])
            target += [-100] * (len(ids) - len(target))
        return ids, target


def collate(batch: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels, int64 [B, T]."""
    width = max(len(ids) for ids, _ in batch)
    out = torch.zeros(2, len(batch), width, dtype=torch.int64)
    out[1] = -100
    for i, (ids, labels) in enumerate(batch):
        out[0, i, : len(ids)] = torch.tensor(ids)
        out[1, i, : len(labels)] = torch.tensor(labels)
    return out[0], out[1]
