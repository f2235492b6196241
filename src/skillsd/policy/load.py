"""Loading a base model and its tokenizer: nano, a converted package, a local folder, or a hub name."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen3ForCausalLM

from skillsd.errors import ConfigError
from skillsd.policy.config import PolicySettings
from skillsd.policy.nano import build_config, build_tokenizer

UNTRAINED, RECOVER = "nano-untrained", "nano-recover"
PACKAGED = resources.files("skillsd.policy")


def adapter_folder(name: str, model: str) -> str:
    """Where the adapter called `name` lies: a folder, or the packaged one of the nano agent.

    Raises:
        ConfigError: the packaged one is asked for with another model.
    """
    if name != RECOVER:
        return name
    if model != "nano":
        raise ConfigError(f"policy.lora.init is {RECOVER}, an adapter of the nano agent, and policy.model is {model}: set init to null.")
    return str(PACKAGED / "weights" / RECOVER)


def model_folder(name: str) -> str:
    """Where the model called `name` lies: a folder, or `name` itself for the hub.

    Raises:
        ConfigError: a packaged model that is not installed, a folder without weights, or with weights in a pickle.
    """
    if name == "nano":
        if not (PACKAGED / "weights" / "nano" / "config.json").is_file():
            raise ConfigError("policy.model: this installation carries no nano weights: reinstall skillsd, or name another model.")
        return str(PACKAGED / "weights" / "nano")
    if name == "smollm2-135m":
        from skillsd.policy.smollm2 import cached_folder

        return str(cached_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin")):
            raise ConfigError(
                f"policy.model: the folder {name} has its weights in a pickle (pytorch_model.bin), which could run code: convert them to "
                "safetensors with save_pretrained."
            )
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise ConfigError(
                f"policy.model: the folder {name} holds no model (config.json, *.safetensors): name one made by save_pretrained."
            )
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"policy.model: there is no folder {name}: check the path.")
    return name


def load_tokenizer(settings: PolicySettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the chat template that the settings name."""
    if settings.model == UNTRAINED:
        return build_tokenizer()
    folder = model_folder(settings.model)
    if Path(folder).is_dir() and not any([*Path(folder).glob("tokenizer*"), *Path(folder).glob("vocab*")]):
        # transformers would make up an empty one
        raise ConfigError(f"policy.model: the folder {settings.model} holds no tokenizer: save it there with save_pretrained.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        if "trust_remote_code" in str(e):
            raise _own_code(settings.model) from e
        raise _not_found(settings.model, "tokenizer", e) from e
    if settings.chat_template is not None:
        packaged = PACKAGED / "templates" / f"{settings.chat_template}.jinja"
        path = Path(settings.chat_template)
        if packaged.is_file():
            tokenizer.chat_template = packaged.read_text()
        elif path.is_file():
            tokenizer.chat_template = path.read_text()
        else:
            names = ", ".join(sorted(p.name.removesuffix(".jinja") for p in (PACKAGED / "templates").iterdir()))
            raise ConfigError(f"policy.chat_template: {settings.chat_template} is neither a packaged template ({names}) nor a file.")
    if tokenizer.chat_template is None:
        raise ConfigError(f"policy.chat_template is null and {settings.model} has no chat template of its own: name one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(settings: PolicySettings, device: torch.device, place: torch.device | None = None) -> PreTrainedModel:
    """The base model for `device`, in evaluation mode, without gradients.

    Args:
        settings: Which.
        device: Where it is to be used: this decides its dtype.
        place: Where it is put at first; null is `device`.

    Raises:
        ConfigError: a name that is neither packaged, nor a folder with weights, nor reachable on the hub.
    """
    nf4 = settings.quantise == "nf4"
    if settings.model == UNTRAINED:
        if nf4:
            raise ConfigError(f"policy.quantise: {UNTRAINED} has no weights to quantise: set it to none.")
        return _untrained(place or device)
    dtype: torch.dtype | str
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
    elif nf4:
        dtype = torch.bfloat16  # on a CPU the fastest compute type of nf4, and fp32 the slowest of all
    else:
        dtype = "auto" if device.type == "cuda" else torch.float32
    kwargs: dict[str, object] = {"dtype": dtype, "device_map": {"": place or device}, "trust_remote_code": False, "use_safetensors": True}
    if settings.attention is not None:
        kwargs["attn_implementation"] = settings.attention
    if nf4:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(model_folder(settings.model), **kwargs)
    except OSError as e:
        raise _not_found(settings.model, "model", e) from e
    except ValueError as e:
        if "trust_remote_code" in str(e):
            raise _own_code(settings.model) from e
        raise
    for module in model.modules():
        # With it, an eval-mode forward re-packs the weights in place and later gradients are silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def _untrained(device: torch.device) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(build_config(len(build_tokenizer()))).to(device).eval().requires_grad_(False)


def _own_code(name: str) -> ConfigError:
    return ConfigError(f"policy.model: {name} brings Python code of its own (auto_map), which is never run: name another model.")


def _not_found(name: str, what: str, error: Exception) -> ConfigError:
    if Path(name).expanduser().is_dir():
        return ConfigError(f"policy.model: the folder {name} holds no {what} that transformers can read: {str(error).splitlines()[0]}")
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return ConfigError(f"policy.model: {name} is neither a local folder nor reachable on the hub{offline}: check the name or the network.")
