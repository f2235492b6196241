"""Work on several ranks, in processes that begin with a copy of this one: nothing is imported again."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(n: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns on each of `n` ranks that have met (gloo, on the CPU); Lightning takes them for torchrun's.

    Each is a process, also a single one, so that nothing which `work` sets stays.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def begin(rank: int) -> None:
        torch.set_num_threads(1)
        where = dict(RANK=rank, LOCAL_RANK=rank, GROUP_RANK=0, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_PORT=1)
        os.environ |= {k: str(v) for k, v in where.items()} | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n)
        torch.save(work(rank), folder / f"{rank}.pt")
        dist.barrier()

    (folder / "meet").unlink(missing_ok=True)
    ranks = [multiprocessing.get_context("fork").Process(target=begin, args=(r,), daemon=True) for r in range(n)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(120)
    assert [p.exitcode for p in ranks] == [0] * n
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(n)]
