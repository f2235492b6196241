"""Who owns a run folder."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from skillsd.errors import ConfigError
from skillsd.files import run_lock
from skillsd.files.run_lock import DEAD_S, RunLock, is_alive, this_process

ME = this_process()
ELSEWHERE = replace(ME, host="elsewhere", boot="another")


def leave(folder: Path, owner: run_lock.Owner, age: float = 0.0) -> Path:
    """What a process that was killed leaves, here or on another host."""
    folder.mkdir(exist_ok=True)
    path = folder / "run.lock"
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return path


def test_one_owner_at_a_time_and_no_trace(tmp_path):
    folder = tmp_path / "runs" / "a"
    lock = RunLock(folder)
    for steal in (False, True):
        with pytest.raises(ConfigError, match=f"process {ME.pid} on {ME.host}"):
            RunLock(folder, steal)
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())
    folder.mkdir(parents=True)
    RunLock(folder).release()
    assert folder.is_dir() and not list(folder.iterdir())


def test_a_dead_owner_s_lock_is_taken(tmp_path):
    leave(tmp_path, replace(ME, pid=1))  # pid 1 lives, and does not hold the lock
    RunLock(tmp_path).release()
    leave(tmp_path, replace(ME, boot="before the machine was started again"))
    RunLock(tmp_path).release()
    (tmp_path / "run.lock").write_text('{"pid":')  # cut short
    RunLock(tmp_path).release()


def test_a_process_that_is_killed_owns_nothing(tmp_path):
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        RunLock(tmp_path)
        os.write(tell, b"1")
        signal.pause()
    os.read(ready, 1)
    with pytest.raises(ConfigError, match=f"process {pid} on"):
        RunLock(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    RunLock(tmp_path).release()


def test_a_child_that_outlives_its_parent_owns_nothing(tmp_path):
    ready, tell = os.pipe()
    parent = os.fork()
    if not parent:
        RunLock(tmp_path)
        child = os.fork()
        if not child:
            signal.pause()
        os.write(tell, str(child).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    child = int(os.read(ready, 20))
    os.waitpid(parent, 0)
    RunLock(tmp_path).release()
    os.kill(child, signal.SIGKILL)


def test_an_owner_on_another_host(tmp_path):
    """It is alive as long as it touches the file, or until it is known to be dead; then it finds another file in its place."""
    path = leave(tmp_path, ELSEWHERE, DEAD_S - 60)
    with pytest.raises(ConfigError, match=r"on elsewhere.*--steal-lock"):
        RunLock(tmp_path)
    assert json.loads(path.read_text()) == asdict(ELSEWHERE) and list(tmp_path.iterdir()) == [path]
    old = path.open()
    lock = RunLock(tmp_path, steal=True)
    assert not os.path.samestat(os.fstat(old.fileno()), path.stat())
    lock.release()
    leave(tmp_path, ELSEWHERE, DEAD_S + 60)
    RunLock(tmp_path).release()


@pytest.mark.parametrize("locked", [True, False, None])
def test_an_owner_is_alive_while_it_locks_or_beats(locked):
    here = replace(ME, pid=os.getppid())
    assert is_alive(here, ME, locked, 0.0, True) is (locked is not False)  # where there is no flock, the process tells
    assert is_alive(replace(ME, pid=2**22 + 1), ME, locked, 0.0, False) is (locked is True)
    assert is_alive(ELSEWHERE, ME, locked, 1.0, False) and not is_alive(ELSEWHERE, ME, locked, 1.0, True)
    assert not is_alive(ELSEWHERE, ME, locked, DEAD_S, False)


def test_a_file_system_without_flock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_flock", lambda fd: None)
    lock = RunLock(tmp_path)
    with pytest.raises(ConfigError, match=f"process {ME.pid}"):
        RunLock(tmp_path)
    lock.release()
    leave(tmp_path, replace(ME, pid=2**22 + 1))
    RunLock(tmp_path).release()


def test_an_owner_shows_that_it_is_alive_and_ends_when_it_has_lost_the_folder(tmp_path):
    """In a process of its own: it does not come back from there."""
    pid = os.fork()
    if not pid:
        run_lock.HEARTBEAT_S = 0.02
        lock = RunLock(tmp_path)
        os.utime(lock.path, (0, 0))
        while os.stat(lock.path).st_mtime == 0:
            pass
        lock.path.unlink()  # removed by hand: it takes it again
        while not lock.path.exists():
            pass
        other = tmp_path / "other"
        other.write_text(json.dumps(asdict(ELSEWHERE)))
        other.replace(lock.path)
        signal.pause()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2


def test_places_that_cannot_be_a_run_folder_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "file/below", "dangling", "dangling/below", "loop", "n" * 300, f"new/{'n' * 300}", "nul\0"):
        with pytest.raises(ConfigError, match=r"^trainer\.default_root_dir: "):
            RunLock(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
