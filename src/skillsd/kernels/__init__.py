"""Triton kernels for decoding: the projections of an nf4 base with unmerged LoRA, attention over a slot cache, RMSNorm.

Each has its plain PyTorch form in `reference`, which says what it computes. The others import Triton and are therefore imported late.
In Triton's interpreter (TRITON_INTERPRET=1) they run on a CPU, in float32, for tests: far slower than what they stand in for.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def interpreted() -> bool:
    """Return whether Triton interprets kernels instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why decoding should not use the kernels for a model of this dtype on this device; "" if it should."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" or torch.version.hip is not None:
        return "there is no NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the base is {str(dtype).removeprefix('torch.')}, not bfloat16 or float16"
    return ""
