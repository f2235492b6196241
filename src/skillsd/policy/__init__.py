"""One base model, named LoRA adapters: loading, switching, scoring. The only place that touches peft and bitsandbytes."""

from skillsd.policy.config import LoraSettings, PolicySettings
from skillsd.policy.policy import Policy, TokenSequence, micro_batches

__all__ = ["LoraSettings", "Policy", "PolicySettings", "TokenSequence", "micro_batches"]
