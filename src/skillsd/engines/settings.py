"""Which engine decodes and how, as a configuration says it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from skillsd.engines.http import is_address, root
from skillsd.errors import ConfigError, read_key


@dataclass
class EngineSettings:
    """Who decodes. The attribute docstrings are the help of the command line."""

    max_rows: int = 64
    """Trajectories in progress at one time; the next one starts as soon as one ends."""
    engine: Literal["default", "servers"] = "default"
    """Who decodes. `servers` are vLLM servers that run already (skillsd serve), on other GPUs or machines (docs/scaling.md)."""
    cuda_graphs: bool = True
    """On a GPU, decode with CUDA graphs (small models become much faster; several runs can share the GPU); elsewhere of no effect."""
    kernels: bool = True
    """On a GPU, decode a bfloat16 base, in nf4 or not, with kernels of our own in Triton; the log says why where they can't be used."""
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

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ConfigError(f"data.rollout.max_rows is {self.max_rows}: give at least 1.")
        if self.engine not in ("default", "servers"):
            raise ConfigError(
                f"data.rollout.engine is {self.engine}: one of default, servers (vLLM in a process of its own: skillsd serve)."
            )
        if bool(self.servers) != (self.engine == "servers"):
            raise ConfigError(
                "data.rollout.servers is empty: give the servers' addresses, [http://host:port, ...], or set data.rollout.engine "
                "to default."
                if not self.servers
                else f"data.rollout.servers has addresses, and data.rollout.engine is {self.engine}: set it to servers, or remove them."
            )
        for i, url in enumerate(self.servers):
            if not is_address(url):
                raise ConfigError(
                    f"data.rollout.servers[{i}] is no http://host:port: user, password, query and spaces have no place in it."
                )
        if len({root(url) for url in self.servers}) < len(self.servers):
            raise ConfigError("data.rollout.servers names a server twice (with and without /v1 is the same): name each once.")
        if self.servers_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.servers_key_env):
            raise ConfigError("data.rollout.servers_key_env is the name of an environment variable, not a key: letters, digits and _ only.")
        if not 0 < self.servers_timeout < math.inf:
            raise ConfigError(f"data.rollout.servers_timeout is {self.servers_timeout}: give seconds, above 0.")
        if self.staleness < 0:
            raise ConfigError(f"data.rollout.staleness is {self.staleness}: give 0 (the rollout waits for the update) or more.")
        if self.staleness and self.engine != "servers":
            raise ConfigError(
                f"data.rollout.staleness is {self.staleness}, and data.rollout.engine is {self.engine}, which samples with the "
                "weights in training: set data.rollout.engine to servers, or staleness to 0."
            )


def server_key(variable: str | None) -> str:
    """The servers' API key; "" where they want none.

    Args:
        variable: `data.rollout.servers_key_env`.

    Raises:
        ConfigError: the environment variable is not set, or holds no key.
    """
    key = read_key(variable, "data.rollout.servers_key_env") if variable else ""
    if variable and not key:
        raise ConfigError(f"data.rollout.servers_key_env: the environment variable {variable} is not set: set it to the servers' API key.")
    return key
