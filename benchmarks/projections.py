"""Which tiles the nf4 projections with LoRA should take: a sweep over the layers of one decoder block.

    python -m benchmarks.projections --size 4B --rows 8 32 64        # a GPU

Each figure is microseconds of a launch in a CUDA graph that goes over copies of the weights larger than the L2 cache. `bound` is reading
the 4-bit weights once at --bandwidth; `plan` is what `kernels.projections.plan` chooses.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing

import torch
from benchmarks.random_model import QWEN3

from skillsd.kernels.projections import Plan, plan, project_all
from skillsd.kernels.reference import Lora, Nf4Weight, Projection
from skillsd.kernels.workspace import Workspace


def layer(n: int, k: int, rank: int) -> Projection:
    blocks = n * k // 64
    w = Nf4Weight(
        torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device="cuda"),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda"),
        torch.linspace(-1, 1, 256, device="cuda"), torch.rand(-(-blocks // 256), device="cuda"), 0.01, (n, k),
    )  # fmt: skip
    return Projection(w, None, Lora(torch.randn(rank, k, device="cuda"), torch.randn(n, rank, device="cuda"), 1.0) if rank else None)


def microseconds(sizes: list[int], k: int, rows: int, rank: int, planned: Plan | None, workspace: Workspace, copies: int) -> float:
    groups = [[layer(n, k, rank) for n in sizes] for _ in range(copies)]
    x = torch.randn(rows, k, device="cuda").bfloat16()
    for g in groups[:2]:
        project_all(x, g, workspace, planned)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for g in groups:
            project_all(x, g, workspace, planned)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[2] * 1e3 / copies


def candidates(rows: int, sizes: list[int], k: int, processors: int) -> list[Plan]:
    bm = plan(rows, sizes, k, processors).bm
    found = []
    for bn, (warps, stages) in itertools.product((64, 128), ((4, 3), (4, 5), (8, 4))):
        tiles = sum(-(-n // bn) for n in sizes)
        splits = {max(1, min(16, round(f * processors / tiles), k // 256)) for f in (1, 2, 3, 4, 6)}
        found += [Plan(bm, bn, s, warps, stages) for s in sorted(splits)]
    return found


def compile_one(job: tuple[list[int], int, int, int, Plan]) -> None:
    """In a process of its own: what it compiles lies in Triton's cache for the others."""
    sizes, k, rows, rank, planned = job
    with contextlib.suppress(Exception):  # too much shared memory: the sweep will say so
        microseconds(sizes, k, rows, rank, planned, Workspace(torch.device("cuda")), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4B", choices=QWEN3)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--bandwidth", type=float, default=2.95e12, help="bytes/s of the device's memory")
    parser.add_argument("--best", type=int, default=4, help="how many plans to print")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    a = parser.parse_args()
    hidden, inner, _, heads, kv_heads, dim = QWEN3[a.size]
    kinds = {
        "qkv": ([heads * dim, kv_heads * dim, kv_heads * dim], hidden), "o": ([hidden], heads * dim), "gate+up": ([inner, inner], hidden),
        "down": ([hidden], inner),
    }  # fmt: skip
    workspace = Workspace(torch.device("cuda"))
    print(f"Qwen3-{a.size}, {torch.cuda.get_device_name()}, rank {a.rank}", flush=True)
    sweep = [(rows, kind, candidates(rows, *kinds[kind], workspace.processors)) for rows in a.rows for kind in kinds]
    variants = {(len(kinds[kind][0]), p._replace(splits=1)): (*kinds[kind], rows, a.rank, p) for rows, kind, plans in sweep for p in plans}
    with multiprocessing.get_context("spawn").Pool(a.jobs) as pool:
        pool.map(compile_one, variants.values(), chunksize=1)
    for rows, kind, plans in sweep:
        sizes, k = kinds[kind]
        size = sum(sizes) * k // 2
        copies = max(4, int(2e8 // size))
        found = []
        for p in plans:
            try:
                found.append((microseconds(sizes, k, rows, a.rank, p, workspace, copies), p))
            except Exception as e:
                print(f"  {p}: {type(e).__name__}", flush=True)
        found.sort()
        planned, without = (microseconds(sizes, k, rows, r, None, workspace, copies) for r in (a.rank, 0))
        print(f"{rows:3} rows, {kind:8} bound {size / a.bandwidth * 1e6:5.1f} us, plan {planned:5.1f} ({without:.1f} without LoRA), best:")
        for t, p in found[: a.best]:
            print(f"      {t:5.1f} bn {p.bn} splits {p.splits} warps {p.warps} stages {p.stages}", flush=True)


if __name__ == "__main__":
    main()
