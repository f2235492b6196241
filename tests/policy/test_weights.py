"""What is loaded of a base is complete or refused, and which weights it has is a digest of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from skillsd.errors import ConfigError
from skillsd.policy import LoraSettings, Policy, PolicySettings
from skillsd.policy.load import load_base, load_tokenizer
from skillsd.policy.weights import PIECE, stored

CPU = torch.device("cpu")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
FILE = "model.safetensors"


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], Any]:
    return lambda m: save_file({k: t.contiguous() for k, t in change(load_file(m / FILE)).items()}, m / FILE, {"format": "pt"})


def config(**changes: Any) -> Callable[[Path], Any]:
    return lambda m: (m / "config.json").write_text(json.dumps(json.loads((m / "config.json").read_text()) | changes))


def file(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda m: (m / name).write_bytes(data)


def sharded(m: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(m)
    (m / FILE).unlink()
    model.save_pretrained(m, max_shard_size="20KB")
    assert len(list(m.glob("model-*.safetensors"))) > 1


def without_a_shard(m: Path) -> None:
    sharded(m)
    next(m.glob("model-00002-*")).unlink()


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a foreign prefix": (weights(lambda w: {f"foreign.{k}": t for k, t in w.items()}), r"foreign\.lm_head\.weight"),
    "a layer missing": (weights(lambda w: {k: t for k, t in w.items() if "layers.1." not in k}), r"model\.layers\.1\."),
    "a tensor missing": (weights(lambda w: {k: t for k, t in w.items() if "layers.1.mlp.up" not in k}), r"layers\.1\.mlp\.up_proj"),
    "another shape": (weights(lambda w: {k: t[:-1] if "layers.1.mlp.up" in k else t for k, t in w.items()}), r"layers\.1\.mlp\.up_proj"),
    "a layer too many": (config(num_hidden_layers=1, layer_types=["full_attention"]), r"model\.layers\.1\."),
    "a smaller vocabulary": (
        lambda m: (weights(lambda w: {k: t[:50] if k in ("lm_head.weight", "model.embed_tokens.weight") else t for k, t in w.items()})(m),
                   config(vocab_size=50)(m)),
        "tokenizer",
    ),
    "a pointer of git-lfs": (file(FILE, POINTER), rf"{FILE} .*git lfs pull"),
    "a cut file": (lambda m: file(FILE, (m / FILE).read_bytes()[:-100])(m), FILE),
    "a cut header": (lambda m: file(FILE, (m / FILE).read_bytes()[:50])(m), FILE),
    "an empty file": (file(FILE, b""), FILE),
    "a missing shard": (without_a_shard, "model-00002-"),
    "a configuration that is no JSON": (file("config.json", b"{"), r"config\.json"),
    "a configuration that is a list": (file("config.json", b"[]"), r"config\.json"),
    "stop ids that are no JSON": (file("generation_config.json", b"{"), r"generation_config\.json"),
    "an unknown architecture": (config(model_type="nosuch"), "nosuch"),
    "no heads": (config(num_attention_heads=0), "ZeroDivision"),
    "a cut tokenizer": (file("tokenizer.json", b'{"a": "'), "tokenizer"),
    "a tokenizer that is a pointer": (file("tokenizer.json", POINTER), r"tokenizer\.json .*git lfs pull"),
}  # fmt: skip


@pytest.fixture
def model(tiny_model: Callable[..., str], tmp_path: Path) -> Path:
    """A copy, to spoil."""
    return Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "model"))


def make(model: Path | str, **settings: Any) -> Policy:
    return Policy(PolicySettings(model=str(model), lora=LoraSettings(r=2, alpha=4), **settings))


@pytest.mark.parametrize("case", SPOILT)
def test_a_base_is_loaded_whole_or_refused(model: Path, case: str) -> None:
    spoil, named = SPOILT[case]
    spoil(model)
    with pytest.raises(ConfigError, match=rf"policy\.model: .*{named}"):
        make(model)


def test_what_is_tied_and_what_belongs_to_no_part_is_not_missing(tiny_model: Callable[..., str], tmp_path: Path) -> None:
    tied = Path(shutil.copytree(tiny_model("qwen3", {"tie_word_embeddings": True}), tmp_path / "tied"))
    assert "lm_head.weight" not in load_file(tied / FILE)
    weights(lambda w: w | {"vision.weight": torch.zeros(2)})(tied)
    assert load_base(PolicySettings(model=str(tied)), CPU).lm_head.weight is not None


def test_a_layer_is_missed_in_4_bits_too(tiny_model: Callable[..., str], tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    whole = tiny_model("qwen3", shape)
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    weights(lambda w: {k: t for k, t in w.items() if "layers.1.mlp.up" not in k})(model)
    with pytest.raises(ConfigError, match=r"policy\.model: .*layers\.1\.mlp\.up_proj"):
        make(model, quantise="nf4")
    assert make(whole, quantise="nf4").digest == make(whole).digest


def test_an_adapter_is_no_base(model: Path) -> None:
    """transformers would load the base that it names."""
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "somebody/else"}')
    with pytest.raises(ConfigError, match=r"policy\.model: .*adapter_config\.json.*policy\.lora\.init"):
        make(model)


@pytest.mark.parametrize("name", [None, "own.jinja"])
def test_a_template_that_does_not_parse(model: Path, tmp_path: Path, name: str | None) -> None:
    path = tmp_path / name if name else model / "chat_template.jinja"
    path.write_text("{% for %}")
    with pytest.raises(ConfigError, match=rf"policy\.chat_template: .*{name or 'model'} does not parse \(line 1"):
        load_tokenizer(PolicySettings(model=str(model), chat_template=str(path) if name else None))


def test_the_digest_is_that_of_the_weights_whatever_the_folder_is_called(
    model: Path, tiny_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tiny_model("qwen3")).digest
    monkeypatch.chdir(tmp_path)
    assert {make(name).digest for name in ("./model", "model/", "../" + tmp_path.name + "/model", str(model))} == {whole}
    assert make(model, dtype="bfloat16", attention="eager").digest == whole
    sharded(model)
    assert make(model).digest == whole
    config(max_position_embeddings=2048, transformers_version="9")(model)
    assert make(model).digest == whole
    config(rms_norm_eps=0.1)(model)
    assert make(model).digest != whole


def test_the_digest_sees_other_weights(model: Path, tmp_path: Path) -> None:
    before = make(model).digest
    with (model / FILE).open("r+b") as f:
        f.seek(stored(model / FILE, "")["model.layers.1.mlp.up_proj.weight"].start + 40)
        f.write(b"\x01")
    assert make(model).digest != before
    untrained = {make("nano-untrained").digest for _ in range(2)}
    assert len(untrained | {make("nano").digest, before}) == 3


def test_the_digest_looks_at_the_whole_of_a_large_tensor(tmp_path: Path) -> None:
    from skillsd.policy.weights import digest

    found = set()
    for at in (None, 0, 2_000_000, 3_999_999):
        tensor = torch.zeros(4_000_000, dtype=torch.uint8)
        if at is not None:
            tensor[max(0, at - PIECE * 50) : at + 1 + PIECE * 50] = 1
        save_file({"w": tensor}, tmp_path / FILE)
        found.add(digest({}, stored(tmp_path / FILE, "")))
    assert len(found) == 4


def test_a_model_of_the_hub_is_known_by_its_snapshot(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    repository = cache / "models--somebody--tiny"
    shutil.copytree(model, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert make("somebody/tiny").digest == make(model).digest
