"""Confines a forked process before it runs an agent's code, with what Linux gives an unprivileged process: Landlock, seccomp, rlimits.

    pid = os.fork()                      # of a warm, single-threaded template
    if pid == 0:
        box = confine(folder, interpreter_paths(), Limits(...), [pipe])   # single-threaded: files, network, limits, privileges
        ...                              # trusted code: builds the world, may start threads
        seal(box)                        # every thread: system calls; from here on an agent's code may run

Afterwards the process reads `readable` and its `folder`, writes its `folder`, talks over the descriptors that it kept, and has no other
file, program, process, socket, signal or privilege. The filter lists what is allowed; a system call that is not on it fails with EPERM.
Where Landlock is missing the filter opens no file at all: whatever is to be imported must be imported before `seal`.

It does not hide names and sizes of files (stat), bound the number of files in `folder` (use a small file system, or delete it after each
episode), bound wall-clock time (the parent kills), or keep an agent from its own process: it can write anything to the kept descriptors.
Standard library only, Python >= 3.11. `python sandbox.py` prints `probe()` as JSON.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import resource
import signal
import struct
import sys
import zoneinfo
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# --- system calls: name, number on x86_64, number on aarch64 ("-": it has none) ---

# Harmless to others in any argument: memory, open descriptors, time, waiting, threads, one's own signals, the names and sizes of files.
HARMLESS = """
read 0 63  write 1 64  close 3 57  lseek 8 62  pread64 17 67  pwrite64 18 68  readv 19 65  writev 20 66  preadv 295 69  pwritev 296 70
preadv2 327 286  pwritev2 328 287  sendfile 40 71  copy_file_range 326 285  dup 32 23  dup2 33 -  dup3 292 24  pipe 22 -  pipe2 293 59
close_range 436 436  fsync 74 82  fdatasync 75 83  ftruncate 77 46  fallocate 285 47  fadvise64 221 223  flock 73 32  getdents64 217 61
mmap 9 222  mprotect 10 226  munmap 11 215  brk 12 214  mremap 25 216  msync 26 227  mincore 27 232  madvise 28 233
futex 202 98  sched_yield 24 124  sched_getaffinity 204 123  set_robust_list 273 99  rseq 334 293  membarrier 324 283  getcpu 309 168
exit 60 93  exit_group 231 94  restart_syscall 219 128  getrandom 318 278
poll 7 -  ppoll 271 73  select 23 -  pselect6 270 72  epoll_create 213 -  epoll_create1 291 20  epoll_ctl 233 21  epoll_wait 232 -
epoll_pwait 281 22  epoll_pwait2 441 441  eventfd 284 -  eventfd2 290 19  timerfd_create 283 85  timerfd_settime 286 86
timerfd_gettime 287 87
recvfrom 45 207  recvmsg 47 212  sendmsg 46 211  shutdown 48 210  getsockname 51 204  getpeername 52 205  getsockopt 55 209
rt_sigaction 13 134  rt_sigprocmask 14 135  rt_sigreturn 15 139  rt_sigpending 127 136  rt_sigtimedwait 128 137  rt_sigsuspend 130 133
sigaltstack 131 132  pause 34 -  alarm 37 -  getitimer 36 102  setitimer 38 103  timer_create 222 107  timer_settime 223 110
timer_gettime 224 108  timer_getoverrun 225 109  timer_delete 226 111
nanosleep 35 101  clock_nanosleep 230 115  clock_gettime 228 113  clock_getres 229 114  gettimeofday 96 169  time 201 -  times 100 153
getpid 39 172  getppid 110 173  gettid 186 178  getpgrp 111 -  getpgid 121 155  getsid 124 156  getuid 102 174  geteuid 107 175
getgid 104 176  getegid 108 177  getresuid 118 148  getresgid 120 150  getgroups 115 158  getrlimit 97 163  getrusage 98 165  uname 63 160
sysinfo 99 179  getcwd 79 17  stat 4 -  lstat 6 -  fstat 5 80  newfstatat 262 79  statx 332 291  access 21 -  faccessat 269 48
faccessat2 439 439  readlink 89 -  readlinkat 267 78
"""

# Safe beneath Landlock's rules alone. Left out on purpose, as Landlock does not judge them or not in every version, and the process may own
# files elsewhere: chmod, chown, utime, xattr, truncate by path; link and symlink, which could lead a parent that reads the folder astray.
FILES = """
open 2 -  openat 257 56  creat 85 -  mkdir 83 -  mkdirat 258 34  rmdir 84 -  unlink 87 -  unlinkat 263 35  rename 82 -  renameat 264 38
renameat2 316 276  chdir 80 49  fchdir 81 50
"""

# Allowed for some arguments: see `_conditions`.
JUDGED = """
clone 56 220  kill 62 129  tgkill 234 131  prctl 157 167  prlimit64 302 261  socketpair 53 199  sendto 44 206  fcntl 72 25  ioctl 16 29
"""

# Used here, before the filter stands; and clone3, which a filter cannot judge: its flags lie in memory.
OWN = """
seccomp 317 277  capset 126 91  landlock_create_ruleset 444 444  landlock_add_rule 445 445  landlock_restrict_self 446 446  clone3 435 435
"""

NEWEST = 450
"""The newest system call that was considered. Later ones answer ENOSYS, as on an older kernel, so that libc falls back."""

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the numbers above, and the AUDIT_ARCH that seccomp reports."""


def numbers(table: str, machine: str) -> dict[str, int]:
    """Name -> number of the system calls in `table` that `machine` has."""
    words, column = table.split(), MACHINES[machine][0]
    rows = zip(words[::3], words[1 + column :: 3], strict=True)
    return {name: int(number) for name, number in rows if number != "-"}


# --- the filter (classic BPF over struct seccomp_data: nr, arch, instruction pointer, six arguments of 64 bits) ---

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _AND, _RETURN, _EQUAL, _AT_LEAST = 0x20, 0x54, 0x06, 0x15, 0x35
_ALL = 0xFFFFFFFF

_CLONE_THREAD, _CLONE_NEWUSER, _CLONE_NEWNET = 0x10000, 0x10000000, 0x40000000
_CLONE_NAMESPACES = 0x7E020000  # mount, cgroup, uts, ipc, user, pid, net
_F_COMMANDS = [0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032]  # duplicate, flags, locks, pipe size; not F_SETOWN: it would signal others
_IOCTLS = [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]  # isatty, window size, FIONREAD, FIONBIO, close-on-exec

Condition = tuple[int, int, Sequence[int]]
"""(32-bit word of the arguments, mask, values): the masked word must be one of the values. Argument i is the words 2i (low) and 2i + 1."""


def _conditions(pid: int) -> dict[str, list[Condition]]:
    """What the arguments of a judged system call must all fulfil."""
    return {
        "clone": [(0, _CLONE_THREAD | _CLONE_NAMESPACES, [_CLONE_THREAD])],
        "kill": [(0, _ALL, [pid])],
        "tgkill": [(0, _ALL, [pid])],
        "prctl": [(0, _ALL, [15, 16])],  # PR_SET_NAME, PR_GET_NAME: threads are named
        "prlimit64": [(0, _ALL, [0]), (4, _ALL, [0]), (5, _ALL, [0])],  # own limits, and nothing to set
        "socketpair": [(0, _ALL, [1]), (2, 0xF, [1])],  # AF_UNIX, SOCK_STREAM: a datagram one could be sent to any address
        "sendto": [(8, _ALL, [0]), (9, _ALL, [0])],  # no address
        "fcntl": [(2, _ALL, _F_COMMANDS)],
        "ioctl": [(2, _ALL, _IOCTLS)],
    }


def _do(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, k)


def _judge(conditions: Sequence[Condition]) -> list[bytes]:
    block = []
    for word, mask, values in conditions:
        block += [_do(_LOAD, 16 + 4 * word), _do(_AND, mask)]
        block += [_do(_EQUAL, value, len(values) - i) for i, value in enumerate(values)]  # a match jumps over the refusal
        block += [_do(_RETURN, ERRNO | errno.EPERM)]
    return [*block, _do(_RETURN, ALLOW)]


def program(machine: str, pid: int, *, files: bool) -> bytes:
    """The seccomp filter, 8 bytes an instruction, for process `pid` on `machine`; `files`: files may be opened (Landlock judges which)."""
    number = numbers(HARMLESS + (FILES if files else ""), machine)
    judged, own = numbers(JUDGED, machine), numbers(OWN, machine)
    # A foreign calling convention (32-bit, x32) numbers its calls differently: whoever uses one means to slip through.
    code = [_do(_LOAD, 4), _do(_EQUAL, MACHINES[machine][1], 1), _do(_RETURN, KILL)]
    code += [_do(_LOAD, 0), _do(_AT_LEAST, 0x40000000, 0, 1), _do(_RETURN, KILL)]
    for allowed in number.values():
        code += [_do(_EQUAL, allowed, 0, 1), _do(_RETURN, ALLOW)]
    for name, conditions in _conditions(pid).items():
        block = _judge(conditions)
        code += [_do(_EQUAL, judged[name], 0, len(block)), *block]
    code += [_do(_EQUAL, own["clone3"], 0, 1), _do(_RETURN, ERRNO | errno.ENOSYS)]  # glibc falls back to clone
    code += [_do(_AT_LEAST, NEWEST + 1, 0, 1), _do(_RETURN, ERRNO | errno.ENOSYS), _do(_RETURN, ERRNO | errno.EPERM)]
    return b"".join(code)


# --- calls into the kernel ---

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int, what: str) -> int:
    """`result`, or an OSError that names `what` was refused."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"sandbox: {what}: {os.strerror(number)}")
    return result


def _machine() -> str:
    """A key of `MACHINES`. Raises OSError on any other machine."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in MACHINES or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"sandbox: needs Linux and a 64-bit Python on x86_64 or aarch64, not {sys.platform} on {machine}")
    return machine


def _syscall(name: str, *arguments: int) -> int:
    number = numbers(OWN, _machine())[name]
    return _checked(_libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments)), name)


def _prctl(option: int, *arguments: int) -> int:
    values = [*arguments, 0, 0, 0, 0][:4]
    return _checked(_libc.prctl(option, *(ctypes.c_ulong(value) for value in values)), f"prctl {option}")


_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 4, 24, 38, 47


# --- what Landlock allows ---

_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_OF_A_FILE = _READ_FILE | _WRITE_FILE | _TRUNCATE
_READ = _READ_FILE | _READ_DIR
# ... remove folders and files, make folders and files, move. No symbolic link, pipe, socket or device: a parent finds none of them.
_WRITE = _READ | _OF_A_FILE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 13


def _landlock_abi() -> int:
    """The kernel's Landlock version; 0 without Landlock (missing, switched off at boot, or refused by a container)."""
    try:
        return _syscall("landlock_create_ruleset", 0, 0, 1)
    except OSError:
        return 0


def _landlock(folder: str, readable: Sequence[str]) -> None:
    abi = _landlock_abi()
    handled = (1 << 13) - 1  # ABI 1: the rights 0 to 12
    for since, right in ((2, 13), (3, 14), (5, 15), (9, 16)):  # REFER, TRUNCATE, IOCTL_DEV, RESOLVE_UNIX
        handled |= (abi >= since) << right
    network = 0b11 if abi >= 4 else 0  # bind and connect TCP
    scopes = 0b11 if abi >= 6 else 0  # abstract unix sockets, signals
    attributes = struct.pack("=QQQ", handled, network, scopes)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    rules = _syscall("landlock_create_ruleset", ctypes.addressof(buffer), len(attributes), 0)
    try:
        wanted = [(path, _READ) for path in readable] + [(folder, _WRITE)]
        for path, rights in [*wanted, ("/dev/null", _OF_A_FILE), ("/dev/urandom", _OF_A_FILE)]:
            try:
                beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            if not os.path.isdir(beneath):
                rights &= _OF_A_FILE
            rule = ctypes.create_string_buffer(struct.pack("=Qi", rights & handled, beneath), 12)
            _syscall("landlock_add_rule", rules, 1, ctypes.addressof(rule), 0)
            os.close(beneath)
        _syscall("landlock_restrict_self", rules, 0)
    finally:
        os.close(rules)


# --- the steps of stage 1 ---


def _in_child(action: Callable[[], object]) -> bool:
    """Whether `action` returns True in a forked child: what it does to the process is gone with the child."""
    pid = os.fork()
    if pid == 0:
        done = False
        with contextlib.suppress(BaseException):
            done = action() is True
        os._exit(not done)
    return os.waitpid(pid, 0)[1] == 0


def _user_namespace() -> bool:
    """An own network in an own user namespace: needs no privilege where the system's administrator has not switched it off."""
    uid, gid = os.getuid(), os.getgid()
    _checked(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def _own_network() -> str:
    """Leaves the host's network: "net" (privileged), "user" (with an own user namespace) or "" (refused)."""
    if _libc.unshare(_CLONE_NEWNET) == 0:
        return "net"
    # Some systems grant the namespace and then refuse its maps, and there is no way back: a child tries first.
    return "user" if _in_child(_user_namespace) and _user_namespace() else ""


def _close_all_but(keep: Sequence[int]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in {0, 1, 2} - set(keep):
        os.dup2(null, fd)
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):  # the listing's own descriptor
                os.close(fd)


def _set_environ(environ: Mapping[str, str]) -> None:
    """Replaces os.environ, and wipes the block that the kernel handed to the first process: unsetenv leaves it in memory."""
    os.environ.clear()
    with open("/proc/self/stat", "rb") as file:
        start, end = map(int, file.read().rpartition(b")")[2].split()[47:49])
    if start:
        ctypes.memset(start, 0, end - start)
    os.environ.update(environ)


def _set_limits(limits: "Limits", *, own_users: bool) -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    values = {
        resource.RLIMIT_AS: used + (limits.memory_mb << 20),
        resource.RLIMIT_CPU: limits.cpu_s,  # soft = hard: SIGKILL, not a SIGXCPU that can be caught
        resource.RLIMIT_FSIZE: limits.file_mb << 20,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
    }
    if own_users and tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (5, 14):
        values[resource.RLIMIT_NPROC] = limits.processes
    for which, value in values.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(-8, 2)  # M_ARENA_MAX: each of glibc's arenas reserves 64 MB of address space, one for every thread


def _drop_capabilities() -> None:
    with contextlib.suppress(OSError):  # older kernels know no ambient set; the bounding set is root's to change, and past its end EINVAL
        _prctl(_PR_CAP_AMBIENT, 4)
    with contextlib.suppress(OSError):
        for capability in range(64):
            _prctl(_PR_CAPBSET_DROP, capability)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    none = ctypes.create_string_buffer(24)
    _syscall("capset", ctypes.addressof(header), ctypes.addressof(none))


# --- public ---


@dataclass(frozen=True)
class Limits:
    """What one process may use. Each is a hard limit, and the soft one with it."""

    memory_mb: int
    """MiB of address space beyond what the process has when it is confined; then MemoryError."""
    cpu_s: int
    """Seconds of processor time, all threads together, since the fork; then SIGKILL."""
    file_mb: int
    """MiB of one file; then OSError (EFBIG)."""
    processes: int
    """Threads, where the process has a user namespace of its own (Linux >= 5.14). Elsewhere the kernel counts all of the user's processes,
    or for root none: only `memory_mb` bounds them."""
    open_files: int
    """Descriptors; then OSError (EMFILE)."""


@dataclass(frozen=True)
class Confinement:
    """What confines a process, in `probe`'s words."""

    network: str
    files: str
    syscalls: str = "seccomp"


def confine(
    folder: str,
    readable: Sequence[str],
    limits: Limits,
    keep_fds: Sequence[int],
    *,
    environ: Mapping[str, str] | None = None,
    parent: int | None = None,
    landlock: bool = True,
    namespace: bool = True,
) -> Confinement:
    """Stage 1, in a forked process of one thread: files, network, limits, privileges, and death with the parent.

    `folder` becomes the working directory, the only place to write; `readable` are files or folders, those that do not exist are skipped;
    `keep_fds` stay open, 0, 1 and 2 otherwise become /dev/null, the rest is closed; `environ` is the whole new environment (default:
    empty); `parent` is the pid that must still be the parent (default: the present one). `landlock` and `namespace` False do without.
    Raises OSError where seccomp is missing (an unconfined world is never run), on an unknown machine, and if a step is refused.
    """
    parent = os.getppid() if parent is None else parent
    _check_seccomp()
    _prctl(_PR_SET_DUMPABLE, 1)  # for now: a process that changed its user could not use its own /proc/self otherwise
    if os.getsid(0) != os.getpid():
        os.setsid()
    _close_all_but(keep_fds)
    os.chdir(folder)
    os.umask(0o077)
    _set_environ(environ or {})
    network = _own_network() if namespace else ""
    _set_limits(limits, own_users=network == "user")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    landlock = landlock and _landlock_abi() > 0
    if landlock:
        _landlock(folder, readable)
    _drop_capabilities()
    _prctl(_PR_SET_DUMPABLE, 0)  # no core, no debugger, and /proc/<pid> is root's
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
    return Confinement("namespace" if network else "seccomp", "landlock" if landlock else "seccomp")


def seal(confinement: Confinement) -> None:
    """Stage 2, in the process that `confine` returned in: every thread, present and future, gets the filter, for good.

    Raises OSError where seccomp is missing or a thread cannot take the filter.
    """
    code = program(_machine(), os.getpid(), files=confinement.files == "landlock")
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer)), 16)
    thread = _syscall("seccomp", 1, 1, ctypes.addressof(header))  # SET_MODE_FILTER, TSYNC: returns the thread that refused
    if thread:
        raise OSError(errno.EBUSY, f"sandbox: seccomp: thread {thread} has a filter of its own; start none before `confine`")


def _check_seccomp() -> None:
    action = ctypes.create_string_buffer(struct.pack("=I", KILL), 4)
    _syscall("seccomp", 2, 0, ctypes.addressof(action))  # GET_ACTION_AVAIL


def interpreter_paths() -> list[str]:
    """What this Python reads while it runs, for `readable`: its library and packages, shared libraries, time zones.

    A script's own folder and an application's data are the caller's to add. A folder inside another is left out.
    """
    with open("/proc/self/maps") as file:
        shared = {os.path.dirname(line.split(None, 5)[5].strip()) for line in file if ".so" in line and " /" in line}
    packages = {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")}
    paths = {sys.prefix, sys.base_prefix, *packages, *shared, *zoneinfo.TZPATH, "/etc/localtime", "/etc/ld.so.cache"}
    found = {os.path.realpath(path) for path in paths if os.path.exists(path)}
    return sorted(path for path in found if not any(path.startswith(other + "/") for other in found))


def probe() -> dict[str, str]:
    """What this machine can do, each tried in a forked child.

    {"network": "namespace" | "seccomp" | "none", "files": "landlock" | "seccomp" | "none", "syscalls": "seccomp" | "none"}
    """

    def refused(action: Callable[[], object]) -> bool:
        try:
            action()
        except PermissionError:
            return True
        return False

    def filtered() -> bool:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        seal(Confinement("seccomp", "seccomp"))
        return refused(lambda: os.open("/", os.O_RDONLY)) and refused(os.fork)

    def walled() -> bool:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _landlock(os.devnull, [])
        return refused(lambda: os.listdir("/"))

    if not _in_child(filtered):
        return {"network": "none", "files": "none", "syscalls": "none"}
    return {
        "network": "namespace" if _in_child(lambda: _own_network() != "") else "seccomp",
        "files": "landlock" if _in_child(walled) else "seccomp",
        "syscalls": "seccomp",
    }


if __name__ == "__main__":
    print(json.dumps(probe()))
