"""The processes behind the environment: what dies is replaced, costs its own episode at most, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from gymnasium.error import ResetNeeded
from tests.envs.conftest import block

from skillsd_appworld import AppWorldEnv, pool, process


def begin(env: AppWorldEnv, at: int = 0) -> None:
    env.reset(options={"task_id": env.tasks("train")[at]["task_id"]})


def solved(env: AppWorldEnv) -> bool:
    return bool(env.step(env.solution()[0])[4]["success"])


def alive(pid: int) -> bool:
    """Running, or not yet ended; a zombie is neither."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pids: list[int], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_the_warm_process_is_replaced_and_its_children_live_on(make_env):
    env, other = make_env(forks=4), make_env(forks=4)
    begin(other)
    other.step(block("kept = 42"))
    first = env._pool._worlds.current
    for _ in range(3):
        begin(env)
    assert env._pool._worlds.next is not None  # it warms up before it is needed
    end = time.monotonic() + 60
    while env._pool._worlds.current is first and time.monotonic() < end:
        begin(env)  # and until it is warm, nobody waits for it
    assert env._pool._worlds.current is not first and alive(first.process.pid)
    assert "\n42\n" in other.step(block("print(kept)"))[0] and solved(other) and solved(env)
    begin(env)
    assert gone([first.process.pid])  # its last child has ended
    assert solved(env)


def test_a_killed_world_costs_its_episode(env):
    for name in ("world", "agent"):
        begin(env)
        os.kill({"world": env._world.child, "agent": env._world.agent}[name].pid, signal.SIGKILL)
        *_, info = env.step(block("print(1)"))
        assert info["failed"].startswith(f"the {name}'s process") and not info["success"]
    begin(env)
    assert solved(env)


def test_a_killed_warm_process_is_started_again(env):
    begin(env)
    child, server = env._world.child.pid, env._pool._worlds.current.process
    server.kill()
    assert gone([child])  # nobody would end it any more
    *_, info = env.step(block("print(1)"))
    assert "failed" in info
    env._pool._judges.current.process.kill()
    begin(env)
    assert solved(env) and env._pool._worlds.current.process is not server


def test_a_machine_without_processes_costs_one_episode_s_start(env, monkeypatch):
    """The fork fails, the warm process and its other children live on."""
    begin(env)
    other = AppWorldEnv(turn_seconds=20, max_api_calls=100)
    assert other._pool is env._pool
    server = env._pool._worlds.current
    exchange = server._exchange
    monkeypatch.setattr(server, "_exchange", lambda request, fds: ({"error": "BlockingIOError: no process left"}, []))
    with pytest.raises(OSError, match="AppWorld's world process does not run: BlockingIOError: no process left"):
        begin(other)
    monkeypatch.setattr(server, "_exchange", exchange)
    begin(other)
    assert env._pool._worlds.current is server and solved(env) and solved(other)
    other.close()


def test_an_interruption_does_not_mix_up_answers(env, monkeypatch):
    """Ctrl-C between a question and its answer: that process is given up, the next episode gets another."""
    begin(env)
    server = env._pool._worlds.current
    monkeypatch.setattr("skillsd_appworld.process.socket.recv_fds", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        begin(env)
    monkeypatch.undo()
    begin(env)
    assert env._pool._worlds.current is not server and solved(env)


def test_episodes_leave_no_folders(env):
    for at in range(3):
        begin(env, at)
        assert solved(env)
    kept = {server.folder for servers in env._pool._started for server in (servers.current, servers.next, *servers.former) if server}
    assert set((env._pool.folder / "jobs").iterdir()) == kept


def test_a_judge_that_cannot_start_fails_the_episode(env, monkeypatch):
    begin(env)
    monkeypatch.setattr(env._pool._judges, "fork", lambda *a: (_ for _ in ()).throw(ValueError("it ended while it started")))
    info = env.finish()
    assert "AppWorld's judge process does not run" in info["failed"] and env._world is None
    monkeypatch.undo()
    begin(env)
    assert solved(env)


def test_a_closed_environment_says_so(make_env):
    env = make_env()
    begin(env)
    env.close()
    with pytest.raises(ResetNeeded, match="closed"):
        env.reset()
    with pytest.raises(ResetNeeded):
        env.step("")


def test_a_judge_that_hangs_or_dies_fails_the_episode(env, monkeypatch):
    begin(env)
    fork = env._pool._judges.fork

    def killed(*arguments):
        child = fork(*arguments)
        threading.Timer(0.02, os.kill, [child.pid, signal.SIGSTOP]).start()
        threading.Timer(0.5, os.kill, [child.pid, signal.SIGKILL]).start()
        return child

    monkeypatch.setattr(env._pool._judges, "fork", killed)
    info = env.finish()
    assert info["failed"].startswith("the judge's process was killed") and info["completion"] == 0
    monkeypatch.undo()
    begin(env)
    assert solved(env)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_host_dies(appworld, how):
    """Not even a world in an endless loop that ignores its time limit."""
    script = """
import signal, threading, time
from skillsd_appworld import AppWorldEnv
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it, and so would its children
env = AppWorldEnv(turn_seconds=100)
env.reset(options={"task_id": env.tasks("train")[0]["task_id"]})
print(env._pool.folder, env._world.child.pid, env._world.agent.pid, *env._pool.pids(), flush=True)
env.step("```python\\nwhile True: pass\\n```")
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "envs"}
    ) as host:
        folder, *numbers = host.stdout.readline().split()
        pids = [int(p) for p in numbers]
        assert len(pids) == 5 and all(map(alive, pids))
        time.sleep(0.3)
        host.send_signal(how)
        host.wait(30)
    assert gone(pids)
    os.close(pool._working_folder()[1])  # the next one clears up
    assert not Path(folder).exists()


def test_nothing_is_left_when_the_last_environment_is_closed(make_env, monkeypatch):
    monkeypatch.setattr(pool, "LINGER_SECONDS", 0.2)
    env, other = make_env(turn_seconds=9), make_env(turn_seconds=9)
    assert env._pool is other._pool
    begin(env)
    pids, folder = [env._world.child.pid, env._world.agent.pid, *env._pool.pids()], env._pool.folder
    env.close()
    env.close()
    time.sleep(0.4)
    begin(other)  # somebody still uses it
    other.close()
    assert gone(pids)
    end = time.monotonic() + 10
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not folder.exists()


def test_a_bottomless_folder_is_removed(tmp_path):
    """On a kernel without own mounts the agent's folder is the host's to clear."""
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=at)
        inner = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)
    process.remove(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_no_process_listens_on_a_port(env):
    """The processes talk over pairs of sockets that nobody else can reach: there is no port to guard."""
    begin(env)
    listening = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        path = Path(f"/proc/net/{table}")
        for line in path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []:
            listening.add(f"socket:[{line.split()[9]}]")
    for pid in [*env._pool.pids(), env._world.child.pid, env._world.agent.pid]:
        folder = Path(f"/proc/{pid}/fd")
        assert not {os.readlink(fd) for fd in folder.iterdir()} & listening


def test_the_host_s_secrets_stay_at_home(env, monkeypatch):
    begin(env)
    for pid in env._pool.pids():
        environ = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        assert {line.partition("=")[0] for line in environ if line} <= {
            "PATH", "HOME", "LANG", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "APPWORLD_ROOT", "APPWORLD_CACHE", "SKILLSD_FOLDER",
            "SKILLSD_DATA", "SKILLSD_WARM_TASK",
        }  # fmt: skip


def test_an_interpreter_without_appworld_is_one_error(appworld, tmp_path):
    with pytest.raises(OSError, match=r"AppWorld's judge process does not run: ModuleNotFoundError: No module named"):
        AppWorldEnv(python=sys.executable).tasks("train")
