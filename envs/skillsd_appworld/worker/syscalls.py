"""The seccomp filter of a sealed process: which system calls an agent's code may make. Pure: it builds the program, sandbox.py installs it.

The filter lists what is allowed; any other call fails with EPERM, and numbers that a newer kernel may have given a meaning with ENOSYS.
"""

import errno
import struct
from collections.abc import Sequence

# --- system calls: name, number on x86_64, number on aarch64 ("-": it has none) ---

# Harmless to others in any argument: memory, open descriptors, time, waiting, threads, one's own signals, the names and sizes of files.
HARMLESS = """
read 0 63  write 1 64  close 3 57  lseek 8 62  pread64 17 67  pwrite64 18 68  readv 19 65  writev 20 66  preadv 295 69  pwritev 296 70
preadv2 327 286  pwritev2 328 287  sendfile 40 71  copy_file_range 326 285  dup 32 23  dup2 33 -  dup3 292 24  pipe 22 -  pipe2 293 59
close_range 436 436  fsync 74 82  fdatasync 75 83  ftruncate 77 46  fallocate 285 47  fadvise64 221 223  getdents64 217 61
mmap 9 222  mprotect 10 226  munmap 11 215  brk 12 214  mremap 25 216  msync 26 227  mincore 27 232  madvise 28 233
futex 202 98  sched_yield 24 124  sched_getaffinity 204 123  set_robust_list 273 99  rseq 334 293  membarrier 324 283  getcpu 309 168
exit 60 93  exit_group 231 94  restart_syscall 219 128  getrandom 318 278
poll 7 -  ppoll 271 73  select 23 -  pselect6 270 72  epoll_create 213 -  epoll_create1 291 20  epoll_ctl 233 21  epoll_wait 232 -
epoll_pwait 281 22  epoll_pwait2 441 441  eventfd 284 -  eventfd2 290 19  timerfd_create 283 85  timerfd_settime 286 86
timerfd_gettime 287 87
recvfrom 45 207  recvmsg 47 212  sendmsg 46 211  shutdown 48 210  getsockname 51 204  getpeername 52 205  getsockopt 55 209
rt_sigaction 13 134  rt_sigprocmask 14 135  rt_sigreturn 15 139  rt_sigpending 127 136  rt_sigtimedwait 128 137  rt_sigsuspend 130 133
sigaltstack 131 132  pause 34 -  alarm 37 -  getitimer 36 102  setitimer 38 103 
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

_CLONE_THREAD, CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x10000, 0x20000, 0x10000000, 0x40000000
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
