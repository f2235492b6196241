"""`skillsd serve`: one vLLM server in the foreground, from an environment of its own, with the options that a run's configuration needs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import skillsd
from skillsd.bounded import visible
from skillsd.engines.http import HttpCall, ServerError
from skillsd.engines.settings import EngineSettings, server_key
from skillsd.errors import ConfigError, redacted
from skillsd.policy import PolicySettings, model_folder
from skillsd.policy.load import UNTRAINED, context_length, read_config

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM makes room for."""
FIND_VLLM = """
import importlib.metadata as m, importlib.util as u
print(m.version(m.packages_distributions()["vllm"][0]), u.find_spec("vllm").submodule_search_locations[0])
"""
POLL_S, HEALTH_S, REPORT_S, END_S = 0.5, 5.0, 10.0, 20.0
LAST_LINES, LAST_BYTES = 20, 1 << 14
ANY_HOST = "0.0.0.0"


def serve(policy: PolicySettings, engine: EngineSettings, device: torch.device, python: str, host: str, port: int, log: Path) -> None:
    """Start a server, print how a fit reaches it, and stay until it ends or an interruption ends it.

    Args:
        policy: The base and the adapters that it is to serve.
        engine: Names the variable with the server's API key, and how many versions of an adapter are in use at one time.
        device: Where the learner computes: decides what a dtype of `auto` is.
        python: The interpreter of an environment with vLLM.
        host, port: Where it listens.
        log: File for what it prints.

    Raises:
        ConfigError: The settings cannot be served, vLLM or the port is not to be had, or the server has ended by itself.
    """
    version, folder = find_vllm(python)
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", *options(policy, engine, device, folder)]
    key = server_key(engine.servers_key_env)
    check_port(host, port)
    url = f"http://{'127.0.0.1' if host == ANY_HOST else host}:{port}"
    with running([*command, "--host", host, "--port", str(port)], key, log) as process:
        start = reported = time.monotonic()
        while process.poll() is None and not is_healthy(url):
            time.sleep(POLL_S)
            if time.monotonic() > reported + REPORT_S:
                reported = time.monotonic()
                print(f"vLLM {version} loads {policy.model}: {reported - start:.0f} s (its log: {log})", flush=True)
        if process.poll() is None:
            print(f"vLLM {version} serves {policy.model} after {time.monotonic() - start:.0f} s. Ctrl-C ends it. For skillsd fit:")
            shown = url if host != ANY_HOST else f"http://{socket.gethostname()}:{port}"
            print(f"--data.rollout.engine=servers --data.rollout.servers=[{shown}]", flush=True)
        status = process.wait()
    for line in log.read_bytes()[-LAST_BYTES:].decode(errors="replace").splitlines()[-LAST_LINES:]:
        print(visible(redacted(line)), file=sys.stderr)
    raise ConfigError(
        f"python: vLLM {version} of {python} has ended with status {status}: its last lines are above, all of them in {log}. What it calls "
        "max_model_len is model.policy.context_length, max_lora_rank model.policy.lora.r."
    )


def find_vllm(python: str) -> tuple[str, Path]:
    """The version of an interpreter's vLLM, and its folder."""
    cure = "name the interpreter of an environment with vLLM (python -m venv vllm && vllm/bin/pip install vllm)"
    try:
        probe = subprocess.run([python, "-c", FIND_VLLM], capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=60)
        version, folder = probe.stdout.split(maxsplit=1)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ConfigError(f"python: {python} cannot be run ({getattr(e, 'strerror', None) or 'no answer in 60 s'}): {cure}.") from e
    except ValueError as e:
        raise ConfigError(f"python: {python} has no vLLM: {cure}.") from e
    return version, Path(folder.strip())


def options(policy: PolicySettings, engine: EngineSettings, device: torch.device, vllm: Path) -> list[str]:
    """What `vllm serve` needs for these settings: the model first. `vllm` is vLLM's folder."""
    if policy.model == UNTRAINED:
        raise ConfigError(f"model.policy.model is {UNTRAINED}, which has no files that a server could read: name another model.")
    if policy.shard:
        raise ConfigError(
            "model.policy.shard: a server holds the whole base on its GPU: set it to false where that fits, else serve another base."
        )
    if policy.lora.r > RANKS[-1]:
        raise ConfigError(f"model.policy.lora.r is {policy.lora.r}: vLLM takes ranks up to {RANKS[-1]}, so give no more.")
    nf4 = policy.quantise == "nf4"
    if nf4 and not (vllm / "model_executor" / "layers" / "quantization" / "bitsandbytes.py").is_file():
        raise ConfigError(
            "model.policy.quantise is nf4, and this vLLM has no bitsandbytes (0.24 has, 0.33 has not): set it to none, here and in the "
            "fit, or name another python."
        )
    config: Any = read_config(policy.model)
    dtype: str = policy.dtype
    if dtype == "auto":
        own = str(config.dtype or "auto").removeprefix("torch.")
        dtype = "bfloat16" if nf4 else own if device.type == "cuda" else "float32"
    length = context_length(policy, config)
    return [
        model_folder(policy.model), "--served-model-name", policy.model, "--dtype", dtype,
        *(["--load-format", "bitsandbytes", "--quantization", "bitsandbytes"] if nf4 else ["--load-format", "safetensors"]),
        *(["--max-model-len", str(length)] if length < 1 << 30 else []),
        "--enable-lora", "--max-lora-rank", str(next(r for r in RANKS if r >= policy.lora.r)), "--max-loras", str(2 + engine.staleness),
        "--generation-config", "vllm", "--logprobs-mode", "processed_logits",
        "--logits-processors", "skillsd.engines.vllm_noise:NoiseProcessor",
    ]  # fmt: skip


def check_port(host: str, port: int) -> None:
    """Refuse a port that somebody else listens on: their server would be taken for ours."""
    if not 0 < port < 1 << 16:
        raise ConfigError(f"port is {port}: give a number from 1 to 65535.")
    try:
        socket.create_server((host, port)).close()
    except OSError as e:
        raise ConfigError(f"port: {host}:{port} cannot be listened on ({e.strerror or e}): give another --port, or --host.") from e


@contextmanager
def running(command: list[str], key: str, log: Path) -> Iterator[subprocess.Popen]:
    """The server, and at the block's end neither it nor anything that it has started."""
    # skillsd alone is importable there by a link: the folder that it is installed in may hold another torch than vLLM's.
    with TemporaryDirectory(prefix="skillsd-serve-") as link, _opened(log) as out:
        (Path(link) / "skillsd").symlink_to(Path(skillsd.__file__).parent)
        env = {k: v for k, v in os.environ.items() if k not in ("VLLM_API_KEY", "PYTORCH_ALLOC_CONF")}  # the latter is ours
        env |= {"PYTHONPATH": os.pathsep.join([link, *filter(None, [env.get("PYTHONPATH")])]), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        env["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # newer vLLMs' other runner takes processors of another interface
        env |= {"VLLM_API_KEY": key} if key else {}  # not as an option, which everybody on the machine can read
        process = subprocess.Popen(
            command, env={"VLLM_NO_USAGE_STATS": "1", **env}, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        try:
            yield process
        finally:
            for how in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, how)
                with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C waits no longer
                    process.wait(END_S)


def _opened(log: Path) -> Any:
    try:
        return log.open("wb")
    except OSError as e:
        raise ConfigError(f"log_file: {log} cannot be written ({e.strerror or e}): name another file.") from e


def is_healthy(url: str) -> bool:
    """Ask the server once."""
    try:
        HttpCall(url, "", HEALTH_S).ask("/health", 1 << 16)
    except ServerError:
        return False
    return True
