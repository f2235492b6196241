"""Two ranks on a CPU: one that ends, one that is silent, one that is only slow; and going on with one rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.runs import RULES, Run, Server, overlay
from tests.ranks import meeting
from tests.tolerance import ROUNDING

from skillsd.files.checkpoint import newest_good, read_checkpoint

pytestmark = pytest.mark.slow
PATIENCE = 8.0
SMALL: dict[str, Any] = {
    "policy": {"model": "nano", "lora": {"r": 4, "alpha": 8, "init": None}},  # dropout draws by rank
    "teacher": {"mode": "sync", "every": 1},
    "checkpoint": {"every_n_train_steps": 1000},  # the last iteration is in memory alone
    "callbacks": [{"class_path": "skillsd.callbacks.PeerWatch", "init_args": {"patience": PATIENCE}}],
}
TWO = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    """One a rank, as Lightning's launcher, or a cluster's, would start them."""
    met = meeting() | {"WORLD_SIZE": "2", "NODE_RANK": "0"}
    servers = [Server(environment=met | {"LOCAL_RANK": str(i)}) for i in (0, 1)]
    yield servers
    for server in servers:
        server.close()


class Pair(Run):
    """A run of two ranks."""

    def __init__(self, folder: Path, servers: list[Server], overlay: Path) -> None:
        super().__init__(folder, servers[0], overlay)
        self.servers = servers
        self.logs = [folder.with_suffix(f".{i}.log") for i in (0, 1)]

    def begin(self, *more: str, bomb: Any = None) -> list[int]:
        both = zip(self.servers, self.logs, (None, bomb), strict=True)
        return [server.start(self.args(*TWO, *more), log, fuse) for server, log, fuse in both]

    def end(self) -> list[int]:
        return [s.wait() for s in self.servers]

    def said(self) -> str:
        return "".join(log.read_text()[-4000:] for log in self.logs)


@pytest.fixture(scope="module")
def whole(servers: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One rank, to the end."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(folder / "run", servers[0], overlay(folder / "overlay.yaml", RULES, **SMALL))
    run.fit()
    return run


def assert_as_one(run: Run, whole: Run) -> None:
    """The same episodes and bank; numbers to float32's rounding, which depends on who sits beside whom."""
    got, want = run.record(), whole.record()
    assert got["skill"] == want["skill"]
    for table in ("event", "state"):  # the gap of a use is in them, and in the checksum at their end
        for a, b in zip(got[table], want[table], strict=True):
            assert [x if not isinstance(x, float) else pytest.approx(x, rel=1e-4, abs=ROUNDING) for x in a[:-1]] == list(b[:-1]), table
    assert got["panel"] == want["panel"]
    for a, b in zip(got["metrics"], want["metrics"], strict=True):
        for key in a.keys() - {"policy/logp_drift", "policy/logp_drift_max", "teacher/k3"}:  # rounding is all that is in them
            assert (a[key] == b[key] == "") or float(a[key]) == pytest.approx(float(b[key]), rel=1e-4, abs=ROUNDING), key
    adapters = [r.checkpoint()["state_dict"] for r in (run, whole)]
    for key, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][key], rtol=1e-3, atol=1e-4)  # AdamW enlarges the rounding of small gradients


def test_a_rank_that_dies_ends_the_run_and_one_rank_goes_on(servers: list[Server], whole: Run, tmp_path: Path) -> None:
    run = Pair(tmp_path / "run", servers, whole.overlay)
    started = time.monotonic()
    run.begin(bomb=("skillsd.rollout.collector:Collector.collect", 6, False))  # the first plays the panel: in the fifth iteration
    codes = run.end()
    assert codes[1] == -signal.SIGKILL and codes[0] != 0 and time.monotonic() - started < 60, run.said()
    assert "another rank has ended" in run.said() or "rank 1 has ended" in run.said()
    assert "Traceback" not in run.said()
    last = newest_good(run.folder / "checkpoints")
    assert last is not None and read_checkpoint(last)["global_step"] == 4 == len(run.rows())
    run.resume()
    assert_as_one(run, whole)


def test_a_rank_that_is_silent_ends_the_run(servers: list[Server], whole: Run, tmp_path: Path) -> None:
    """Its connections stay open: nothing but the missing signs of life tells that it is gone."""
    run = Pair(tmp_path / "run", servers, whole.overlay)
    _, pid = run.begin("--trainer.max_epochs=500")
    while not run.has_rows(2):
        os.kill(pid, 0)
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    code = servers[0].wait()
    took = time.monotonic() - started
    os.kill(pid, signal.SIGKILL)
    servers[1].wait()
    assert code != 0 and PATIENCE - 3 < took < PATIENCE + 30 < 60, run.said()
    assert f"rank 1 has ended, or is silent for {PATIENCE:g} s" in run.said()
    last = newest_good(run.folder / "checkpoints")
    assert last is not None and read_checkpoint(last)["global_step"] == len(run.rows())


def test_a_rank_that_is_slow_is_waited_for(servers: list[Server], whole: Run, tmp_path: Path) -> None:
    """Slower than the watch has patience for silence, and than the ranks' own collectives would wait. Then two ranks have done as one."""
    run = Pair(tmp_path / "run", servers, whole.overlay)
    strategy = "--trainer.strategy=lightning.pytorch.strategies.DDPStrategy"
    run.begin("--data.env=tests.e2e.slow_env:tests/Slow-v0", strategy, "--trainer.strategy.init_args.timeout=0:00:15")
    assert run.end() == [0, 0], run.said()
    assert_as_one(run, whole)
    assert "rank 1" not in run.said() and run.logs[1].read_text() == ""
