"""Decoding with an nf4 base and an unmerged LoRA adapter, beside transformers' generate in the same process and vLLM in one after it.

    python -m benchmarks.decode --size 4B --rows 8 32 64 --prompt 1024 --new 128          # a GPU
    python -m benchmarks.decode --size 4B --vllm --peer-python "env PYTHONPATH=/opt/peers python3"
    python -m benchmarks.decode --size tiny --rows 2 --prompt 40 --new 8 --device cpu     # does it run?

Decode tokens/s leave the prefill out on both sides; in groups of 8 rows have their prompt in common, elsewhere each has its own. `bound`
is what reading the nf4 weights once and every row's keys and values once a step takes at --bandwidth. The gap is
|recorded - recomputed| of the log-probs of what was sampled, in nats, recomputed by the learner's forward.

vLLM gets the same weights and adapter, and the GPU to itself: our policy is freed before. Its tokens/s are those of the median and of the
mean step in which every row decodes; ours are those of all steps.
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.peers import add_arguments, measurements
from benchmarks.random_model import random_model

from skillsd.engines.engine import Request
from skillsd.engines.in_process import InProcessEngine
from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def ours(engine: InProcessEngine, prompts: list[list[int]], new: int) -> tuple[float, float, list[list[int]], list[list[float]]]:
    """Seconds of the prefill and of `new` further tokens a row, the ids after the prompt and their log-probs."""
    device, n = engine.policy.device, len(prompts)
    session = engine.open(1.0)
    prefill, first = timed(lambda: session.turn([Request(i, p, i, 0, 1) for i, p in enumerate(prompts)]), device)
    decode, rest = timed(lambda: session.turn([Request(i, [], i, 1, new) for i in range(n)]), device)
    both = list(zip(first, rest, strict=True))
    return prefill, decode, [a.token_ids + b.token_ids for a, b in both], [a.logprobs + b.logprobs for a, b in both]


def generate(policy: Policy, prompts: list[list[int]], new: int) -> float:
    """Seconds that transformers' generate takes for `new` tokens a row after the first."""
    ids = torch.tensor(prompts, device=policy.device)
    rest: Any = dict(attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, use_cache=True)

    def run(k: int) -> float:
        return timed(lambda: policy.model.generate(input_ids=ids, min_new_tokens=k, max_new_tokens=k, **rest), policy.device)[0]

    with policy.acting("student"):
        run(2)
        return run(new + 1) - run(1)


def gap(policy: Policy, prompts: list[list[int]], ids: list[list[int]], logps: list[list[float]]) -> tuple[float, float]:
    """Mean and largest |recorded - recomputed|, in nats."""
    found = []
    for p, y, recorded in zip(prompts, ids, logps, strict=True):
        with torch.no_grad():
            scored = policy.score("student", [TokenSequence(p, y, [True] * len(y))]).logp[0]
        found.append((scored.cpu() - torch.tensor(recorded)).abs())
    all_of_them = torch.cat(found)
    return float(all_of_them.mean()), float(all_of_them.max())


def bound(policy: Policy, rows: int, length: float, bandwidth: float) -> float:
    """Seconds to read every 4-bit weight, the head and the cache of `rows` rows once."""
    c = policy.base.config
    weights = sum(p.numel() * p.element_size() for n, p in policy.base.named_parameters() if "lora_" not in n and "embed" not in n)
    weights += 0 if not c.tie_word_embeddings else c.vocab_size * c.hidden_size * 2
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2 * rows * length
    return (weights + cache) / bandwidth


def print_kernels(profiled: Any, steps: int = 1) -> None:
    """The kernels that a torch.profiler recorded, the longest first; times and launches of one of `steps` steps."""
    rows = sorted(((e.self_device_time_total, e.count, e.key) for e in profiled.key_averages()), reverse=True)
    print(f"{sum(r[0] for r in rows) / steps / 1e3:.2f} ms of kernels")
    for t, count, name in rows[:24]:
        print(f"  {t / steps:9.1f} us  {count / steps:7.1f} launches  {name[:110]}")


def profile(engine: InProcessEngine, prompts: list[list[int]], new: int) -> None:
    """Where the GPU's time of decoding goes, kernel by kernel."""
    from torch.profiler import ProfilerActivity

    session = engine.open(1.0)
    session.turn([Request(i, p, i, 0, 1) for i, p in enumerate(prompts)])
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as p:
        wall, _ = timed(lambda: session.turn([Request(i, [], i, 1, new) for i in range(len(prompts))]), engine.policy.device)
    print(f"\n{len(prompts)} rows, a step: {wall / new * 1e3:.2f} ms of wall time")
    print_kernels(p, new)


def measure(a: argparse.Namespace, model: Path, adapter: Path) -> dict[int, float]:
    """Prints our table and writes the adapter; tokens/s by the number of rows. The policy ends with it."""
    seconds, policy = timed(
        lambda: Policy(PolicySettings(model=str(model), quantise="nf4", lora=LoraSettings(r=16)), a.device), torch.device(a.device)
    )
    policy.stop_ids = ()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in policy.adapter("student").items():
            if "lora_B" in name:
                p.normal_(0, 0.01)
    policy.save_adapter(adapter)
    device = policy.device
    rates: dict[int, float] = {}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"Qwen3-{a.size}, {name}, torch {torch.__version__}; loaded in {seconds:.0f} s", flush=True)
    print(
        "| rows | decode tok/s | groups of 8 | without kernels | its gap | generate | x generate | bound | of bound | prefill tok/s "
        "| gap mean | max |\n" + "|---:" * 12 + "|",
        flush=True,
    )
    engine = InProcessEngine(policy)
    for n in a.rows:
        rng = random.Random(n)
        prompts = [[rng.randrange(10, policy.base.config.vocab_size) for _ in range(a.prompt)] for _ in range(n)]
        for k in (a.new, 4):  # grows the cache, compiles, and records each shape the second time that it is met
            ours(engine, prompts, k)
        prefill, decode, ids, logps = ours(engine, prompts, a.new)
        rate = rates[n] = n * a.new / decode
        for _ in range(2):
            ours(engine, [prompts[i // 8] for i in range(n)], 4)
        grouped = n * a.new / ours(engine, [prompts[i // 8] for i in range(n)], a.new)[1]
        plain = " | "
        if a.without:
            other = InProcessEngine(policy, kernels=False)
            for _ in range(2):
                ours(other, prompts, 4)
            _, took, other_ids, other_logps = ours(other, prompts, a.peer_new)
            plain = f"{n * a.peer_new / took:.0f} | {gap(policy, prompts[:4], other_ids[:4], other_logps[:4])[0]:.4f}"
            del other
        peer = n * a.peer_new / generate(policy, prompts, a.peer_new) if n in a.peer_rows else 0.0
        mean, most = gap(policy, prompts[:4], ids[:4], logps[:4])
        limit = n / bound(policy, n, a.prompt + a.new / 2, a.bandwidth)
        compared = f"{peer:.0f} | {rate / peer:.1f}" if peer else " | "
        print(
            f"| {n} | {rate:.0f} | {grouped:.0f} | {plain} | {compared} | {limit:.0f} | {rate / limit:.0%} | {n * a.prompt / prefill:.0f} "
            f"| {mean:.4f} | {most:.3f} |",
            flush=True,
        )
        if n in a.profile:
            profile(engine, prompts, 16)
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB allocated", flush=True)
    return rates


def beside_vllm(a: argparse.Namespace, model: Path, adapter: Path, rates: dict[int, float]) -> None:
    gc.collect()
    if a.device != "cpu":
        torch.cuda.empty_cache()
        print(f"\n{torch.cuda.memory_reserved() / 2**30:.1f} GiB stay reserved while vLLM runs", flush=True)
    options = dict(model=model, adapter=adapter, rows=a.rows, prompt=a.prompt, new=a.new, memory=a.peer_memory)
    for m in measurements("vllm_decode.py", a.peer_python, a.peer_timeout, **options):
        if "startup_s" in m:
            print(f"vLLM started in {m['startup_s']:.0f} s\n")
            print("| rows | ours tok/s | vLLM tok/s, median | mean | ours / median |\n" + "|---:" * 5 + "|", flush=True)
        else:
            n, peer = m["rows"], m["tok_s"]
            print(f"| {n} | {rates[n]:.0f} | {peer:.0f} | {m['mean_tok_s']:.0f} | {rates[n] / peer:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4B")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128, help="tokens a row that are timed")
    parser.add_argument("--peer-new", type=int, default=16, help="the same for generate, which takes far longer a token")
    parser.add_argument("--peer-rows", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--without", action="store_true", help="also decode without kernels")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bandwidth", type=float, default=2.95e12, help="bytes/s of the device's memory")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the random model lies or is put")
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="rows to profile")
    parser.add_argument("--vllm", action="store_true", help="also vLLM, in a process of --peer-python")
    add_arguments(parser)
    a = parser.parse_args()
    model = random_model(a.size, a.folder, a.device)
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(a, model, Path(folder))
        if a.vllm:
            beside_vllm(a, model, Path(folder, "student"), rates)


if __name__ == "__main__":
    main()
