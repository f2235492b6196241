"""skillsd: train multi-turn LLM agents with Skill-SD (arXiv:2604.10674). Importing this loads neither torch nor lightning.

The method      module, learner, batch, optimizer, metrics, strategy; objective/, policy/, kernels/
Its data        data, stream, panel_stream, environment, tasks, trajectory, demonstration; rollout/, engines/, skills/
Around a run    trainer, callbacks/, files/, analysis/, study/, pretrain/, doctor
Configuration   config_file (reads), config_errors (explains), methods (`method:`), class_paths (`skillsd config`), _conf; cli/
Errors          errors (ConfigError, secrets), diagnosis (whose fault it is), bounded (files from elsewhere), timeouts, signals
Small things    parallel (ranks), statistics, hashing (seeded orders), words (numbers in sentences), testing (checks an environment)
"""

import logging
import os
import sys
from importlib import import_module
from typing import Any

from skillsd._conf import conf_dir

# PyTorch reads it when it is imported. Blocks of GPU memory that can grow: without, 1.2 of 11 GiB were lost between them with an 8B model.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# Likewise. A rank that is gone gives one line of ours; PyTorch's sockets give a page each.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# bitsandbytes warns on some CPUs that a package for its own 4-bit forward is missing. It is not used: that forward has no gradient.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Lightning takes these for numbers when it is imported: what else they hold is no rank, and ends its import with a traceback.
for _name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
    if not os.environ.get(_name, "0").isdigit():
        print(f"{_name} is {os.environ.pop(_name)!r}, which is no rank: it is ignored.", file=sys.stderr)

__version__ = "0.1.0"

_BASES = {
    "Callback": "skillsd.callbacks",
    "Gate": "skillsd.objective",
    "GroupContext": "skillsd.skills",
    "PrivilegedContext": "skillsd.skills",
    "Signal": "skillsd.objective",
    "Summariser": "skillsd.skills",
    "SynchronousSummariser": "skillsd.skills",
    "Tokens": "skillsd.objective",
}
"""What classes of one's own are made from -> its module, imported when it is asked for."""

__all__ = ["__version__", "conf_dir"]


def __getattr__(name: str) -> Any:
    if name in _BASES:
        return getattr(import_module(_BASES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
