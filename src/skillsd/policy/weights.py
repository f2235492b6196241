"""Weight files: what a folder of safetensors holds, read from its headers, and the digest that says which weights they are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from skillsd.errors import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECES, PIECE = 4, 1 << 14
"""A digest reads 64 KiB of each tensor: four pieces from its beginning to its end."""
_POINTER = b"version https://git-lfs"
_SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", INDEX)
_UNSAID = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "quantization_config")
"""What a model's configuration holds beside what its weights compute; so do the ids of special tokens and the longest context."""


class Stored(NamedTuple):
    """One tensor in a safetensors file.

    Args:
        file: The file.
        dtype: As the file names it, e.g. `BF16`.
        shape: Its sizes.
        start: Where its bytes begin, from the file's beginning.
        size: How many they are.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def read_json(path: Path, key: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: The file holds something else; the line begins with `key`.
    """
    data = path.read_bytes()
    _refuse_pointer(path, data, key)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{key}: {path} is no JSON ({e}): download or save it anew.") from e
    if not isinstance(found, dict):
        raise ConfigError(f"{key}: {path} holds no JSON object: download or save it anew.")
    return found


def check_files(folder: Path, key: str) -> None:
    """Look at a model's small files, some of which transformers leaves out without a word when it can't read them.

    Raises:
        ConfigError: One is a git-lfs pointer or no JSON object.
    """
    for path in sorted(folder.iterdir()):
        if path.name in _SMALL:
            read_json(path, key)
        elif path.is_file():
            with path.open("rb") as f:
                _refuse_pointer(path, f.read(len(_POINTER)), key)


def _refuse_pointer(path: Path, head: bytes, key: str) -> None:
    if head.startswith(_POINTER):
        raise ConfigError(f"{key}: {path} is a pointer of git-lfs and not the file itself: run `git lfs pull` where it was cloned.")


def stored(path: Path, key: str) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name, from its header alone.

    Raises:
        ConfigError: The file is cut short, or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(max(8, len(_POINTER)))
        _refuse_pointer(path, head, key)
        length = int.from_bytes(head[:8], "little")
        if size < 8 or length > size - 8:
            raise ConfigError(f"{key}: {path} is cut short, or is no safetensors file: download or save it anew.")
        f.seek(8)
        try:
            header = json.loads(f.read(length))
            found = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + first, last - first)
            end = max((t.start + t.size for t in found.values()), default=8 + length)
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError) as e:
            raise ConfigError(f"{key}: {path} has a header that is none of a safetensors file: download or save it anew.") from e
    if end != size:
        raise ConfigError(f"{key}: {path} has {size:,} bytes, and its header says {end:,}: download or save it anew.")
    return found


def model_tensors(folder: Path, key: str = "model.policy.model") -> dict[str, Stored]:
    """The tensors of a model's folder, of one file or of several with an index, as transformers finds them.

    Raises:
        ConfigError: A file is missing or cannot be read.
    """
    if (folder / SINGLE).is_file():
        return stored(folder / SINGLE, key)
    if not (folder / INDEX).is_file():
        raise ConfigError(f"{key}: {folder} has neither {SINGLE} nor {INDEX}: name a folder made by save_pretrained.")
    shards = read_json(folder / INDEX, key).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise ConfigError(f"{key}: {folder / INDEX} has no weight_map: download or save it anew.")
    found: dict[str, Stored] = {}
    for name in sorted(set(shards.values())):
        if not (folder / name).is_file():
            raise ConfigError(f"{key}: {folder / name} is missing, which {INDEX} names: download or save the model anew.")
        found |= {k: t for k, t in stored(folder / name, key).items() if shards.get(k) == name}
    return found


def digest(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> str:
    """Which weights these are, whatever their folder is called and however they are split over files.

    Args:
        config: The model's configuration, as transformers' `to_diff_dict` gives it.
        tensors: As `model_tensors` finds them.

    Returns:
        blake2b, 32 hexadecimal digits, of what the configuration computes, and of each tensor's name, dtype, shape and 64 KiB.
    """

    def parts() -> Iterable[tuple[str, str, tuple[int, ...], bytes]]:
        for name, t in sorted(tensors.items()):
            with t.file.open("rb") as f:
                yield name, t.dtype, t.shape, b"".join(os.pread(f.fileno(), n, t.start + at) for at, n in _pieces(t.size))

    return _digest(config, parts())


def digest_of(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """`digest` of weights that lie in no file."""

    def parts() -> Iterable[tuple[str, str, tuple[int, ...], bytes]]:
        for name, t in sorted(state.items()):
            data = t.detach().cpu().contiguous().numpy().tobytes()
            yield name, str(t.dtype), tuple(t.shape), b"".join(data[at : at + n] for at, n in _pieces(len(data)))

    return _digest(config, parts())


def _pieces(size: int) -> list[tuple[int, int]]:
    if size <= PIECES * PIECE:
        return [(0, size)]
    return [((size - PIECE) * i // (PIECES - 1), PIECE) for i in range(PIECES)]


def _digest(config: Mapping[str, Any], parts: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    computes = {k: v for k, v in config.items() if k not in _UNSAID and not k.endswith(("_token_id", "max_position_embeddings"))}
    out = blake2b(json.dumps(computes, sort_keys=True, default=str).encode(), digest_size=16)
    for name, dtype, shape, data in parts:
        out.update(f"\n{name} {dtype} {list(shape)} {len(data)}\n".encode())
        out.update(data)
    return out.hexdigest()
