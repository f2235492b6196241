"""`skillsd doctor`: true about this machine, quick without a network, and never a traceback of somebody else's."""

from __future__ import annotations

import json
import math
import platform
import socket
import sys
import time
import tomllib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skillsd import cli, doctor
from skillsd.doctor import Row

ROW = {"check": "worlds", "state": "limited", "detail": "3 of 4 [red]found[/red]", "fix": "pip install 'worlds[all]'"}


@pytest.fixture
def tell(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run `skillsd doctor`; what it printed."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(sys.modules, "skillsd.cli.launch", None)  # it is not imported

    def call(*flags: str) -> str:
        assert cli.main(["doctor", *flags]) == 0
        return str(capsys.readouterr().out)

    return call


@pytest.fixture
def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Install a package `name` that brings the rows of `code`, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[skillsd.doctor]\n{name} = {name}:checks\n")

    return install


def found(name: str, rows: list[Row]) -> Row:
    (row,) = [r for r in rows if r["check"] == name]
    return row


# -- this machine -----------------------------------------------------------------------------------------------------------


def test_the_rows_are_true(tell):
    rows = json.loads(tell("--json"))
    assert all(list(r) == ["check", "state", "detail", "fix"] and r["state"] in ("ok", "limited", "optional", "missing") for r in rows)
    assert [r["check"] for r in rows[: len(doctor.CHECKS)]] == list(doctor.CHECKS)
    assert found("Python", rows)["detail"].startswith(platform.python_version())
    assert found("PyTorch", rows)["detail"].startswith(torch.__version__)
    assert (found("GPU", rows)["state"] == "ok") == torch.cuda.is_available()
    nf4 = found("bitsandbytes", rows)
    assert nf4["state"] == "ok" and nf4["detail"].startswith(f"{version('bitsandbytes')}, nf4 runs on cpu")
    assert found("TensorBoard", rows) == {"check": "TensorBoard", "state": "ok", "detail": version("tensorboard"), "fix": ""}


def test_the_table_says_the_same(tell):
    rows, table = json.loads(tell("--json")), tell()
    for row in rows:
        (line,) = [x for x in table.splitlines() if x.startswith(f"│ {row['check']} ")]
        assert f" {row['state']} " in line and row["detail"][:20] in line


def test_doctor_takes_no_unknown_argument(capsys, tell):
    assert cli.main(["doctor", "--nosuch"]) == 2 and cli.main(["doctor", "fit"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2 and err.startswith("error: unrecognized arguments: --nosuch (`skillsd doctor --help`")
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--help"])
    assert stop.value.code == 0 and "--json" in capsys.readouterr().out


# -- single checks ------------------------------------------------------------------------------------------------------------


def test_without_a_gpu_the_row_is_limited(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor.gpu() == ("limited", "none: CPU only", "")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    state, detail, fix = doctor.gpu()
    assert state == "limited" and "built without CUDA" in detail and fix == "pip install --force-reinstall torch==2.13.0"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA 13.0 finds no GPU" in doctor.gpu()[1]


def test_every_gpu_is_listed(monkeypatch):
    card = SimpleNamespace(name="NVIDIA Nosuch", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    assert doctor.gpu() == ("ok", "NVIDIA Nosuch, 24 GiB; NVIDIA Nosuch, 24 GiB", "")


def test_nf4_that_fails_is_reported(monkeypatch):
    def broken(device: str) -> float:
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr("skillsd.policy.probe.nf4_error", broken)
    state, detail, fix = doctor.bitsandbytes()
    assert state == "limited" and "nf4 on cpu fails (RuntimeError: no kernel image)" in detail and "'bitsandbytes<" in fix
    for wrong in (0.9, math.nan):
        monkeypatch.setattr("skillsd.policy.probe.nf4_error", lambda device, wrong=wrong: wrong)
        state, detail, _ = doctor.bitsandbytes()
        assert state == "limited" and "nf4 on cpu is wrong" in detail


def test_packages_that_are_not_there(monkeypatch):
    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", none)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.openai() == ("optional", "only for OpenAISummariser", "pip install 'openai>=2'")
    assert doctor.tensorboard()[0] == "missing" and doctor.tensorboard()[2].startswith("pip install 'tensorboard>=")
    assert doctor.bitsandbytes()[0] == "missing" and doctor.bitsandbytes()[2].startswith("pip install 'bitsandbytes<")
    assert doctor.triton()[0] == "optional" and doctor.triton()[2] == ""  # nothing is needed on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor.triton()[2].startswith("pip install 'triton")


def test_smollm2(tmp_path, monkeypatch):
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path))
    assert doctor.smollm2()[0] == "missing" and doctor.smollm2()[2] == "make smollm2"
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    (folder / "config.json").touch()
    assert doctor.smollm2() == ("ok", str(folder), "")


# -- the hub ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub of our own that answers `status` to HEAD, and to nothing else."""

    class Handler(BaseHTTPRequestHandler):
        status = 200

        def do_HEAD(self) -> None:
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setattr(doctor.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "*")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(doctor.hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Handler
    server.shutdown()
    server.server_close()


def test_the_hub_answers(endpoint):
    assert doctor.hub_access() == ("ok", f"{doctor.hub.ENDPOINT} answers", "")
    endpoint.status = 403  # a filter in between
    state, detail, _ = doctor.hub_access()
    assert state == "limited" and detail.startswith("offline") and "HTTP 403" in detail


def test_a_hub_that_is_silent(endpoint, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts, nobody answers
        monkeypatch.setattr(doctor.hub, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        state, detail, fix = doctor.hub_access()
        assert time.monotonic() - started < 3
    assert state == "limited" and detail.startswith("offline") and fix == ""


def test_name_resolution_that_hangs(endpoint, monkeypatch):
    """No socket's time limit covers it."""
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(2))
    started = time.monotonic()
    assert "no answer within 0.2 s" in doctor.hub_access()[1]
    assert time.monotonic() - started < 1


def test_offline_the_hub_is_not_asked(endpoint, monkeypatch):
    monkeypatch.setattr(doctor.hub, "ENDPOINT", "http://127.0.0.1:1")
    assert "Connection refused" in doctor.hub_access()[1]
    monkeypatch.setattr(doctor.hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor, "_head", None)  # it is not asked
    state, detail, fix = doctor.hub_access()
    assert state == "limited" and "HF_HUB_OFFLINE is set" in detail and fix.startswith("unset HF_HUB_OFFLINE")


# -- rows of environments -----------------------------------------------------------------------------------------------------


def test_an_environment_adds_rows_of_its_own(provider, tell):
    provider("worlds", f"print('hello')\ndef checks():\n    print('looking')\n    return [{ROW!r}, {ROW | {'check': 'more'}!r}]\n")
    rows = json.loads(tell("--json"))
    assert found("worlds", rows) == ROW and found("more", rows) == ROW | {"check": "more"}
    table = tell()
    assert ROW["detail"] in table and ROW["fix"] in table  # brackets are no markup


BROKEN = {
    "raises": ("def checks():\n    raise RuntimeError('no\\nworld')\n", "RuntimeError: no world"),
    "exits": ("def checks():\n    raise SystemExit(3)\n", "SystemExit: 3"),
    "no_import": ("import nosuch_module\n", "No module named 'nosuch_module'"),
    "no_function": ("x = 1\n", "has no attribute 'checks'"),
    "no_list": ("def checks():\n    return None\n", "TypeError"),
    "no_text": (f"def checks():\n    return [{ROW | {'detail': 3}!r}]\n", "a row is a dict of str"),
    "key_missing": ("def checks():\n    return [{'check': 'x'}]\n", "check, state, detail, fix"),
    "no_state": (f"def checks():\n    return [{ROW | {'state': 'fine'}!r}]\n", "state is 'fine': one of ok, limited, optional, missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_provider_that_fails_is_one_row(provider, tell, name):
    code, message = BROKEN[name]
    provider(f"broken_{name}", code)
    row = found(f"broken_{name}", json.loads(tell("--json")))
    assert row["state"] == "missing" and message in row["detail"] and f"broken_{name}:checks" in row["detail"] and "\n" not in row["detail"]


def test_appworld_s_entry_point():
    """The name is text that nothing else checks."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {doctor.GROUP: {"appworld": "skillsd_appworld.doctor:checks"}}
