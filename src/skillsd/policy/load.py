"""Loading a base model and its tokenizer: nano, a converted package, a local folder, or a hub name."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3ForCausalLM,
)
from transformers.utils import cached_file

from skillsd.errors import ConfigError, causes
from skillsd.policy.config import PolicySettings
from skillsd.policy.nano import build_config, build_tokenizer
from skillsd.policy.weights import check_files, digest, digest_of, model_tensors

log = logging.getLogger(__name__)

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
        raise ConfigError(
            f"model.policy.lora.init is {RECOVER}, an adapter of the nano agent, and model.policy.model is {model}: set init to null."
        )
    return str(PACKAGED / "weights" / RECOVER)


def model_folder(name: str) -> str:
    """Where the model called `name` lies: a folder, or `name` itself for the hub.

    Raises:
        ConfigError: a packaged model that is not installed, a folder without weights, or with weights in a pickle.
    """
    if name == "nano":
        if not (PACKAGED / "weights" / "nano" / "config.json").is_file():
            raise ConfigError("model.policy.model: this installation carries no nano weights: reinstall skillsd, or name another model.")
        return str(PACKAGED / "weights" / "nano")
    if name == "smollm2-135m":
        from skillsd.policy.smollm2 import cached_folder

        return str(cached_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():  # transformers would load the base that it names, wherever that is
            raise ConfigError(
                f"model.policy.model: the folder {name} holds an adapter (adapter_config.json): name its base here, and the folder as "
                "model.policy.lora.init."
            )
        if not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin")):
            raise ConfigError(
                f"model.policy.model: the folder {name} has its weights in a pickle (pytorch_model.bin), which could run code: "
                "convert them to safetensors with save_pretrained."
            )
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise ConfigError(
                f"model.policy.model: the folder {name} holds no model (config.json, *.safetensors): name one made by save_pretrained."
            )
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"model.policy.model: there is no folder {name}: check the path.")
    return name


def read_config(name: str) -> PreTrainedConfig:
    """The configuration of the model called `name`, without its weights.

    Raises:
        ConfigError: it cannot be had, or asks for code of its own.
    """
    folder = model_folder(name)
    with _reading(name, "configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(settings: PolicySettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the chat template that the settings name."""
    if settings.model == UNTRAINED:
        return build_tokenizer()
    folder = model_folder(settings.model)
    if Path(folder).is_dir() and not any([*Path(folder).glob("tokenizer*"), *Path(folder).glob("vocab*")]):
        # transformers would make up an empty one
        raise ConfigError(f"model.policy.model: the folder {settings.model} holds no tokenizer: save it there with save_pretrained.")
    with _reading(settings.model, "tokenizer"):
        if Path(folder).is_dir():
            check_files(Path(folder), "model.policy.model")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if settings.chat_template is not None:
        tokenizer.chat_template = _template(settings.chat_template)
    if tokenizer.chat_template is None:
        raise ConfigError(f"model.policy.chat_template is null and {settings.model} has no chat template of its own: name one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "-"}], tokenize=False)
    except TemplateSyntaxError as e:
        where = settings.chat_template or f"the template of {settings.model}"
        raise ConfigError(
            f"model.policy.chat_template: {where} does not parse (line {e.lineno}: {e.message}): mend it, or name another."
        ) from e
    except Exception as e:  # what a template refuses, and whether it may, is the chat's business
        log.debug("the template refuses a probe: %s", e)
    return tokenizer


def _template(name: str) -> str:
    packaged, path = PACKAGED / "templates" / f"{name}.jinja", Path(name)
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    if not path.is_file():
        names = ", ".join(sorted(p.name.removesuffix(".jinja") for p in (PACKAGED / "templates").iterdir()))
        raise ConfigError(f"model.policy.chat_template: {name} is neither a packaged template ({names}) nor a file.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"model.policy.chat_template: {path} is no UTF-8 ({e}): save it as UTF-8.") from e


def load_base(settings: PolicySettings, device: torch.device, place: torch.device | None = None) -> PreTrainedModel:
    """The base model for `device`, in evaluation mode, without gradients.

    Args:
        settings: Which.
        device: Where it is to be used: this decides its dtype.
        place: Where it is put at first; null is `device`.

    Raises:
        ConfigError: a name that is neither packaged, nor a folder with weights, nor reachable on the hub; or weights that are not all of
            the model's, each with its shape.
    """
    nf4 = settings.quantise == "nf4"
    if settings.model == UNTRAINED:
        if nf4:
            raise ConfigError(f"model.policy.quantise: {UNTRAINED} has no weights to quantise: set it to none.")
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
    folder = model_folder(settings.model)
    with _reading(settings.model, "model"):
        if Path(folder).is_dir():
            check_files(Path(folder), "model.policy.model")
            model_tensors(Path(folder))  # transformers' own errors name no file
        model, info = AutoModelForCausalLM.from_pretrained(folder, **kwargs, output_loading_info=True, ignore_mismatched_sizes=True)
    if getattr(model, "_hf_peft_config_loaded", False):  # of the hub
        raise ConfigError(
            f"model.policy.model: {settings.model} is an adapter: name its base here, and a folder with it as model.policy.lora.init."
        )
    _check_complete(settings.model, model, info)
    for module in model.modules():
        # With it, an eval-mode forward re-packs the weights in place and later gradients are silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def _untrained(device: torch.device) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(build_config(len(build_tokenizer()))).to(device).eval().requires_grad_(False)


def base_digest(settings: PolicySettings, base: PreTrainedModel) -> str:
    """Which weights a base that was loaded with these settings has, and what they compute: see `weights.digest`."""
    config: Any = base.config.get_text_config()
    if settings.model == UNTRAINED:
        return digest_of(config.to_diff_dict(), base.state_dict())
    folder = model_folder(settings.model)
    if not Path(folder).is_dir():  # of the hub: the snapshot that has just been loaded
        folder = str(Path(str(cached_file(folder, "config.json", local_files_only=True))).parent)
    return digest(config.to_diff_dict(), model_tensors(Path(folder)))


def context_length(settings: PolicySettings, config: Any) -> int:
    """Tokens that a sequence may have: what is set, and no more than the model's configuration allows; 2^30 where neither says."""
    limit = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)
    return min(settings.context_length or limit, limit)


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel) -> None:
    """Raises ConfigError for a tokenizer with more words than the base has embeddings of; added tokens may have none."""
    words, rows = int(tokenizer.vocab_size), int(base.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if words > rows:
        raise ConfigError(
            f"model.policy.model: the tokenizer of {name} has {words} words, and its embedding {rows} rows: take both from one model."
        )


def _check_complete(name: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse a base of which a part is not the file's: transformers draws at random what it does not find.

    Raises:
        ConfigError: tensors are missing, have another shape, or are of layers that the model's configuration leaves out.
    """
    if wrong := sorted(info["mismatched_keys"]):
        key, found, wanted = wrong[0]
        raise ConfigError(
            f"model.policy.model: {len(wrong)} tensors of {name} have another shape than its config.json says ({key} has "
            f"{list(found)}, and should have {list(wanted)}): save the model anew with save_pretrained."
        )
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        others = f", and has {len(unexpected)} of other names ({unexpected[0]}, ...)" if unexpected else ""
        raise ConfigError(
            f"model.policy.model: {name} lacks {len(missing)} tensors of {type(model).__name__} ({', '.join(missing[:3])}"
            f"{', ...' * (len(missing) > 3)}){others}; they would be random: save the model anew with save_pretrained."
        )
    kinds = {re.sub(r"\d+", "#", k) for k, _ in model.named_parameters()}
    if left := [k for k in unexpected if re.sub(r"\d+", "#", k) in kinds]:
        raise ConfigError(f"model.policy.model: {name} has layers that its config.json leaves out ({left[0]}, ...): save the model anew.")
    if unexpected:
        belong = f"{len(unexpected)} tensors of {name} belong to no part of {type(model).__name__}"
        log.warning("model.policy.model: %s (%s, ...).", belong, unexpected[0])


@contextmanager
def _reading(name: str, what: str) -> Iterator[None]:
    """Whatever transformers says about a model's files is one line; its own report of what is missing is left to `_check_complete`.

    Raises:
        ConfigError: the files cannot be read, hold code, or do not fit into the memory.
    """
    reports = logging.getLogger("transformers.modeling_utils")

    def not_a_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    reports.addFilter(not_a_report)
    try:
        yield
    except ConfigError:
        raise
    except OSError as e:
        raise _not_found(name, what, e) from e
    except torch.OutOfMemoryError as e:
        raise ConfigError(
            f"model.policy.model: out of memory while {name} is loaded: set model.policy.quantise to nf4, or name a smaller model."
        ) from e
    except Exception as e:
        if "trust_remote_code" in str(e):
            raise ConfigError(
                f"model.policy.model: {name} brings Python code of its own (auto_map), which is never run: name another model."
            ) from e
        said = " ".join(str(e).split())[:300]
        raise ConfigError(
            f"model.policy.model: transformers cannot load the {what} of {name} ({type(e).__name__}: {said}): name another model."
        ) from e
    finally:
        reports.removeFilter(not_a_report)


def _not_found(name: str, what: str, error: Exception) -> ConfigError:
    if Path(name).expanduser().is_dir():
        return ConfigError(
            f"model.policy.model: the folder {name} holds no {what} that transformers can read: {str(error).splitlines()[0]}"
        )
    why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else causes(error)[:300]
    return ConfigError(
        f"model.policy.model: {name} is no local folder, and its {what} cannot be had from the hub ({why}): "
        "check the name, the network and whether you may read it."
    )
