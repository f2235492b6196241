"""The system-call filter itself, interpreted here for both machines."""

import os
import re
import struct
from pathlib import Path

import pytest
from tests.envs.sandboxed import REFUSED, syscalls


def run(code, number, *arguments, arch):
    """What a seccomp filter returns: an interpreter of the five instructions that it uses."""
    words = [word for value in (*arguments, *[0] * (6 - len(arguments))) for word in (value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF)]
    data = [number, arch, 0, 0, *words]
    instructions, a, at = list(struct.iter_unpack("=HBBI", code)), 0, 0
    while True:
        operation, yes, no, k = instructions[at]
        at += 1
        if operation == 0x06:
            return k
        elif operation == 0x20:
            a = data[k // 4]
        elif operation == 0x54:
            a &= k
        else:
            at += yes if {0x15: a == k, 0x35: a >= k}[operation] else no


@pytest.mark.parametrize("machine", syscalls.MACHINES)
def test_the_filter_allows_and_refuses_these_calls(machine):
    arch = syscalls.MACHINES[machine][1]
    allow, eperm, enosys, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    sealed, landlocked = (syscalls.program(machine, 4321, files=files) for files in (False, True))
    judged, own = syscalls.numbers(syscalls.JUDGED, machine), syscalls.numbers(syscalls.OWN, machine)
    assert len(sealed) // 8 < len(landlocked) // 8 < 4096  # BPF_MAXINSNS
    for code in (sealed, landlocked):
        assert all(run(code, number, arch=arch) == allow for number in syscalls.numbers(syscalls.HARMLESS, machine).values())
        assert {run(code, number, arch=arch) for number in syscalls.numbers(REFUSED, machine).values()} == {eperm}
        assert run(code, 0, arch=0x40000003) == run(code, 0x40000000, arch=arch) == run(code, 0xFFFFFFFF, arch=arch) == kill
        assert run(code, own["clone3"], arch=arch) == run(code, syscalls.NEWEST + 1, arch=arch) == enosys
        assert run(code, judged["clone"], 0x3D0F00, arch=arch) == allow
        for flags in (0x11, 0x4111, 0x3D0F00 & ~0x10000, 0x3D0F00 | 0x10000000, 0x3D0F00 | 0x40000000, 0x3D0F00 | 0x20000):
            assert run(code, judged["clone"], flags, arch=arch) == eperm
        for name in ("kill", "tgkill"):
            assert run(code, judged[name], 4321, 9, arch=arch) == allow
            assert {run(code, judged[name], pid & (2**64 - 1), 9, arch=arch) for pid in (0, 1, -1, -4321, 4322)} == {eperm}
        assert run(code, judged["prlimit64"], 0, 7, 0, 99, arch=arch) == allow
        assert run(code, judged["prlimit64"], 0, 7, 99, 0, arch=arch) == run(code, judged["prlimit64"], 0, 7, 1 << 40, arch=arch) == eperm
        assert run(code, judged["prlimit64"], 1, 7, 0, 99, arch=arch) == eperm
        assert [run(code, judged["socketpair"], 1, kind | 0o2004000, 0, arch=arch) for kind in (1, 2, 5)] == [allow, eperm, eperm]
        assert run(code, judged["socketpair"], 2, 1, 0, arch=arch) == eperm
        assert run(code, judged["sendto"], 3, 4, 5, 0, 0, 0, arch=arch) == allow
        assert run(code, judged["sendto"], 3, 4, 5, 0, 1 << 32, 0, arch=arch) == eperm
    opening = syscalls.numbers(syscalls.FILES, machine).values()
    assert {run(sealed, number, arch=arch) for number in opening} == {eperm}
    assert {run(landlocked, number, arch=arch) for number in opening} == {allow}


HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", syscalls.MACHINES)
def test_numbers_are_the_kernels(machine):
    if not os.path.exists(HEADERS[machine]):
        pytest.skip("the kernel's headers are not installed")
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(HEADERS[machine]).read_text(encoding="utf-8")))
    known.setdefault("newfstatat", known.get("fstatat"))  # the generic header's name for it
    ours = syscalls.numbers(syscalls.HARMLESS + syscalls.FILES + syscalls.JUDGED + syscalls.OWN + REFUSED, machine)
    assert {name: str(number) for name, number in ours.items()} == {name: known[name] for name in ours}
