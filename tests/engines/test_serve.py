"""`skillsd serve`, with a stand-in for the interpreter of vLLM's environment: what it starts, what it prints, and that nothing is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from skillsd.engines import serve as module
from skillsd.engines.serve import check_port, find_vllm, options, serve
from skillsd.engines.settings import EngineSettings
from skillsd.errors import ConfigError
from skillsd.policy import LoraSettings, PolicySettings

CPU = torch.device("cpu")
FAKE = """#!{python}
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

if sys.argv[1] == "-c":
    print("0.99", {folder!r})
    sys.exit()
from skillsd.engines import vllm_noise
child = subprocess.Popen(["sleep", "600"])
args = sys.argv[4:]
with open({seen!r} + ".part", "w") as f:
    json.dump(dict(args=args, env=dict(os.environ), child=child.pid, me=os.getpid(), found=vllm_noise.__file__), f)
os.rename({seen!r} + ".part", {seen!r})
mode = os.environ.get("FAKE_VLLM", "")
if mode == "dies":
    print("CUDA error: out of luck, key is " + os.environ.get("VLLM_API_KEY", ""), flush=True)
    sys.exit(3)
if mode == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

HTTPServer((args[args.index("--host") + 1], int(args[args.index("--port") + 1])), Handler).serve_forever()
"""


class Fake:
    """An interpreter with a vLLM of its own. It notes how it was started."""

    def __init__(self, folder: Path):
        self.python, self._seen = folder / "python", folder / "seen.json"
        text = FAKE.format(python=sys.executable, folder=str(folder), seen=str(self._seen))
        self.python.write_text(text)
        self.python.chmod(0o755)
        with socket.create_server(("127.0.0.1", 0)) as s:
            self.port = s.getsockname()[1]

    @property
    def seen(self) -> dict:
        return json.loads(self._seen.read_text())

    def is_running(self) -> bool:
        """Either the server or what it has started."""
        return any(alive(self.seen[who]) for who in ("me", "child"))

    def wait_until_gone(self) -> None:
        """What is killed goes when the system gets to it."""
        while self.is_running():
            time.sleep(0.05)


def alive(pid: int) -> bool:
    """A zombie whose parent has gone before it waits for whoever adopts it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path)


def start(fake, tmp_path, **engine):
    serve(PolicySettings(), EngineSettings(**engine), CPU, str(fake.python), "127.0.0.1", fake.port, tmp_path / "log")


def test_a_server_until_sigterm(fake, tmp_path):
    """As a user starts it: the flags for a fit are printed when it is healthy, and it ends with all that it has started."""
    command = [sys.executable, "-m", "skillsd", "serve", "-c", "sokoban", f"--python={fake.python}", f"--port={fake.port}"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines[1].strip() == (f"--data.rollout.engine=servers --data.rollout.servers=[http://127.0.0.1:{fake.port}]")
        assert fake.is_running()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    fake.wait_until_gone()
    assert (tmp_path / f"vllm-{fake.port}.log").is_file()


def test_the_server_s_environment_and_arguments(fake, tmp_path, monkeypatch, capsys):
    """The key is in its environment, where `ps` does not show it; skillsd is importable there by a link, and nothing beside it."""
    monkeypatch.setenv("SERVER_KEY", "sesame-sesame")
    monkeypatch.setenv("FAKE_VLLM", "dies")
    with pytest.raises(ConfigError, match=r"^python: .* status 3"):
        start(fake, tmp_path, servers_key_env="SERVER_KEY")
    seen, link = fake.seen, Path(fake.seen["env"]["PYTHONPATH"].split(os.pathsep)[0])
    assert seen["env"]["VLLM_API_KEY"] == "sesame-sesame" and "sesame" not in str(seen["args"])
    assert seen["env"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True" and Path(seen["found"]).is_relative_to(link)
    fake.wait_until_gone()
    assert not link.exists()
    shown = capsys.readouterr().err
    assert "out of luck" in shown and "sesame" not in shown and "out of luck" in (tmp_path / "log").read_text()


def test_one_that_never_gets_ready(fake, tmp_path, monkeypatch, capsys):
    """It is waited for, with a line now and then; an interruption ends it though it ignores SIGTERM."""
    monkeypatch.setenv("FAKE_VLLM", "hangs")
    monkeypatch.setattr(module, "REPORT_S", 0.0)
    monkeypatch.setattr(module, "END_S", 0.2)
    waited = []

    def sleep(seconds):
        time.sleep(0.05)
        waited.append(seconds)
        if (tmp_path / "seen.json").is_file() and len(waited) > 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "time", type("Time", (), {"sleep": staticmethod(sleep), "monotonic": staticmethod(time.monotonic)}))
    with pytest.raises(KeyboardInterrupt):
        start(fake, tmp_path)
    fake.wait_until_gone()
    assert "loads nano" in capsys.readouterr().out


def given(policy=None, device=CPU, vllm=Path(), **engine):
    """The options for these settings; those that take a value as a dictionary."""
    args = options(policy or PolicySettings(), EngineSettings(**engine), device, vllm)
    return {a: b for a, b in pairwise(args) if a.startswith("--")}


def test_options_of_the_server_follow_the_policy(tiny_model, tmp_path):
    servers = dict(engine="servers", servers=["http://a:1"])
    assert given()["--dtype"] == "float32" and given()["--max-model-len"] == "2048" and given()["--max-loras"] == "2"
    assert given(PolicySettings(dtype="bfloat16"))["--dtype"] == "bfloat16"
    assert given(PolicySettings(context_length=512))["--max-model-len"] == "512"
    assert given(PolicySettings(lora=LoraSettings(r=9)))["--max-lora-rank"] == "16"
    assert given(staleness=2, **servers)["--max-loras"] == "4"
    folder = Path(tiny_model("llama"))
    assert options(PolicySettings(model=str(folder)), EngineSettings(), CPU, tmp_path)[0] == str(folder)
    file = tmp_path / "model_executor/layers/quantization/bitsandbytes.py"
    file.parent.mkdir(parents=True)
    file.touch()
    nf4 = given(PolicySettings(quantise="nf4"), vllm=tmp_path)
    assert nf4["--quantization"] == "bitsandbytes" and nf4["--dtype"] == "bfloat16"


def test_on_a_gpu_a_base_keeps_its_own_dtype(tiny_model):
    assert given(device=torch.device("cuda"))["--dtype"] == "float32"


@pytest.mark.parametrize(
    "key, settings",
    [
        ("model.policy.model", dict(model="nano-untrained")),
        ("model.policy.model", dict(model="/not/here")),
        ("model.policy.shard", dict(shard=True)),
        ("model.policy.lora.r", dict(lora=LoraSettings(r=600))),
        ("model.policy.quantise", dict(quantise="nf4")),
    ],
)
def test_settings_that_cannot_be_served(key, settings, tmp_path):
    with pytest.raises(ConfigError, match=rf"^{key}\b"):
        given(PolicySettings(**settings), vllm=tmp_path)


def test_a_missing_vllm_and_a_taken_port_are_refused(tmp_path):
    for python in (tmp_path / "nowhere", Path("/bin/false")):
        with pytest.raises(ConfigError, match=r"^python: "):
            find_vllm(str(python))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"^port: "):
        check_port("127.0.0.1", taken.getsockname()[1])
    for host, port in (("127.0.0.1", 0), ("127.0.0.1", 1 << 16), ("192.0.2.1", 8000)):
        with pytest.raises(ConfigError, match=r"^port"):
            check_port(host, port)
