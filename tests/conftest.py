"""Tiny random models, built from configs in code. All share the nano tokenizer."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # tests of kernels run them on the CPU

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.ranks import Ranks
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from skillsd.policy import LoraSettings, Policy, PolicySettings
from skillsd.policy.nano import build_tokenizer


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """AppWorld's tests need what `make appworld` makes: a run without them says so in its closing lines."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "AppWorld is not set up" in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"NOT RUN: {len(skipped)} tests on AppWorld's engine; `make appworld` sets it up.", yellow=True)


SHAPE: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=1024, pad_token_id=0, eos_token_id=4, bos_token_id=None, initializer_range=0.25,
)  # fmt: skip
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": lambda **k: Gemma2Config(
        sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=8, **k
    ),
    "mistral": lambda **k: MistralConfig(sliding_window=5, **k),
}


WIDE: dict[str, Any] = dict(hidden_size=64, intermediate_size=192, head_dim=16, initializer_range=0.125)
"""Changes to SHAPE: rows of whole blocks of 64 weights, for nf4 kernels."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Architecture and changes to SHAPE -> folder of a tiny random model and its tokenizer."""
    made: dict[str, str] = {}

    def make(architecture: str, shape: dict[str, Any] | None = None) -> str:
        name = f"{architecture} {shape}"
        if name not in made:
            tokenizer = build_tokenizer()
            torch.manual_seed(len(architecture))
            model = AutoModelForCausalLM.from_config(CONFIGS[architecture](vocab_size=len(tokenizer), **{**SHAPE, **(shape or {})}))
            folder = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[name] = str(folder)
        return made[name]

    return make


def randomise_adapters(policy: Policy, seed: int = 7) -> None:
    """Give both adapters different values that change the output."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name in ("student", "teacher"):
            for p in policy.adapter(name).values():
                p.normal_(0, 0.1)
    policy.student_changed()


@pytest.fixture
def make_policy(tiny_model: Callable[..., str]) -> Callable[..., Policy]:
    """A policy on a tiny model; with `randomise` both adapters hold different values that change the output."""

    def make(
        architecture: str = "qwen3", randomise: bool = True, lora: dict[str, Any] | None = None, shape: dict[str, Any] | None = None,
        device: str = "cpu", **settings: Any,
    ) -> Policy:  # fmt: skip
        settings.setdefault("attention", "eager" if architecture == "gemma2" else None)
        adapters = LoraSettings(**{"r": 4, "alpha": 8, **(lora or {})})
        policy = Policy(PolicySettings(model=tiny_model(architecture, shape), lora=adapters, **settings), device)
        if randomise:
            randomise_adapters(policy)
        return policy

    return make


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Forks processes that have everything imported."""
    server = Ranks(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()
