"""Confines a forked process before it runs an agent's code, with what Linux gives an unprivileged process: Landlock, seccomp, rlimits.

    pid = os.fork()                      # of a warm, single-threaded template
    if pid == 0:
        box = confine(folder, interpreter_paths(), Limits(...), [pipe])   # single-threaded: files, network, limits, privileges
        ...                              # trusted code: builds the world, may start threads
        seal(box)                        # every thread: system calls; from here on an agent's code may run

Afterwards the process reads `readable` and its `folder`, writes its `folder`, talks over the descriptors that it kept, and has no other
file, program, process, socket, signal or privilege. The filter lists what is allowed; a system call that is not on it fails with EPERM.
Where Landlock is missing the filter opens no file at all: whatever is to be imported must be imported before `seal`.

It does not hide names and sizes of files (stat) but those beneath `hidden`, bound the number of files in `folder` (use a small file
system, or delete it after each episode), bound wall-clock time (the parent kills), or keep an agent from its own process: it can write
anything to the kept descriptors.
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

from syscalls import CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUSER, KILL, MACHINES, OWN, numbers, program

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
    """Return whether `action` returns True in a forked child: what it does to the process is gone with the child."""
    pid = os.fork()
    if pid == 0:
        succeeded = False
        with contextlib.suppress(BaseException):
            succeeded = action() is True
        os._exit(not succeeded)
    return os.waitpid(pid, 0)[1] == 0


def _user_namespace() -> bool:
    """Own network and mounts in an own user namespace: needs no privilege where the system's administrator has not switched it off."""
    uid, gid = os.getuid(), os.getgid()
    _checked(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    return True


def _own_namespaces() -> str:
    """Leaves the host's network and mounts: "root" (privileged), "user" (with an own user namespace) or "" (refused)."""
    if _libc.unshare(CLONE_NEWNET | CLONE_NEWNS) == 0:
        return "root"
    # Some systems grant the namespace and then refuse its maps, and there is no way back: a child tries first.
    return "user" if _in_child(_user_namespace) and _user_namespace() else ""


def _mount(source: bytes | None, target: str, kind: bytes | None, flags: int, data: bytes | None) -> bool:
    return _libc.mount(source, os.fsencode(target), kind, ctypes.c_ulong(flags), data) == 0


def _own_mounts(folder: str, folder_mb: int) -> bool:
    """In a mount namespace: a small file system of its own on `folder`, gone with the process, so that no code fills the disk. Whether it
    was allowed."""
    size = f"size={folder_mb}m,nr_inodes={FOLDER_INODES},mode=700".encode()
    private = _mount(None, "/", None, 0x44000, None)  # MS_REC | MS_PRIVATE: the host sees none of it
    return private and (not folder_mb or _mount(b"none", folder, b"tmpfs", 0xE, size))  # no device, set-id or program


def _hide(paths: Sequence[str]) -> bool:
    """An empty folder over each of `paths`: Landlock alone would still tell names and sizes. Whether it was allowed."""
    return all(_mount(b"none", path, b"tmpfs", 0xF, b"size=4k,mode=0") for path in paths)


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


def _real_user_of_its_own() -> bool:
    """For root: a real user id that no other process has, as the kernel counts processes by it and never limits root's. Files are judged by
    the effective one, which stays. Whether it was allowed: a container may have too few ids."""
    with contextlib.suppress(OSError):
        os.setresuid(_USERS + os.getpid(), -1, -1)
        return True
    return False


def _set_limits(limits: "Limits", *, own_users: bool) -> None:
    with open("/proc/self/statm", encoding="utf-8") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    values = {
        resource.RLIMIT_AS: used + (limits.memory_mb << 20),
        resource.RLIMIT_CPU: limits.cpu_s,  # soft = hard: SIGKILL, not a SIGXCPU that can be caught
        resource.RLIMIT_FSIZE: limits.file_mb << 20,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 256,
    }
    if own_users:
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


_USERS = 2_000_000_000
"""Beyond the user ids that people, services and containers are given; a process id is added."""
FOLDER_INODES = 4096
"""Files and folders that fit into a folder that is a file system of its own."""


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
    """Threads, the first one included. Not limited where the process has neither a user namespace of its own (Linux >= 5.14), nor as root
    may take a real user id of its own: the kernel counts all processes of a user, and there only `memory_mb` bounds them."""
    open_files: int
    """Descriptors; then OSError (EMFILE)."""


@dataclass(frozen=True)
class Confinement:
    """What confines a process, in `probe`'s words."""

    network: str
    files: str
    hidden: str = "none"
    syscalls: str = "seccomp"


def confine(
    folder: str,
    readable: Sequence[str],
    limits: Limits,
    keep_fds: Sequence[int],
    *,
    environ: Mapping[str, str] | None = None,
    parent: int | None = None,
    hidden: Sequence[str] = (),
    folder_mb: int = 0,
    prepare: Callable[[], object] = lambda: None,
    landlock: bool = True,
    namespace: bool = True,
) -> Confinement:
    """Stage 1, in a forked process of one thread: files, network, limits, privileges, and death with the parent.

    `folder` becomes the working directory, the only place to write; `readable` are files or folders, those that do not exist are skipped;
    `keep_fds` stay open, 0, 1 and 2 otherwise become /dev/null, the rest is closed; `environ` is the whole new environment (default:
    empty); `parent` is the pid that must still be the parent (default: the present one). Where the kernel allows own mounts, `hidden`
    folders become empty, and with `folder_mb` the folder is a file system of that many MiB that goes with the process. `prepare` is called
    in the folder while everything can still be read. `landlock` and `namespace` False do without.
    Raises OSError where seccomp is missing (an unconfined world is never run), on an unknown machine, and if a step is refused.
    """
    parent = os.getppid() if parent is None else parent
    _check_seccomp()
    _prctl(_PR_SET_DUMPABLE, 1)  # for now: a process that changed its user could not use its own /proc/self otherwise
    if os.getsid(0) != os.getpid():
        os.setsid()
    _close_all_but(keep_fds)
    os.umask(0o077)
    _set_environ(environ or {})
    own = _own_namespaces() if namespace else ""
    mounts = bool(own) and _own_mounts(folder, folder_mb)
    os.chdir(folder)
    prepare()
    mounts = mounts and _hide(hidden)
    by_namespace = own == "user" and tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (5, 14)
    _set_limits(limits, own_users=by_namespace or (os.geteuid() == 0 and own != "user" and _real_user_of_its_own()))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    landlock = landlock and _landlock_abi() > 0
    if landlock:
        _landlock(folder, readable)
    _drop_capabilities()
    _prctl(_PR_SET_DUMPABLE, 0)  # no core, no debugger, and /proc/<pid> is root's
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
    return Confinement("namespace" if own else "seccomp", "landlock" if landlock else "seccomp", "mount" if mounts else "none")


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
    with open("/proc/self/maps", encoding="utf-8") as file:
        shared = {os.path.dirname(line.split(None, 5)[5].strip()) for line in file if ".so" in line and " /" in line}
    packages = {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")}
    paths = {sys.prefix, sys.base_prefix, *packages, *shared, *zoneinfo.TZPATH, "/etc/localtime", "/etc/ld.so.cache"}
    found = {os.path.realpath(path) for path in paths if os.path.exists(path)}
    return sorted(path for path in found if not any(path.startswith(other + "/") for other in found))


def probe() -> dict[str, str]:
    """What this machine can do, each tried in a forked child.

    {"network": "namespace" | "seccomp" | "none", "files": "landlock" | "seccomp" | "none", "hidden": "mount" | "none",
    "syscalls": "seccomp" | "none"}
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
        return dict.fromkeys(("network", "files", "hidden", "syscalls"), "none")
    return {
        "network": "namespace" if _in_child(lambda: _own_namespaces() != "") else "seccomp",
        "files": "landlock" if _in_child(walled) else "seccomp",
        "hidden": "mount" if _in_child(lambda: _own_namespaces() != "" and _own_mounts("/", 1)) else "none",
        "syscalls": "seccomp",
    }


if __name__ == "__main__":
    print(json.dumps(probe()))
