"""How episodes are played, as a configuration says it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from skillsd.engines.settings import EngineSettings
from skillsd.errors import ConfigError


@dataclass
class RolloutSettings(EngineSettings):
    """How episodes are played, and by which engine. Limits are in tokens."""

    temperature: float = 1.0
    """Sampling temperature in training; evaluation is greedy. The loss uses the same one."""
    max_turn_tokens: int | None = None
    """Most tokens of one answer; a longer one is cut there and played as it is. null: a 32nd of the model's context, at most 512."""
    max_trajectory_tokens: int = 20480
    """Most tokens after the prompt, all turns together (the paper's response length)."""
    max_prompt_tokens: int = 8192
    """Longest first prompt of the student."""
    env_workers: int = 0
    """Threads that reset and step environments at the same time; 0: one after another, best for environments that take microseconds."""
    env_timeout: float = 600.0
    """Seconds after which a call of an environment counts as hung and its episode as failed; 0 waits for ever. Without `env_workers` a
    signal breaks the call off, which C code that looks at no signals does not notice; with them its thread is left behind."""
    max_observation_chars: int = 1_000_000
    """Characters of an observation beyond which it is not read and its episode counts as failed."""
    max_failed: float = 0.5
    """Share of a training iteration's episodes that may fail; beyond it the run stops and says why they did."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("max_turn_tokens", "max_trajectory_tokens", "max_prompt_tokens", "max_observation_chars"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(f"data.rollout.{key} is {getattr(self, key)}: give at least 1.")
        if self.env_workers < 0:
            raise ConfigError(f"data.rollout.env_workers is {self.env_workers}: give 0 (no threads) or more.")
        if not 0 <= self.env_timeout < math.inf:
            raise ConfigError(f"data.rollout.env_timeout is {self.env_timeout}: give seconds, or 0 for no limit.")
        if not 0 <= self.max_failed <= 1:
            raise ConfigError(f"data.rollout.max_failed is {self.max_failed}: give a share of the episodes, from 0 to 1 (never stops).")
        if self.temperature <= 0:
            raise ConfigError(
                f"data.rollout.temperature is {self.temperature}: give a value above 0 (training samples, evaluation is greedy)."
            )
        if self.staleness and not self.env_workers:
            raise ConfigError(
                f"data.rollout.staleness is {self.staleness}, so that environments are played in the background, where no signal "
                "breaks off one that hangs: set data.rollout.env_workers to 1 or more, or staleness to 0."
            )

    def turn_tokens(self, context_length: int) -> int:
        """`max_turn_tokens` for a model of this context: room for 32 answers. A small agent may not stop by itself."""
        return self.max_turn_tokens or max(1, min(512, context_length // 32))
