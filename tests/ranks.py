"""Functions on several CPU ranks of this host: one process imports everything and forks each job's ranks in torchrun's environment."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tests.fork_server import ForkServer
from tests.tolerance import ROUNDING

from skillsd.skills import SkillBank

LIMIT = 150
"""Seconds after which a rank that hangs is killed."""


class Ranks(ForkServer):
    """Ranks of this host, forked by one process.

    Attributes:
        logs: What each rank of the last job has printed.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.logs = folder, [""]

    def run(self, target: str, *args: Any, environments: Sequence[dict[str, str]] = ({},), codes: Sequence[int] | None = None) -> list[Any]:
        """Call `module:function` with args (JSON) once for each of the environments, all at one time; what each returns, None if nothing.

        Codes: the exit statuses that are expected; 0 of all.
        """
        files = [(self.folder / f"{i}.log", self.folder / f"{i}.pt") for i in range(len(environments))]
        for _, result in files:
            result.unlink(missing_ok=True)
        children = [(env, str(log), str(result)) for env, (log, result) in zip(environments, files, strict=True)]
        self.fork(target, args, children, LIMIT)
        found = self.join()
        self.logs = [log.read_text() for log, _ in files]
        assert found == list(codes or [0] * len(files)), f"{found}\n" + "\n".join(x[-3000:] for x in self.logs)
        return [torch.load(result) if result.is_file() else None for _, result in files]


def torchrun(ranks: int = 2) -> list[dict[str, str]]:
    """What torchrun would tell each."""
    alike = {**meeting(), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    return [{**alike, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]


def meeting() -> dict[str, str]:
    """Where ranks meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}


def bank_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All events and skills of a run's bank."""
    with SkillBank(folder / "bank.sqlite", read_only=True) as bank:
        events = list(bank.events())
        skills = [vars(bank.get(event.skill_id)) for event in events if event.kind == "insert"]
        return {"events": [event._asdict() for event in events], "skills": skills}


def near(a: Any, b: Any, tolerance: float = ROUNDING, where: str = "") -> None:
    """Equal but for rounding, of floats and of a tensor's norm; and where not. A tolerance of 0: equal to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor) and not tolerance:
        assert torch.equal(a, b), where
    elif isinstance(a, torch.Tensor):
        a, b = a.float(), b.float()
        off, size = float((a - b).norm()), float(b.norm())
        assert off <= tolerance * max(size, 1.0), f"{where}: {off} of {size}"
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            near(a[key], b[key], tolerance, f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            near(x, y, tolerance, f"{where}/{i}")
    elif isinstance(a, float):
        assert math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) or (math.isnan(a) and math.isnan(b)), f"{where}: {a} {b}"
    else:
        assert a == b, where
