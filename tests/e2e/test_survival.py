"""A disk that is full or broken, damaged files, a run stopped by a signal: nothing is lost, and one line says what is wrong."""

from __future__ import annotations

import errno
import random
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.e2e.runs import RULES, Run, Server, assert_equal, build_faults, overlay

from skillsd.analysis import Run as Recorded
from skillsd.errors import ConfigError
from skillsd.files.checkpoint import newest_good, read_checkpoint
from skillsd.files.durable import DamagedError, check_folder

SHORT = {"trainer": {"max_epochs": 1}, "teacher": {"mode": "sync", "every": 1}}  # 3 iterations


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(build_faults(tmp_path_factory.mktemp("faults")))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs")
    run = Run(folder / "whole", server, overlay(folder / "overlay.yaml", RULES, **SHORT))
    run.fit()
    return run


@pytest.fixture
def run(whole: Run, server: Server, tmp_path: Path) -> Run:
    return Run(tmp_path / "run", server, whole.overlay)


@pytest.fixture
def finished(whole: Run, run: Run) -> Run:
    """A copy of it."""
    shutil.copytree(whole.folder, run.folder)
    return run


# -- the disk ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("code", "lasting"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_a_run_survives_a_disk_that_fails(whole: Run, run: Run, code: int, lasting: bool) -> None:
    """At a few of the calls that change a file; `make torture` goes through all of them."""
    if run.server.preload is None:
        pytest.skip("needs Linux and a C compiler")
    calls = run.fail(0, 0, False)[2]
    assert calls > 50
    assert_equal(run.record(), whole.record())
    for n in random.Random(code).sample(range(1, calls + 1), 3):
        run.survives(n, code, lasting, whole.record())


# -- damage -----------------------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


def test_every_flipped_bit_of_a_checkpoint_is_seen(finished: Run) -> None:
    path = finished.folder / "checkpoints" / "last.ckpt"
    good = path.read_bytes()
    for at in [*random.Random(0).sample(range(len(good)), 60), *range(len(good) - 75, len(good))]:
        flip(path, at)
        with pytest.raises(DamagedError, match=r"last\.ckpt"):
            read_checkpoint(path)
        path.write_bytes(good)
    for length in (0, 1, 21, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedError, match=r"last\.ckpt"):
            read_checkpoint(path)


def test_after_a_damaged_checkpoint_the_previous_one_is_taken(whole: Run, finished: Run) -> None:
    folder = finished.folder / "checkpoints"
    flip(folder / "last.ckpt", 5000)
    text = finished.resume()
    assert "last.ckpt is damaged: its checksum does not match. Going on from" in text and "previous.ckpt" in text
    assert_equal(finished.record(), whole.record())

    for path in folder.iterdir():
        flip(path, 5000)
    before = {p: p.read_bytes() for p in finished.folder.rglob("*") if p.is_file()}
    assert "There is no other" in finished.resume(code=2)
    assert before == {p: p.read_bytes() for p in finished.folder.rglob("*") if p.is_file()}
    with pytest.raises(DamagedError):
        newest_good(folder)


def test_a_checkpoint_without_a_checksum_is_taken_if_it_is_whole(finished: Run) -> None:
    path = finished.folder / "checkpoints" / "last.ckpt"
    torch.save(read_checkpoint(path), path)
    assert newest_good(path.parent) == path
    flip(path, path.stat().st_size // 2)
    assert newest_good(path.parent) == path.with_name("previous.ckpt")


@pytest.mark.parametrize("name", ["metrics.csv", "trajectories.jsonl"])
def test_a_damaged_log_is_named(whole: Run, finished: Run, name: str) -> None:
    path = finished.folder / name
    good = path.read_bytes()
    flip(path, 400)
    assert f"{name} is damaged" in finished.resume("--trainer.max_epochs=2", code=2)
    path.write_bytes(good[:-100])
    assert f"{name} is damaged" in finished.resume("--trainer.max_epochs=2", code=2)
    path.unlink()  # moved away: it begins anew
    finished.resume("--trainer.max_epochs=2")
    lines = path.read_text().splitlines()
    assert len(lines) == (1 + 3 if name == "metrics.csv" else 16)


def test_a_damaged_line_of_trajectories_is_named(finished: Run) -> None:
    path = finished.folder / "trajectories.jsonl"
    good = path.read_bytes()
    assert len(Recorded(finished.folder).trajectories) == 16
    for at in random.Random(0).sample(range(len(good)), 200):
        flip(path, at)
        with pytest.raises(ConfigError, match=r"trajectories\.jsonl:\d+: the line is"):
            Recorded(finished.folder).trajectories  # noqa: B018
        path.write_bytes(good)


def test_a_damaged_adapter_is_named(whole: Run, finished: Run) -> None:
    folder = finished.folder / "adapter" / "student"
    check_folder(folder)
    flip(folder / "adapter_model.safetensors", 3000)
    given = f"--model.policy.lora.init={folder}"
    other = Run(finished.folder.with_name("other"), finished.server, finished.overlay)
    assert "adapter_model.safetensors is damaged" in other.fit(given, code=2)


# -- stopped by a signal -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seldom(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run with a checkpoint every 4 iterations."""
    folder = tmp_path_factory.mktemp("seldom")
    run = Run(folder / "whole", server, overlay(folder / "overlay.yaml", RULES, {"mode": "ema", "rate": 0.3}, {"every_n_train_steps": 4}))
    run.fit()
    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_last_finished_iteration(server: Server, seldom: Run, tmp_path: Path, number: int) -> None:
    """It comes after the third iteration."""
    stopped = Run(tmp_path / "stopped", server, seldom.overlay)
    status, _, text = stopped.stop_when(partial(stopped.has_rows, 3), number, 0.05)
    assert status == 128 + number and "--ckpt_path last" in text and "Traceback" not in text
    assert stopped.checkpoint()["global_step"] >= 2
    stopped.resume()
    assert_equal(stopped.record(), seldom.record())
