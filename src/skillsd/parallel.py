"""Several processes of one run: the rank of this one, its share of the work, and the collectives.

Ranks wait for each other on the CPU, for as long as it takes: one may play an episode of forty turns while the others have none. Ranks
that have ended are found by callbacks/watchdog.py. Without torch.distributed there is one rank, 0.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from skillsd.errors import ConfigError

T = TypeVar("T")
PATIENCE = timedelta(days=30)
POLLS = 0.001, 0.05
"""Seconds between two looks whether all ranks have come: at first, and at most."""
_BY_HAND = "NODE_RANK", "GROUP_RANK", "LOCAL_RANK"
_NUMBERS = "RANK", *_BY_HAND, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"
_SIZES = "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"
_groups: dict[Any, Any] = {}  # default group -> the one that waits
_single = False


class PeerLost(ConfigError):
    """Another rank has ended in the middle of the run."""


def world() -> int:
    """How many ranks there are; 1 until they have met."""
    return dist.get_world_size() if _is_initialized() else 1


def rank() -> int:
    """This one's number: 0 leads. Until they have met, as the launcher (torchrun, SLURM, Lightning) gave it."""
    if _is_initialized():
        return dist.get_rank()
    if _single:
        return 0
    # Lightning's own variables give no number before it counts the processes of a node: that it is not 0 is all that matters here.
    names = {"torchrun": ("RANK",), "srun": ("SLURM_PROCID",)}.get(launcher(), _BY_HAND)
    return next((int(n) for name in names if (n := os.environ.get(name, "0")).isdigit() and n != "0"), 0)


def launcher() -> str:
    """Who has started this process as one of several, by Lightning's own rule: torchrun, srun, or "" for Lightning and for a hand that
    sets its variables. What other variables say then is not looked at."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive") else ""


def settle(several: bool) -> None:
    """Before a Trainer is made: take out of the environment what an earlier launcher has left there, and say so. From then on everybody
    who asks, Lightning too, finds the same rank.

    Args:
        several: The configuration may ask for more than one process.

    Raises:
        ConfigError: A launcher has started other processes than the configuration asks for, or a variable says that this is one of
            several, and nothing says where they meet.
    """
    set_single(not several)
    if _is_initialized():  # in a worker of Ray, say: who is who has been settled
        return
    by = launcher()
    if by == "torchrun":
        if not several and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(f"trainer.devices is 1, and torchrun started {os.environ['WORLD_SIZE']} processes: set it to their number.")
        _check_numbers("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif not several:
        left = [n for n in (*_NUMBERS, *_SIZES) if os.environ.get(n, "0") not in ("0", "1" if n in _SIZES else "0")]
        _take_out([n for n in (*_NUMBERS, *_SIZES) if left and n in os.environ], left)
    elif by == "srun":
        _check_numbers("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
        if os.environ["SLURM_NTASKS"] != "1" and "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise ConfigError("SLURM_NTASKS_PER_NODE is not set: give srun --ntasks-per-node, or unset SLURM_NTASKS to run without srun.")
    else:
        left = [n for n in ("RANK", "SLURM_PROCID") if os.environ.get(n, "0") != "0"]
        _take_out(left, left)
        _check_numbers(*(n for n in _BY_HAND if n in os.environ))
        if "MASTER_PORT" not in os.environ and (left := [n for n in _BY_HAND if os.environ.get(n, "0") != "0"]):
            raise ConfigError(
                f"{left[0]} is {os.environ[left[0]]}: it says that this is one of several processes, and no MASTER_PORT says where they "
                f"meet: unset {left[0]}, or set MASTER_ADDR and MASTER_PORT."
            )


def _check_numbers(*names: str) -> None:
    for name in names:
        if not os.environ.get(name, "").isdigit():
            given = f"is {os.environ[name]!r}" if name in os.environ else "is not set, as srun and torchrun set it in each process"
            cure = "start this command with srun, or unset SLURM_NTASKS" if name.startswith("SLURM") else f"unset {name}"
            raise ConfigError(f"{name} {given}: {cure}.")


def _take_out(names: Sequence[str], said: Sequence[str]) -> None:
    if said:
        listed = ", ".join(f"{name}={os.environ[name]}" for name in said)
        print(f"the environment has {listed}, and no launcher has started this process: this is ignored.", file=sys.stderr, flush=True)
    for name in names:
        del os.environ[name]


def set_single(yes: bool) -> None:
    """Note whether this run has one rank, whatever a launcher says: it may have started many runs."""
    global _single
    _single = yes


def is_rank_zero() -> bool:
    """This is rank 0, the only one that writes: bank, logs, checkpoints, panel."""
    return rank() == 0


def name() -> str:
    """What stands before a message of this rank: nothing for rank 0."""
    return "" if is_rank_zero() else f"rank {rank()}: "


def print_rank_zero(text: str) -> None:
    """Print a line, if this is rank 0."""
    if is_rank_zero():
        print(text, flush=True)


def share(n: int, of: int | None = None) -> range:
    """Which of `n` things, in their order, are rank `of`'s (default: this one's): neighbours, and at most one more than others have."""
    ranks, own = world(), _own_index() if of is None else of
    return range(n * own // ranks, n * (own + 1) // ranks)


def balanced(costs: Sequence[float]) -> list[int]:
    """Which things are this rank's, in their order, so that all ranks have about equal sums: the largest first, each to who has least."""
    sums, own = [0.0] * world(), []
    me = _own_index()
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = sums.index(min(sums))
        sums[lightest] += costs[i]
        own += [i] * (lightest == me)
    return sorted(own)


def gather(value: T) -> list[T]:
    """What every rank has given, by rank, on every rank. All have to call it.

    Raises:
        PeerLost: Another rank has ended.
    """
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    with _peer_errors():
        _wait_for_all()
        dist.all_gather_object(found, value, group=_gloo_group())
    found[rank()] = value
    return found


def broadcast(value: T) -> T:
    """What rank 0 has given, on every rank. All have to call it.

    Raises:
        PeerLost: Another rank has ended.
    """
    if world() == 1:
        return value
    carrier: list[Any] = [value]
    with _peer_errors():
        _wait_for_all()
        dist.broadcast_object_list(carrier, src=0, group=_gloo_group(), device=torch.device("cpu"))
    return value if is_rank_zero() else carrier[0]  # type: ignore[no-any-return]


def all_reduce_max(n: int) -> int:
    """The largest that any rank has given. All have to call it.

    Raises:
        PeerLost: Another rank has ended.
    """
    if world() == 1:
        return n
    largest = torch.tensor(n, device="cpu")  # where a model is made, Lightning sets another default
    with _peer_errors():
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=_gloo_group())
    return int(largest)


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype and device by their sums over all ranks, in one reduction. All have to call it.

    Raises:
        PeerLost: Another rank has ended.
    """
    if world() == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    with _peer_errors():
        dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(total.view_as(t))


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _own_index() -> int:
    """This rank's number in a run of several, 0 in a run of one, whatever number a launcher gave."""
    return rank() if world() > 1 else 0


def _gloo_group() -> Any:
    """The group for what is waited for. The default one loses patience after minutes, and on GPUs it would keep them busy."""
    default = dist.group.WORLD
    if default not in _groups:
        _groups[default] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups[default]


def _wait_for_all() -> None:
    """Wait for the other ranks so that Ctrl-C and SIGTERM still work: a blocking collective reacts to no signal before they come."""
    here, pause = dist.barrier(group=_gloo_group(), async_op=True), POLLS[0]
    while not here.is_completed():
        time.sleep(pause)
        pause = min(POLLS[1], pause * 1.1)
    here.wait()


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Raises PeerLost for what a collective says when another rank has ended."""
    try:
        yield
    except RuntimeError as e:
        said = " ".join(str(e).split()).rpartition("] ")[2] if "Connection" not in str(e) else "the connection is closed"
        raise PeerLost(
            f"another rank has ended ({said[:200]}): see its own message, if it left one. Go on with --ckpt_path last, on any number "
            "of ranks."
        ) from e
