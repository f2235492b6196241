"""What code in AppWorld's sandbox may do with files, and what its process no longer has from its parent."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from tests.envs.sandboxed import FILES, USERS, needs_landlock, needs_seccomp, sandbox

pytestmark = needs_seccomp


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
def test_every_version_of_landlock_confines(place, abi):
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


def test_interpreter_paths_cover_what_is_imported():
    paths = sandbox.interpreter_paths()
    assert all(os.path.exists(path) for path in paths) and "/" not in paths
    for needed in (sys.prefix, sys.base_prefix, os.__file__, json.__file__, pytest.__file__):
        assert any(Path(needed).resolve().is_relative_to(path) for path in paths), needed
    assert not any(Path(a).is_relative_to(b) for a in paths for b in paths if a != b)


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
