"""How episodes are played, as a configuration says it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from skillsd.errors import ConfigError
from skillsd.rollout.line import is_address, root


@dataclass
class RolloutSettings:
    """How episodes are played. Limits are in tokens."""

    temperature: float = 1.0
    """Sampling temperature in training; evaluation is greedy. The loss uses the same one."""
    max_turn_tokens: int | None = None
    """Most tokens of one answer; a longer one is cut there and played as it is. null: a 32nd of the model's context, at most 512."""
    max_trajectory_tokens: int = 20480
    """Most tokens after the prompt, all turns together (the paper's response length)."""
    max_prompt_tokens: int = 8192
    """Longest first prompt of the student."""
    max_rows: int = 64
    """Trajectories in progress at one time; the next one starts as soon as one ends."""
    env_workers: int = 0
    """Threads that reset and step environments at the same time; 0: one after another, best for environments that take microseconds."""
    env_timeout: float = 600.0
    """Seconds after which a call of an environment counts as hung and its episode as failed; 0 waits for ever. Without `env_workers` a
    signal breaks the call off, which C code that looks at no signals does not notice; with them its thread is left behind."""
    max_observation_chars: int = 1_000_000
    """Characters of an observation beyond which it is not read and its episode counts as failed."""
    max_failed: float = 0.5
    """Share of a training iteration's episodes that may fail; beyond it the run stops and says why they did."""
    cuda_graphs: bool = True
    """On a GPU, decode with CUDA graphs (small models become much faster; several runs can share the GPU); elsewhere of no effect."""
    engine: Literal["default", "servers"] = "default"
    """Who decodes. `servers` are vLLM servers that run already (skillsd serve), on other GPUs or machines (docs/scaling.md)."""
    servers: list[str] = field(default_factory=list)
    """Their addresses, http://host:port, for engine=servers. One that is lost is dropped and its turns are asked again of the others."""
    servers_folder: str | None = None
    """Where adapters are written for the servers to read: on other machines under the same path. null: a temporary one on this machine."""
    servers_key_env: str | None = None
    """Name of the environment variable that holds the servers' API key; null: they want none."""
    servers_timeout: float = 600.0
    """Seconds without an answer to a turn, waiting in the server's queue included, after which a server is lost."""
    staleness: int = 0
    """Updates that rollouts lag behind, so that they go on while the updates in between run: iteration j is sampled with the adapter as
    it was after j - staleness updates, whose recorded log-probs the loss's ratios account for. Above 0 it needs engine=servers and
    env_workers, and a resumed run begins with fresh rollouts: its numbers are not those of a run that went through."""
    kernels: bool = True
    """On a GPU, decode a bfloat16 base, in nf4 or not, with kernels of our own in Triton; the log says why where they can't be used."""

    def __post_init__(self) -> None:
        for key in ("max_turn_tokens", "max_trajectory_tokens", "max_prompt_tokens", "max_rows", "max_observation_chars"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(f"rollout.{key} is {getattr(self, key)}: give at least 1.")
        if self.engine not in ("default", "servers"):
            raise ConfigError(f"rollout.engine is {self.engine}: one of default, servers (vLLM in a process of its own: skillsd serve).")
        self._check_servers()
        if self.env_workers < 0:
            raise ConfigError(f"rollout.env_workers is {self.env_workers}: give 0 (no threads) or more.")
        if not 0 <= self.env_timeout < math.inf:
            raise ConfigError(f"rollout.env_timeout is {self.env_timeout}: give seconds, or 0 for no limit.")
        if not 0 <= self.max_failed <= 1:
            raise ConfigError(f"rollout.max_failed is {self.max_failed}: give a share of the episodes, from 0 to 1 (never stops).")
        if self.temperature <= 0:
            raise ConfigError(f"rollout.temperature is {self.temperature}: give a value above 0 (training samples, evaluation is greedy).")

    def turn_tokens(self, context_length: int) -> int:
        """`max_turn_tokens` for a model of this context: room for 32 answers. A small agent may not stop by itself."""
        return self.max_turn_tokens or max(1, min(512, context_length // 32))

    def _check_servers(self) -> None:
        if bool(self.servers) != (self.engine == "servers"):
            raise ConfigError(
                "rollout.servers is empty: give the servers' addresses, [http://host:port, ...], or set rollout.engine to default."
                if not self.servers
                else f"rollout.servers has addresses, and rollout.engine is {self.engine}: set it to servers, or remove them."
            )
        for i, url in enumerate(self.servers):
            if not is_address(url):
                raise ConfigError(f"rollout.servers[{i}] is no http://host:port: user, password, query and spaces have no place in it.")
        if len({root(url) for url in self.servers}) < len(self.servers):
            raise ConfigError("rollout.servers names a server twice (with and without /v1 is the same): name each once.")
        if self.servers_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.servers_key_env):
            raise ConfigError("rollout.servers_key_env is the name of an environment variable, not a key: letters, digits and _ only.")
        if not 0 < self.servers_timeout < math.inf:
            raise ConfigError(f"rollout.servers_timeout is {self.servers_timeout}: give seconds, above 0.")
        if self.staleness < 0:
            raise ConfigError(f"rollout.staleness is {self.staleness}: give 0 (the rollout waits for the update) or more.")
        if self.staleness and self.engine != "servers":
            raise ConfigError(
                f"rollout.staleness is {self.staleness}, and rollout.engine is {self.engine}, which samples with the weights in training: "
                "set rollout.engine to servers, or staleness to 0."
            )
        if self.staleness and not self.env_workers:
            raise ConfigError(
                f"rollout.staleness is {self.staleness}, so that environments are played in the background, where no signal breaks off one "
                "that hangs: set rollout.env_workers to 1 or more, or staleness to 0."
            )
