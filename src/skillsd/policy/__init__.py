"""One base model, named LoRA adapters: loading, switching, scoring. The only place that touches peft and bitsandbytes."""

import logging

# On import it reports a CPU kernel that it does without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from skillsd.policy.budget import CacheBudget  # noqa: E402
from skillsd.policy.config import LoraSettings, PolicySettings  # noqa: E402
from skillsd.policy.decoding_kernels import DecodingKernels, decoding_kernels  # noqa: E402
from skillsd.policy.load import model_folder  # noqa: E402
from skillsd.policy.memory import Demand, Footprint, cache_bytes  # noqa: E402
from skillsd.policy.packed import TokenSequence, micro_batches  # noqa: E402
from skillsd.policy.policy import Policy, Scores  # noqa: E402
from skillsd.policy.shard import OUT_OF_MEMORY, of_the_base  # noqa: E402

__all__ = [
    "OUT_OF_MEMORY",
    "CacheBudget",
    "DecodingKernels",
    "Demand",
    "Footprint",
    "LoraSettings",
    "Policy",
    "PolicySettings",
    "Scores",
    "TokenSequence",
    "cache_bytes",
    "decoding_kernels",
    "micro_batches",
    "model_folder",
    "of_the_base",
]
