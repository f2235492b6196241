"""Code in AppWorld's sandbox reaches no other process, no network and no system call that it does not need."""

import os
import select
import signal
import socket
import subprocess

import pytest
from tests.envs.sandboxed import FILES, PROBE, REFUSED, USERS, needs_seccomp, syscalls

pytestmark = needs_seccomp


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("files", FILES)
def test_no_other_process_is_started(place, files, user):
    out = place.play(
        """
        out["refused"] = {name: attempt(action) for name, action in {
            "fork": os.fork, "forkpty": os.forkpty, "run": lambda: subprocess.run(["/bin/true"]), "popen": lambda: os.popen("true"),
            "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}), "exec": lambda: os.execv("/bin/true", ["true"]),
        }.items()}
        out["system"] = os.system("true")
        """,
        files=files,
        user=user,
    )
    assert set(out["refused"].values()) == {"PermissionError"}, out["refused"]
    assert out["system"] != 0


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("files", FILES)
def test_threads_work_and_are_sealed(place, files, user):
    out = place.play(
        """
        sealed.set()
        early.join(10)
        late = [threading.Thread(target=lambda: seen.append(attempt(socket.socket))) for _ in range(4)]
        [t.start() for t in late], [t.join(10) for t in late]
        out["seen"] = seen
        async def main():
            return await asyncio.get_running_loop().run_in_executor(None, lambda: 7)
        out["asyncio"] = asyncio.run(main())
        """,
        build="""
            seen, sealed = [], threading.Event()
            early = threading.Thread(target=lambda: seen.append(sealed.wait(10) and attempt(os.fork)))
            early.start()
        """,
        files=files,
        user=user,
    )
    assert out["seen"] == ["PermissionError"] * 5
    assert out["asyncio"] == 7


@pytest.mark.parametrize("user", USERS)
def test_signals_reach_only_the_process_itself(place, user):
    out = place.play(
        """
        everyone = (template, 1, -1, 0, -os.getppid(), -os.getpid())
        out["kill"] = [attempt(lambda: os.kill(pid, sign)) for pid in everyone for sign in (0, signal.SIGKILL)]
        r, w = os.pipe()
        out["owner"] = attempt(lambda: fcntl.fcntl(r, fcntl.F_SETOWN, template))  # whose SIGIO would end the template
        out["ioctl"] = attempt(lambda: fcntl.ioctl(r, 0x8901, template.to_bytes(4, "little")))
        out["nice"] = [attempt(lambda: os.setpriority(os.PRIO_PROCESS, template, 19)), attempt(lambda: os.sched_setaffinity(template, {0}))]
        got = []
        signal.signal(signal.SIGUSR1, lambda *_: got.append("self"))
        os.kill(os.getpid(), signal.SIGUSR1), signal.raise_signal(signal.SIGUSR1)
        out["got"] = got
        os.write(write, json.dumps(out).encode())
        os.abort()
        """,
        user=user,
    )
    assert out["kill"] == ["PermissionError"] * 12
    assert out["owner"] == out["ioctl"] == "PermissionError" and out["nice"] == ["PermissionError"] * 2
    assert out["got"] == ["self", "self"] and out["status"] == -signal.SIGABRT


def test_dies_with_its_parent(place):
    command = place.command("os.write(1, b'ready\\n'); time.sleep(60)", keep=[1])
    with subprocess.Popen(command, stdout=subprocess.PIPE) as template:
        assert template.stdout.readline() == b"ready\n"
        template.kill()
        template.wait()
        assert select.select([template.stdout], [], [], 30)[0], "the child lives on"  # it holds the other end, which closes with it
        assert template.stdout.read() == b""


def test_dies_if_its_parent_is_gone_already(place):
    assert place.play("out['lives'] = True", parent=1 << 30) == {"status": -signal.SIGKILL}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("namespace", [True, False])
def test_no_network_is_reached(place, namespace, user):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        out = place.play(
            f"""
            out["reached"] = attempt(lambda: socket.create_connection(("127.0.0.1", {port}), 5))
            families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET)
            out["sockets"] = [attempt(lambda: socket.socket(family, kind)) for family in families for kind in (1, 2, 3)]
            uses = (lambda: s.connect(("127.0.0.1", {port})), lambda: s.sendto(b"x", ("127.0.0.1", {port})), lambda: s.bind(("", 0)))
            out["existing"] = [attempt(use) for use in (*uses, s.listen, s.accept)]
            out["pair"] = [attempt(socket.socketpair), attempt(lambda: socket.socketpair(type=socket.SOCK_DGRAM))]
            a, b = socket.socketpair()
            a.sendall(b"x")
            out["talk"] = b.recv(1).decode()
            """,
            build=f"""
            s = socket.socket()
            out["built"] = attempt(lambda: socket.create_connection(("127.0.0.1", {port}), 5))
            """,
            namespace=namespace,
            user=user,
        )
        server.settimeout(0)
        if not namespace:  # seccomp alone: the trusted part still had the network, which shows that the port was there
            assert out["built"] == "done" and server.accept()
        with pytest.raises(BlockingIOError):
            server.accept()
    if namespace and PROBE["network"] == "namespace" and user is None:
        assert out["box"]["network"] == "namespace" and out["built"] == "OSError"
    assert out["box"]["network"] == "namespace" or out["built"] == "done"
    assert out["reached"] == "PermissionError" and out["sockets"] == ["PermissionError"] * 15 and out["existing"] == ["PermissionError"] * 5
    assert out["pair"] == ["done", "PermissionError"] and out["talk"] == "x"


def test_system_calls_that_are_not_needed_are_refused(place):
    names = syscalls.numbers(REFUSED, os.uname().machine)
    out = place.play(
        f"""
        out["errno"] = {{name: call(number, 0, 0, 0, 0, 0, 0) for name, number in {names!r}.items()}}
        own = syscalls.numbers(syscalls.JUDGED + syscalls.OWN, {os.uname().machine!r})
        out["clone3"], out["future"] = call(own["clone3"], 0, 0), call(1000)
        out["prctl"] = [call(own["prctl"], *a, 0, 0, 0) for a in ((1, 0), (4, 1), (38, 0), (22, 0), (24, 0), (8, 1), (35, 1))]
        out["clone"] = [call(own["clone"], flags, 0, 0, 0, 0) for flags in (17, 0x4011, 0x10000000, 0x40010000)]
        name = ctypes.create_string_buffer(b"named")
        out["named"] = call(own["prctl"], 15, ctypes.addressof(name), 0, 0, 0)
        """
    )
    assert {name: number for name, number in out["errno"].items() if number != 1} == {}
    assert out["clone3"] == out["future"] == 38
    assert out["prctl"] == [1] * 7 and out["clone"] == [1] * 4 and out["named"] == 0


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x32 is a calling convention of x86_64")
def test_another_calling_convention_ends_the_process(place):
    assert place.play("call(0x40000000 + 39)")["status"] == -signal.SIGSYS
