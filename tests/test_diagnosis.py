"""Whose an error is: one line for what is the user's business, a traceback that says how to report it for what is our own fault."""

from __future__ import annotations

import errno
import importlib
import io
import subprocess
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest

from skillsd import cli, config_errors, errors
from skillsd.analysis.provenance import installed
from skillsd.diagnosis import blame, explain, report
from skillsd.errors import ConfigError
from skillsd.policy.smollm2 import cache_folder

MINE = """\
import json
class Base:
    def hook(self):
        json.loads("{")
class Mine(Base):
    pass
"""


def raised(call: Any, *args: Any) -> Exception:
    try:
        call(*args)
    except Exception as e:
        return e
    raise AssertionError("nothing was raised")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's, or one of a package that is installed."""

    def write(name: str, text: str, folder: str = "code") -> None:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(place))
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


def test_the_user_s_code_is_named_with_class_file_and_line(module):
    module("some_code", MINE)
    line = explain(raised(importlib.import_module("some_code").Mine().hook))
    assert line is not None and "Mine.hook" in line and "some_code.py:4" in line and "JSONDecodeError" in line and "\n" not in line


@pytest.mark.parametrize("text", ["x = (", "raise RuntimeError('boom')", "import no_such_package_at_all"])
def test_a_module_of_the_user_s_that_cannot_be_imported(module, text):
    module("broken_code", f"\n{text}\n")
    error = ConfigError("as a parser says it")
    error.__cause__ = raised(importlib.import_module, "broken_code")
    assert "broken_code.py:2" in blame(error)


def test_a_package_that_is_missing_or_broken(module):
    error = raised(importlib.import_module, "no_such_package_at_all")
    error.__traceback__ = None  # the frame of this test is a user's
    assert "no_such_package_at_all" in (explain(error) or "")
    module("broken_package", "raise AttributeError('no such thing')\n", "site-packages")
    error = raised(importlib.import_module, "broken_package")
    assert error.__traceback__ is not None
    error.__traceback__ = error.__traceback__.tb_next
    line = explain(error)
    assert line is not None and "broken_package" in line and "no such thing" in line


def test_our_own_fault_is_a_traceback_that_says_how_to_report_it(capsys):
    error = raised(config_errors.refuse_nulls, None, {"a": int})
    assert explain(error) is None
    report(type(error), error, error.__traceback__)
    *trace, last = capsys.readouterr().err.splitlines()
    assert "Traceback" in trace[0] and "report" in last and sys.version.split()[0] in last
    error = ConfigError("key: this is wrong")
    report(type(error), error, None)
    assert "bug" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.EBADF])
def test_the_machine_s_errors_say_what_is_known(number):
    error = OSError(number, "what it is", "/some/where")
    line = explain(error)
    assert line is not None and line.startswith("what it is: /some/where")
    assert ("room" in line) is (number == errno.ENOSPC) and ("permission" in line) is (number == errno.EACCES)
    line = explain(OSError(number, "what it is"))
    assert line is not None and "run folder" not in line  # it may be stdout


def test_memory_and_gpu_errors_are_explained():
    assert "memory" in (explain(MemoryError()) or "")
    assert "trainer.accelerator" in (explain(RuntimeError("CUDA error: no kernel image is available for execution on the device")) or "")
    assert explain(RuntimeError("CUDA error: device-side assert triggered")) is None
    assert explain(RuntimeError("shapes do not match")) is None


# -- the terminal -------------------------------------------------------------------------------------------------------------


def test_a_terminal_that_has_no_such_characters(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr("skillsd.class_paths.config", lambda *_: print("Löse es"))
    assert cli.main(["config"]) == 0
    assert out.buffer.getvalue() == b"L\\xf6se es\n"  # type: ignore[attr-defined]


def test_a_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["fit", "-c", "sokoban"]) == 2 and "folder is gone" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["config", "--version"])
def test_a_stdout_that_takes_no_more(monkeypatch, capfd, command):
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 - closing it fails
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", full)
        m.setattr("skillsd.cli.os.dup2", lambda *_: None)  # that of the tests stays
        assert cli.main([command]) == 2
    with suppress(OSError):
        full.close()
    assert "No space" in capfd.readouterr().err


def test_streams_that_were_closed_are_no_file_s_number(tmp_path):
    code = "from skillsd.__main__ import open_streams; open_streams(); print('x'); f = open('file', 'w'); assert f.fileno() > 2"
    completed = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code], cwd=tmp_path)
    assert completed.returncode == 0 and (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize(("raises", "code"), [(KeyboardInterrupt, 130), (OSError(errno.EACCES, "no", "libtorch.so"), 2)])
def test_importing_may_be_stopped_or_fail(monkeypatch, capsys, raises, code):
    class Stub(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise raises

    monkeypatch.setitem(sys.modules, "skillsd.cli.launch", Stub("skillsd.cli.launch"))
    assert cli.main(["fit", "-c", "sokoban"]) == code
    assert capsys.readouterr().err.count("\n") == (code == 2)


# -- the chain of causes ------------------------------------------------------------------------------------------------------


def test_causes_are_whole_without_repetition_and_without_secrets(monkeypatch):
    monkeypatch.setattr(errors, "_held", {"sk-planted-Zq83hTnv0LxW": "A_KEY"})
    root = OSError("refused, says sk-planted-Zq83hTnv0LxW")
    middle = ValueError(str(root))
    middle.__cause__ = root
    top = RuntimeError("Connection error.")
    top.__context__ = middle
    assert errors.causes(top) == "RuntimeError: Connection error. <- ValueError: refused, says [A_KEY]"
    root.__cause__ = top  # a circle
    assert len(list(errors.chain(top))) == 3
    top.__suppress_context__ = True
    assert errors.causes(top) == "RuntimeError: Connection error."


def test_without_a_home_folder_nothing_needs_one_that_need_not(monkeypatch):
    def unknown(_: int) -> Any:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("SKILLSD_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert installed([{"check": "a", "state": "ok", "detail": "/home/me"}]).rows == [("a", "ok", "/home/me")]
    with pytest.raises(ConfigError, match="home folder"):
        cache_folder()
