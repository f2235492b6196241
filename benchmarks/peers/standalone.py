"""What the peers' scripts have in common. They are started as files, so it is found beside them."""

from __future__ import annotations

import json
import os
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


def set_environment(**more: str) -> None:
    """Where the user has set nothing; before the peer is imported."""
    for key, value in {**ENVIRONMENT, **more}.items():
        os.environ.setdefault(key, value)


def say(**measured: Any) -> None:
    print(json.dumps(measured), flush=True)
