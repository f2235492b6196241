"""The limits of AppWorld's sandbox, and where a sandbox is weaker or cannot be made."""

import os
import signal

import pytest
from tests.envs.sandboxed import PROBE, USERS, needs_seccomp, sandbox

pytestmark = needs_seccomp


def test_memory_is_limited(place):
    out = place.play(
        """
        out["big"] = [attempt(lambda: bytearray(512 << 20)), attempt(lambda: [bytearray(1 << 20) for _ in range(512)])]
        out["small"] = attempt(lambda: bytearray(64 << 20))
        """,
        memory_mb=256,
    )
    assert out["big"] == ["MemoryError"] * 2 and out["small"] == "done"


def test_threads_share_the_memory(place):
    code = """
        ready, wait = threading.Barrier(9), threading.Event()
        threading.stack_size(1 << 18)
        def hold():
            kept = [bytearray(2000) for _ in range(100)]
            ready.wait(10), wait.wait(10)
        [threading.Thread(target=hold).start() for _ in range(8)]
        ready.wait(10)
        out["half"] = attempt(lambda: bytearray(128 << 20))
        wait.set()
    """
    assert place.play(code, memory_mb=256)["half"] == "done"  # glibc would have set 64 MiB aside for each thread


def test_processor_time_is_limited(place):
    out = place.play("signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", cpu_s=1)
    assert out == {"status": -signal.SIGKILL}


@pytest.mark.parametrize("user", USERS)
def test_limits_are_final(place, user):
    out = place.play(
        """
        kinds = (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)
        out["limits"] = [resource.getrlimit(kind) for kind in kinds[1:]]
        out["raised"] = [attempt(lambda: resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2)) for kind in kinds]
        out["others"] = attempt(lambda: resource.prlimit(template, resource.RLIMIT_CPU, (1, 1)))
        out["opened"] = attempt(lambda: [os.pipe() for _ in range(200)])
        """,
        build="out['early'] = attempt(lambda: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2))",
        user=user,
    )
    assert out["limits"] == [[20, 20], [1 << 20, 1 << 20], [64, 64], [0, 0]]
    assert out["early"] == "ValueError"  # the kernel's own answer, without the filter
    assert set(out["raised"]) <= {"PermissionError", "ValueError"} and out["others"] == "PermissionError" and out["opened"] == "OSError"


@pytest.mark.parametrize("user", USERS)
def test_the_number_of_threads_is_limited(place, user):
    """Also root's, whom the kernel does not count: by a real user id of its own, with which files stay readable."""
    out = place.play(
        """
        threading.stack_size(65536)
        wait = threading.Event()
        out["note"] = attempt(lambda: open(o["readable"][0] + "/note.txt"))
        out["started"] = [attempt(threading.Thread(target=wait.wait).start) for _ in range(40)]
        wait.set()
        """,
        user=user,
        files="landlock" if sandbox._landlock_abi() else "seccomp",
        processes=16,
        memory_mb=2048,
    )
    if out["box"]["network"] != "namespace" and (user or os.getuid()):
        pytest.skip("no user namespace here")
    assert not sandbox._landlock_abi() or out["note"] == "done"
    assert out["started"] == ["done"] * 15 + ["RuntimeError"] * 25


def test_a_process_without_seccomp_is_not_confined(place):
    out = place.play(
        """
        for again in (lambda: sandbox.confine(".", [], limits, [write]), lambda: sandbox.seal(box)):
            try:
                again()
            except OSError as e:
                out.setdefault("said", []).append(str(e))
        """
    )
    assert out["said"] == 2 * ["[Errno 1] sandbox: seccomp: Operation not permitted"]


def test_a_container_that_refuses_namespaces_and_landlock(place):
    out = place.play(
        """
        out["refused"] = [attempt(action) for action in (os.fork, socket.socket, lambda: open("x", "w"), lambda: open(o["secret"]))]
        """,
        ahead="""
            code = [syscalls._do(0x20, 0)]
            for number in (272 if os.uname().machine == "x86_64" else 97, 444):  # unshare, landlock_create_ruleset
                code += [syscalls._do(0x15, number, 0, 1), syscalls._do(0x06, syscalls.ERRNO | 1)]
            sandbox.program, program = lambda *_, **__: b"".join([*code, syscalls._do(0x06, syscalls.ALLOW)]), sandbox.program
            sandbox._prctl(38, 1)
            sandbox.seal(sandbox.Confinement("", ""))
            sandbox.program = program
            out["probe"] = sandbox.probe()
        """,
        files="landlock",
    )
    assert out["probe"] == out["box"] == {"network": "seccomp", "files": "seccomp", "hidden": "none", "syscalls": "seccomp"}
    assert out["refused"] == ["PermissionError"] * 4


def test_other_machines_are_refused(monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: type("Uname", (), {"machine": "riscv64"}))
    with pytest.raises(OSError, match="needs Linux and a 64-bit Python on x86_64 or aarch64, not linux on riscv64"):
        sandbox.confine(".", [], sandbox.Limits(1, 1, 1, 1, 1), [])


def test_probe_says_what_a_sandbox_then_uses(place):
    assert place.play("", files="landlock")["box"] == PROBE == sandbox.probe()
