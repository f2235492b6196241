"""Settings to an engine."""

from __future__ import annotations

from skillsd.engines.engine import Engine
from skillsd.engines.in_process import InProcessEngine
from skillsd.engines.settings import EngineSettings
from skillsd.engines.vllm_server import VllmServers
from skillsd.policy import Policy


def make_engine(policy: Policy, settings: EngineSettings, run: str = "") -> Engine:
    """What `data.rollout.engine` names, on a policy. Raises ConfigError if it can't be had.

    Args:
        policy: Who acts.
        settings: How.
        run: A name that all ranks of a run give and no other run on the same servers does, such as its folder's.
    """
    s = settings
    if s.engine == "servers":
        return VllmServers(policy, s.servers, s.servers_folder, s.servers_key_env, s.max_rows, s.servers_timeout, s.staleness, run)
    return InProcessEngine(policy, s.cuda_graphs, s.kernels)
