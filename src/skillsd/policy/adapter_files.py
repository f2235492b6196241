"""Adapters in PEFT's format: which are loaded as PEFT loads them, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn

from skillsd.errors import ConfigError
from skillsd.files.durable import DamagedError, check_folder
from skillsd.policy.config import LoraSettings
from skillsd.policy.weights import read_json, stored

log = logging.getLogger(__name__)

KEY = "model.policy.lora.init"
CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
"""PEFT's two files, and ours beside them: which weights the adapter was trained on."""
RIGHT: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    # How A and B began. Not those that move a part of the base into them (pissa, olora, corda, loftq, lora_ga).
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Settings of an adapter, and the values with which it is computed as PEFT computes it."""
FREE = frozenset(
    {
        "r", "lora_alpha",  # compared with ours
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",  # the tensors say which layers
        "lora_dropout", "inference_mode", "eva_config", "fan_in_fan_out",  # of training, or set by PEFT to what the layer is
        "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "qalora_group_size", "megatron_core",
    }
)  # fmt: skip
"""Settings that change nothing about what its weights compute. Any other must be off: null, false or empty."""


def load_adapter(
    model: Any, name: str, tensors: Mapping[str, nn.Parameter], folder: Path, lora: LoraSettings, base: Mapping[str, Any]
) -> None:
    """Read a PEFT folder into an adapter.

    Args:
        model: PEFT's model around the base.
        name: Its adapter that is loaded.
        tensors: The tensors of that adapter, by their names in the file.
        folder: What PEFT's save_pretrained wrote.
        lora: What the adapter is to be.
        base: `Policy.identity` of the base.

    Raises:
        ConfigError: A file is missing or cannot be read, a setting is not known to be right, or not every tensor is there with its shape.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{KEY}: {folder} is not a PEFT adapter folder ({CONFIG} is missing): name one, or set it to null, also where a checkpoint is "
            "given: it holds the adapters."
        )
    try:
        check_folder(folder)
    except DamagedError as e:
        raise DamagedError(f"{KEY}: {e}") from e
    config = _check_config(folder, lora)
    _check_base(folder, config, base)
    path = folder / WEIGHTS
    if not path.is_file():  # PEFT would read a pickle, or ask the hub
        raise ConfigError(f"{KEY}: {folder} has no {WEIGHTS}: save the adapter with PEFT's save_pretrained.")
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    for k, t in stored(path, KEY).items():
        if k in shapes and shapes[k] != t.shape:
            raise ConfigError(
                f"{KEY}: {k} in {path} has shape {list(t.shape)}, and model.policy.model with model.policy.lora needs {list(shapes[k])}."
            )
    saved = load_peft_weights(str(folder), device="cpu")
    if odd := [k for k, t in saved.items() if not torch.isfinite(t).all()]:
        raise ConfigError(f"{KEY}: {odd[0]} in {path} is not finite: give an adapter that was not spoilt in training.")
    try:
        result = set_peft_model_state_dict(model, dict(saved), adapter_name=name)
    except RuntimeError as e:
        raise ConfigError(f"{KEY}: {path} does not fit: {' '.join(str(e).split())[:300]}") from e
    missing = [k.replace(f".{name}.", ".") for k in result.missing_keys if "lora_" in k and f".{name}." in k]
    unexpected = list(result.unexpected_keys)
    if missing or unexpected:
        raise ConfigError(f"{KEY}: {_unlike(path, missing, unexpected, len(tensors), config)}")


def _unlike(path: Path, missing: list[str], unexpected: list[str], needed: int, config: Mapping[str, Any]) -> str:
    said = []
    if missing:
        said.append(
            f"lacks {len(missing)} of the {needed} tensors that model.policy.model with model.policy.lora.targets needs "
            f"({sorted(missing)[0]}, ...)"
        )
    if unexpected:
        said.append(f"has {len(unexpected)} tensors that it does not need ({min(unexpected)}, ...)")
    targets = config.get("target_modules")
    if isinstance(targets, list):
        targets = sorted({str(x).rpartition(".")[2] for x in targets})
    return (
        f"{path} {' and '.join(said)}. If model.policy.lora.targets is not what the adapter was made with (its {CONFIG}: "
        f"{str(targets)[:200]}), "
        "set it to that; otherwise the file is not whole."
    )


def _check_config(folder: Path, lora: LoraSettings) -> dict[str, Any]:
    config = read_json(folder / CONFIG, KEY)
    if config.get("peft_type") not in RIGHT["peft_type"]:
        raise ConfigError(f"{KEY}: {folder} is not a LoRA adapter ({config.get('peft_type')}): name one that is.")
    for key, value in config.items():
        if key in FREE or (value in RIGHT[key] if key in RIGHT else value in (None, False, "", [], {})):
            continue
        cure = "give a plain LoRA adapter"
        if key == "init_lora_weights" and str(value).startswith(("pissa", "olora", "corda")):
            cure = "it goes with a changed base, unless PEFT converts it (save_pretrained with path_initial_model_for_weight_conversion)"
        raise ConfigError(f"{KEY}: {folder} was made with {key} {json.dumps(value)}, which is not known to be loaded right here: {cure}.")
    for key, theirs, ours in (("r", "r", lora.r), ("alpha", "lora_alpha", lora.alpha)):
        if config.get(theirs) != ours:
            raise ConfigError(
                f"{KEY} has {theirs} {config.get(theirs)}: set model.policy.lora.{key} to it (it is {ours}), or init to null."
            )
    return config


def _check_base(folder: Path, config: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    if (folder / BASE).is_file():
        made = read_json(folder / BASE, KEY)
        if made.get("digest") != base["digest"]:
            raise ConfigError(
                f"{KEY}: {folder} was trained on other weights ({made.get('model')}, {made.get('digest')}) than model.policy.model "
                f"({base['model']}, {base['digest']}): name that model. If it is meant, give a folder with {CONFIG} and {WEIGHTS} alone."
            )
        return
    given = str(config.get("base_model_name_or_path") or "")
    if given and Path(given).name != Path(str(base["model"])).name:
        log.warning("%s: %s names %s as its base; nothing says if that is %s.", KEY, folder, given, base["model"])


def write_base(folder: Path, base: Mapping[str, Any]) -> None:
    """Note beside an adapter which weights it was trained on."""
    (folder / BASE).write_text(json.dumps({k: base[k] for k in ("model", "digest")}, indent=1) + "\n", encoding="utf-8")


def trained(model: Any, name: str) -> dict[str, nn.Parameter]:
    """The LoRA tensors of one adapter of PEFT's model, by their names in its file.

    Raises:
        ConfigError: It adapts what is no linear layer, as an embedding.
    """
    mark = f".{name}."
    if odd := [k for k, _ in model.named_parameters() if "lora_embedding" in k]:
        raise ConfigError(f"model.policy.lora.targets: {odd[0].partition('.lora_')[0]} is an embedding: name linear layers.")
    return {k.replace(mark, "."): p for k, p in model.named_parameters() if "lora_" in k and mark in k}
