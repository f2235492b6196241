"""A hostile program in a sandbox of its own: as AppWorld's workers make one, with and without Landlock, namespaces and root."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

SCRIPT = Path(__file__).parents[2] / "envs/skillsd_appworld/worker/sandbox.py"
NOBODY = 65534

sys.path.insert(0, str(SCRIPT.parent))  # as its interpreter has it
import sandbox  # noqa: E402
import syscalls  # noqa: E402, F401  tests take it from here

sys.path.remove(str(SCRIPT.parent))
PROBE = json.loads(subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True).stdout)

# What the kernel says, not `probe`: a sandbox that does not work must fail here.
needs_seccomp = pytest.mark.skipif(not os.path.exists("/proc/sys/kernel/seccomp/actions_avail"), reason="no seccomp here")
needs_landlock = pytest.mark.skipif(sandbox._landlock_abi() == 0, reason="no Landlock here")
FILES = [pytest.param("landlock", marks=needs_landlock), "seccomp"]
USERS = [None, pytest.param(NOBODY, marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user"))]

# A template that forks one child, as the workers do. `ahead` runs in the template, `build` after confine, `code` after seal.
TEMPLATE = """
import asyncio, concurrent.futures.thread, ctypes, encodings.idna, fcntl, importlib.util, json, os, resource, signal, socket, subprocess
import sys, threading, time, traceback
o = json.loads(sys.argv[1])
sys.path.insert(0, os.path.dirname(o["script"]))
import sandbox, syscalls
del sys.path[0]
if o["abi"]:
    sandbox._landlock_abi = lambda: o["abi"]
libc, template, out = ctypes.CDLL(None, use_errno=True), os.getpid(), {}

def attempt(action):
    "'done', or the name of what was raised."
    try:
        action()
    except BaseException as e:
        return type(e).__name__
    return "done"

def call(*arguments):
    "errno of a raw system call, 0 if it succeeds."
    return ctypes.get_errno() if libc.syscall(*map(ctypes.c_long, arguments)) < 0 else 0

exec(o["ahead"])
read, write = os.pipe()
child = os.fork()
if child == 0:
    try:
        if o["user"]:
            os.setgroups([]), os.setgid(o["user"]), os.setuid(o["user"])
        readable = [*sandbox.interpreter_paths(), *o["readable"]]
        parent = o["parent"] or template
        flags = {"landlock": o["files"] == "landlock", "namespace": o["namespace"], "hidden": o["hidden"], "folder_mb": o["folder_mb"]}
        limits, keep = sandbox.Limits(**o["limits"]), [write, *o["keep"]]
        box = sandbox.confine(o["folder"], readable, limits, keep, parent=parent, environ={"GIVEN": "1"}, **flags)
        out["box"] = vars(box)
        exec(o["build"])
        sandbox.seal(box)
        exec(o["code"])
    except BaseException:
        out["error"] = traceback.format_exc()
    os.write(write, json.dumps(out).encode())
    os._exit(0)
os.close(write)
text = b"".join(iter(lambda: os.read(read, 65536), b""))
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps({"status": status, **json.loads(text or "{}")}))
"""


class Place:
    """A readable folder, a secret beside it, and the sandbox's own folder."""

    def __init__(self, root: Path) -> None:
        self.secret, self.readable, self.folder = root / "secret.txt", root / "readable", root / "own"
        self.readable.mkdir()
        self.folder.mkdir()
        self.secret.write_text("secret")
        (self.readable / "note.txt").write_text("note")
        (self.readable / "lazily.py").write_text("VALUE = 42\n")
        (self.folder / "leads_out").symlink_to(self.secret)

    def command(
        self,
        code,
        *,
        ahead="",
        build="",
        files="seccomp",
        user=None,
        namespace=True,
        keep=(),
        parent=0,
        abi=0,
        hidden=(),
        folder_mb=0,
        **limits,
    ):
        limits = {"memory_mb": 256, "cpu_s": 20, "file_mb": 1, "processes": 64, "open_files": 64, **limits}
        if user:
            os.chown(self.folder, user, user)
        options = dict(
            script=str(SCRIPT), folder=str(self.folder), readable=[str(self.readable), "/does/not/exist"], secret=str(self.secret),
            ahead=dedent(ahead), build=dedent(build), code=dedent(code), files=files, user=user, namespace=namespace, keep=list(keep),
            parent=parent, abi=abi, hidden=list(hidden), folder_mb=folder_mb, limits=limits,
        )  # fmt: skip
        return [sys.executable, "-c", TEMPLATE, json.dumps(options)]

    def play(self, code, **options):
        """What the child wrote into `out`, and its exit status (negative: the signal that ended it)."""
        env = {**os.environ, "TOKEN": "parents-secret"}
        completed = subprocess.run(self.command(code, **options), capture_output=True, text=True, timeout=60, env=env)
        assert completed.returncode == 0, completed.stderr
        result = json.loads(completed.stdout)
        assert "error" not in result, result["error"]
        return result


# As in sandbox.py: name, number on x86_64, number on aarch64.
REFUSED = """
ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271  pidfd_open 434 434  pidfd_getfd 438 438  pidfd_send_signal 424 424
io_uring_setup 425 425  unshare 272 97  setns 308 268  mount 165 40  pivot_root 155 41  open_tree 428 428  move_mount 429 429
fsopen 430 430  bpf 321 280  perf_event_open 298 241  userfaultfd 323 282  add_key 248 217  keyctl 250 219  init_module 175 105
finit_module 313 273  reboot 169 142  kexec_load 246 104  swapon 167 224  open_by_handle_at 304 265  name_to_handle_at 303 264
shmget 29 194  msgget 68 186  semget 64 190  mq_open 240 180  personality 135 92  tkill 200 130  rt_sigqueueinfo 129 138
rt_tgsigqueueinfo 297 240  execve 59 221  execveat 322 281  setuid 105 146  capset 126 91  seccomp 317 277  memfd_create 319 279
openat2 437 437  fanotify_init 300 262  inotify_init1 294 26  process_madvise 440 440  move_pages 279 239  setpriority 141 140
symlinkat 266 36  linkat 265 37  fchmod 91 52  fchown 93 55  fsetxattr 190 7  mknodat 259 33  splice 275 76  vmsplice 278 75
socket 41 198  connect 42 203  bind 49 200  listen 50 201  accept4 288 242  sendmmsg 307 269  setsockopt 54 208  setrlimit 160 164
syslog 103 116  acct 163 89  settimeofday 164 170  clock_settime 227 112  quotactl 179 60  sethostname 170 161  umount2 166 39
"""
