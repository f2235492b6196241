"""The sandbox of AppWorld's workers: hostile programs, each in a sandbox of its own, with and without Landlock, namespaces and root."""

import json
import os
import re
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from textwrap import dedent

import pytest

SCRIPT = Path(__file__).parents[2] / "envs/skillsd_appworld/worker/sandbox.py"
NOBODY = 65534

sys.path.insert(0, str(SCRIPT.parent))  # as its interpreter has it
import sandbox  # noqa: E402
import syscalls  # noqa: E402

sys.path.remove(str(SCRIPT.parent))
PROBE = json.loads(subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True).stdout)

# What the kernel says, not `probe`: a sandbox that does not work must fail here.
pytestmark = pytest.mark.skipif(not os.path.exists("/proc/sys/kernel/seccomp/actions_avail"), reason="no seccomp here")
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


@pytest.fixture
def place():
    root = Path(tempfile.mkdtemp())  # not tmp_path: only its owner may enter that
    root.chmod(0o755)
    yield Place(root)
    shutil.rmtree(root)


# --- files ---


@pytest.mark.parametrize("user", USERS)
def test_hidden_folders_do_not_even_tell_sizes(place, user):
    """Unlike the rest, which Landlock keeps closed but not secret."""
    inside = place.readable / "truth"
    inside.mkdir()
    (inside / "answer").write_text("42")
    code = """
    out["size"] = os.stat(o["secret"]).st_size
    out["hidden"] = [attempt(lambda: os.stat(o["hidden"][0] + "/answer")), attempt(lambda: os.listdir(o["hidden"][0]))]
    out["note"] = open(o["readable"][0] + "/note.txt").read()
    """
    out = place.play(code, files="landlock", hidden=[str(inside)], user=user)
    if out["box"]["hidden"] != "mount":
        pytest.skip("no own mounts here")
    assert out["size"] == 6 and out["hidden"] == ["PermissionError"] * 2 and out["note"] == "note"
    assert (inside / "answer").read_text() == "42"


@pytest.mark.parametrize("user", USERS)
def test_a_folder_of_its_own_cannot_fill_the_disk(place, user):
    code = """
    def fill(size):
        for i in range(10_000):
            with open(f"file{i}", "wb") as file:
                file.write(bytes(size))
    out["bytes"], n = attempt(lambda: fill(1 << 20)), len(os.listdir("."))
    for name in os.listdir("."):
        os.remove(name)
    out["files"], out["counts"] = attempt(lambda: fill(0)), [n, len(os.listdir("."))]
    """
    out = place.play(code, files="landlock", folder_mb=8, file_mb=4, user=user)
    if out["box"]["hidden"] != "mount":
        pytest.skip("no own mounts here")
    assert out["bytes"] == out["files"] == "OSError" and out["counts"][0] <= 9 and out["counts"][1] <= sandbox.FOLDER_INODES
    assert [p.name for p in place.folder.iterdir()] == ["leads_out"]  # the host sees nothing of it


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("files", FILES)
def test_reads_nothing_outside(place, files, user):
    out = place.play(
        """
        secret, parents = o["secret"], f"/proc/{template}"
        paths = [secret, "leads_out", "../secret.txt", "/etc/passwd", parents + "/mem", parents + "/environ", "/proc/self/mem"]
        out["paths"] = {path: attempt(lambda: open(path, "rb").read(8)) for path in paths}
        out["hard link"] = attempt(lambda: os.link(secret, "hard"))
        out["moved in"] = attempt(lambda: os.rename(secret, "moved"))
        out["listed"] = [attempt(lambda: os.listdir(path)) for path in ["/", "..", parents + "/fd"]]
        """,
        files=files,
        user=user,
    )
    assert out["box"]["files"] == files
    assert set(out["paths"].values()) == {"PermissionError"} and len(out["paths"]) == 7
    assert out["hard link"] == "PermissionError" and out["moved in"] in ("PermissionError", "OSError")  # OSError: across devices, it says
    assert out["listed"] == ["PermissionError"] * 3
    assert place.secret.read_text() == "secret"


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("files", FILES)
def test_writes_nothing_outside(place, files, user):
    place.secret.chmod(0o666)  # so that it is the sandbox that refuses
    place.secret.parent.chmod(0o777)
    out = place.play(
        """
        secret, beside = o["secret"], o["secret"] + ".new"
        out["refused"] = {name: attempt(action) for name, action in {
            "create": lambda: open(beside, "w"), "append": lambda: open(secret, "a"), "link": lambda: open("leads_out", "w"),
            "readable": lambda: open(o["readable"][0] + "/note.txt", "w"), "unlink": lambda: os.unlink(secret),
            "mkdir": lambda: os.mkdir(beside), "truncate": lambda: os.truncate(secret, 0), "chmod": lambda: os.chmod(secret, 0),
            "chown": lambda: os.chown(secret, os.getuid(), -1), "utime": lambda: os.utime(secret, (0, 0)),
            "xattr": lambda: os.setxattr(secret, "user.x", b"x"), "symlink": lambda: os.symlink(secret, "again"),
            "mknod": lambda: os.mknod(beside),
            "fifo": lambda: os.mkfifo("fifo"), "chroot": lambda: os.chroot("."),
        }.items()}
        """,
        files=files,
        user=user,
    )
    assert set(out["refused"].values()) == {"PermissionError"}, out["refused"]
    assert place.secret.read_text() == "secret" and stat.S_IMODE(place.secret.stat().st_mode) == 0o666 and place.secret.stat().st_mtime > 0
    assert sorted(path.name for path in place.secret.parent.iterdir()) == ["own", "readable", "secret.txt"]


WORK = """
    def work():
        open("a", "w").write("x")
        os.makedirs("b/c")
        os.rename("a", "b/c/a")
        os.remove("b/c/a"), os.rmdir("b/c")
        open("kept", "wb").write(os.urandom(3))
    out["worked"] = attempt(work)
    out["note"] = attempt(lambda: open(o["readable"][0] + "/note.txt").read())
    out["written there"] = attempt(lambda: open(o["readable"][0] + "/note.txt", "a"))
    out["devices"] = [attempt(lambda: open("/dev/null", "w").write("x")), attempt(lambda: open("/dev/urandom", "rb").read(1))]
    sys.path.append(o["readable"][0])
    def import_it():
        import lazily
        assert lazily.VALUE == 42
    out["imported"] = attempt(import_it)
    out["size"] = attempt(lambda: open("big", "wb").write(bytes(3 << 20)))
"""


@needs_landlock
@pytest.mark.parametrize("user", USERS)
def test_landlock_leaves_the_own_folder_and_what_is_readable(place, user):
    out = place.play(WORK, files="landlock", user=user)
    assert (out["worked"], out["note"], out["imported"], out["devices"]) == ("done", "done", "done", ["done", "done"])
    assert out["written there"] == "PermissionError" and (place.readable / "note.txt").read_text() == "note"
    assert out["size"] == "OSError" and (place.folder / "big").stat().st_size == 1 << 20
    assert stat.S_IMODE((place.folder / "kept").stat().st_mode) == 0o600


@pytest.mark.parametrize("user", USERS)
def test_without_landlock_a_sealed_process_opens_nothing(place, user):
    out = place.play(WORK, build="open('built', 'w').write(open(o['readable'][0] + '/note.txt').read())", user=user)
    assert (place.folder / "built").read_text() == "note"  # before it is sealed, the world reads and writes
    assert out["devices"] == ["PermissionError"] * 2 and {out["worked"], out["note"], out["size"]} == {"PermissionError"}
    assert out["imported"] == "ModuleNotFoundError"
    assert sorted(path.name for path in place.folder.iterdir()) == ["built", "leads_out"]


@needs_landlock
@pytest.mark.parametrize("abi", range(1, sandbox._landlock_abi() + 1))
def test_older_landlock(place, abi):
    code = """
        out["secret"] = [attempt(lambda: open(path)) for path in (o["secret"], "leads_out")]
        out["changed"] = [attempt(lambda: open(o["secret"], "a")), attempt(lambda: os.truncate(o["secret"], 0)), attempt(os.fork)]
        out["note"], out["own"] = attempt(lambda: open(o["readable"][0] + "/note.txt")), attempt(lambda: open("own", "w"))
    """
    out = place.play(code, files="landlock", abi=abi)
    assert out["secret"] == ["PermissionError"] * 2 and out["changed"] == ["PermissionError"] * 3
    assert out["note"] == out["own"] == "done"


@needs_landlock
def test_standard_library_is_imported_lazily(place):
    code = """
        assert "colorsys" not in sys.modules and "sqlite3" not in sys.modules
        import colorsys, sqlite3, zoneinfo
        out["rows"] = sqlite3.connect(":memory:").execute("select 1 + 1").fetchall()
        out["zone"] = attempt(lambda: zoneinfo.ZoneInfo("Europe/Paris")) if os.path.exists("/usr/share/zoneinfo/Europe") else "done"
    """
    out = place.play(code, files="landlock")
    assert out["rows"] == [[2]] and out["zone"] == "done"


def test_interpreter_paths():
    paths = sandbox.interpreter_paths()
    assert all(os.path.exists(path) for path in paths) and "/" not in paths
    for needed in (sys.prefix, sys.base_prefix, os.__file__, json.__file__, pytest.__file__):
        assert any(Path(needed).resolve().is_relative_to(path) for path in paths), needed
    assert not any(Path(a).is_relative_to(b) for a in paths for b in paths if a != b)


# --- what the process brings along ---


def test_environment_descriptors_and_privileges_are_gone(place):
    out = place.play(
        "out['after'] = dict(os.environ)",
        ahead="""
            inherited = os.open("/", os.O_RDONLY)
            assert "TOKEN" in os.environ and b"TOKEN" in open("/proc/self/environ", "rb").read()
        """,
        build="""
            out["block"] = open("/proc/self/environ", "rb").read().decode() if os.getuid() == 0 else ""
            out["libc"] = bool(ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_char_p)(("getenv", libc))(b"TOKEN"))
            out["inherited"] = attempt(lambda: os.fstat(inherited))
            out["standard"] = [os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev for fd in (0, 1, 2)]
            out["status"] = dict(line.split(":\\t") for line in open("/proc/thread-self/status").read().splitlines() if ":\\t" in line)
            out["dumpable"] = libc.prctl(3, 0, 0, 0, 0)
            out["leader"], out["cwd"] = os.getsid(0) == os.getpid(), os.getcwd()
        """,
    )
    assert out["after"] == {"GIVEN": "1"} and "parents-secret" not in out["block"] and out["libc"] is False
    assert out["inherited"] == "OSError" and out["standard"] == [True] * 3
    assert out["leader"] is True and out["cwd"] == str(place.folder)
    sets = {key: int(value, 16) for key, value in out["status"].items() if key.startswith("Cap")}
    assert sets["CapEff"] == sets["CapPrm"] == sets["CapInh"] == sets["CapAmb"] == 0
    assert os.getuid() != 0 or sets["CapBnd"] == 0
    assert out["status"]["NoNewPrivs"] == "1" and out["dumpable"] == 0


# --- processes, threads and signals ---


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("files", FILES)
def test_no_other_process(place, files, user):
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


# --- network and the rest of the kernel ---


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("namespace", [True, False])
def test_no_network(place, namespace, user):
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


def test_the_rest_of_the_kernel(place):
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


# --- limits ---


def test_memory(place):
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


def test_processor_time(place):
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
def test_number_of_threads(place, user):
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


# --- where it cannot work ---


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


# --- the filter itself, on both machines ---


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
def test_filter(machine):
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
