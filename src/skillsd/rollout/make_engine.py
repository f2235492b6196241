"""Settings to an engine."""

from __future__ import annotations

from skillsd.policy import Policy
from skillsd.rollout.engine import Engine
from skillsd.rollout.in_process import InProcessEngine
from skillsd.rollout.settings import RolloutSettings
from skillsd.rollout.vllm_server import VllmServers


def make_engine(policy: Policy, r: RolloutSettings, run: str = "") -> Engine:
    """What `rollout.engine` names, on a policy. Raises ConfigError if it can't be had.

    Args:
        policy: Who acts.
        r: How.
        run: A name that all ranks of a run give and no other run on the same servers does, such as its folder's.
    """
    if r.engine == "servers":
        return VllmServers(policy, r.servers, r.servers_folder, r.servers_key_env, r.max_rows, r.servers_timeout, r.staleness, run)
    return InProcessEngine(policy, r.cuda_graphs, r.kernels)
