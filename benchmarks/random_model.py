"""Random weights of an exact architecture: speed and memory do not depend on their values."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from skillsd.policy.nano import build_tokenizer

QWEN3 = {  # hidden, intermediate, layers, heads, key-value heads, dimension of a head
    "tiny": (128, 256, 2, 4, 2, 32),
    "0.6B": (1024, 3072, 28, 16, 8, 128),
    "4B": (2560, 9728, 36, 32, 8, 128),
    "8B": (4096, 12288, 36, 32, 8, 128),
    "14B": (5120, 17408, 40, 40, 8, 128),
}
"""Qwen3's shapes by size; 4B and smaller tie the head to the embedding."""
VOCABULARY = 151936
SMOLLM2 = "SmolLM2-135M"
"""A size too."""


def random_model(size: str, root: Path, device: str) -> Path:
    """A folder `root`/qwen3-SIZE that PolicySettings.model takes, made once: random bfloat16 weights and the nano tokenizer."""
    folder = root / f"qwen3-{size.lower()}"
    if not (folder / "config.json").is_file():
        if size == SMOLLM2:
            return _save(folder, device, LlamaConfig(
                vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True, bos_token_id=None,
                eos_token_id=None, pad_token_id=0,
            ))  # fmt: skip
        names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"
        config = Qwen3Config(
            vocab_size=VOCABULARY if size != "tiny" else 1024, max_position_embeddings=40960, rope_theta=1e6,
            tie_word_embeddings=size not in ("8B", "14B"), bos_token_id=None, eos_token_id=None, pad_token_id=0,
            **dict(zip(names, QWEN3[size], strict=True)),
        )  # fmt: skip
        return _save(folder, device, config)
    return folder


def _save(folder: Path, device: str, config: Qwen3Config | LlamaConfig) -> Path:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    build_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
