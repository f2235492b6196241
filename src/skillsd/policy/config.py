"""What can be set about a policy. The attribute docstrings are the help of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from skillsd.errors import ConfigError
from skillsd.files.paths import read_text_path


@dataclass
class LoraSettings:
    """Low-rank adapters (Hu et al., arXiv:2106.09685), one for the student and one for the teacher."""

    r: int = 16
    """Rank."""
    alpha: int = 32
    """Scale: the update is alpha / r * B A."""
    dropout: float = 0.0
    """Dropout on the adapter's input; 0 keeps recorded and recomputed log-probs equal."""
    targets: str | list[str] = "all-linear"
    """Names of the linear layers to adapt, or `all-linear`."""
    init: str | None = None
    """Adapter that student and teacher start from: a PEFT folder, or `nano-recover` (shipped, for `nano`); null is the base model."""

    def __post_init__(self) -> None:
        self.init = None if self.init is None else read_text_path(self.init, "model.policy.lora.init")


@dataclass
class PolicySettings:
    """One base model with two adapters."""

    model: str = "nano"
    """`nano` (shipped), `smollm2-135m` (see `make smollm2`), a local folder, or a name on the Hugging Face hub."""
    quantise: Literal["none", "nf4"] = "none"
    """`nf4`: the base in 4-bit NormalFloat with double quantisation (QLoRA)."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Precision of the base; `auto` is the model's own on a GPU, float32 on a CPU and bfloat16 when quantised. Adapters stay float32."""
    shard: bool = False
    """Split the base's weights over all ranks (FSDP2), bfloat16 or float32; the adapters stay whole on each. Slow: see docs/scaling.md."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapters."""
    chat_template: str | None = None
    """Name of a packaged template (`qwen3`) or a path; null uses the model's own. It must be prefix-preserving."""
    attention: Literal["sdpa", "eager"] | None = None
    """Attention implementation of transformers; null lets transformers choose. Gemma 2 needs `eager` for its soft cap."""
    context_length: int | None = None
    """Longest sequence in tokens; null is the model's own limit."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    head_chunk: int = 2048
    """Tokens whose full-vocabulary logits exist at one time."""
    kernels: bool = True
    """On a GPU, score a bfloat16 base, in nf4 or not, with kernels of our own in Triton; the log says why where they can't be used."""

    def __post_init__(self) -> None:
        self.model = read_text_path(self.model, "model.policy.model")
        self.chat_template = None if self.chat_template is None else read_text_path(self.chat_template, "model.policy.chat_template")
        if self.shard and self.quantise == "nf4":
            raise ConfigError(
                "model.policy.shard: a base in 4 bits stays whole on each GPU: set it to false, or model.policy.quantise to none."
            )
        if self.lora.r < 1:
            raise ConfigError(f"model.policy.lora.r is {self.lora.r}: give a rank of at least 1.")
        if self.attention not in (None, "sdpa", "eager"):
            raise ConfigError(
                f"model.policy.attention is {self.attention}: one of sdpa, eager, null (the rollout's cache gives explicit masks)."
            )
        if self.context_length is not None and self.context_length < 2:
            raise ConfigError(f"model.policy.context_length is {self.context_length}: give at least 2 tokens, or null.")
        if self.head_chunk < 1:
            raise ConfigError(f"model.policy.head_chunk is {self.head_chunk}: give at least 1 token.")
