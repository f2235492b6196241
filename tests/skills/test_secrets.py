"""API keys stay in memory: a whole run against a server that echoes its key, and every byte that the run leaves is searched for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.skills.chat_server import serving

from skillsd import cli, errors
from skillsd.cli.configured import refuse_secrets
from skillsd.diagnosis import report
from skillsd.errors import ConfigError, hold_secret, redacted, without_keys

KEY = "sk-planted-Zq83hTnv0LxWm5RbYd2KcJ7u"
NAME = "MY_PLANTED_VARIABLE"  # its name does not say what it is
ENV = {
    "size": 5, "boxes": 1, "difficulties": {"short": {"lengths": [2, 4]}}, "splits": {"train": {"short": 2}, "test": {"short": 2}},
    "max_turns": 2, "action_format": "bare", "prompts": {"instruction": ""},
}  # fmt: skip
CRASH = f"""
import os
import lightning
class Crash(lightning.Callback):
    def on_train_batch_end(self, *args):
        try:
            raise ValueError("inner " + os.environ["{NAME}"])
        except ValueError as e:
            raise TypeError("outer " + repr(os.environ["{NAME}"])) from e
"""
DRIVER = """
import sys
from skillsd.cli import main
assert main(sys.argv[1:]) == 0
print("FIRST RUN ENDED", flush=True)
print("FIRST RUN ENDED", file=sys.stderr, flush=True)
main([*sys.argv[1:], "--trainer.default_root_dir=crashed", "--trainer.callbacks+=crash_callback.Crash"])
"""


class Echo(BaseHTTPRequestHandler):
    """Fails in another way at each request, and always says the key."""

    protocol_version = "HTTP/1.1"
    steps = ("skill", 401, 500, "broken", "prose", "hang", "long", "packed", 403)

    def do_POST(self) -> None:
        server: Any = self.server
        self.rfile.read(int(self.headers["Content-Length"]))
        said = self.headers["Authorization"]
        server.seen.append(said)
        step, status = self.steps[(len(server.seen) - 1) % len(self.steps)], 200
        escaped = "".join(f"\\u{ord(c):04x}" for c in said)  # JSON's other way to write it
        texts = {"success_analysis": f"tell {said}", "mistake_analysis": "none", "golden_workflow": "ESCAPED"}
        content = json.dumps(texts).replace("ESCAPED", escaped) if step == "skill" else f"I cannot, {said}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        data = {"id": said, "object": "chat.completion", "created": 0, "model": said, "choices": [choice]}
        payload = json.dumps(data).encode()
        if isinstance(step, int):
            status, payload = step, json.dumps({"error": {"message": "x" * 480 + f" Incorrect API key: {said}", "code": said}}).encode()
        elif step == "broken":
            payload = f'{{"choices": [{said}'.encode()
        elif step == "long":
            payload = said.encode() * 60_000  # 2 MB and more
        elif step == "hang":
            server.stop.wait(3)
            return
        self.send_response(status, said)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(payload))), ("X-Echo", said)):
            self.send_header(name, value)
        if step == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            self.wfile.write(payload)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    echo: Any = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    echo.seen = []
    with serving(echo):
        yield echo


def settings(model: str, port: int, folder: Path) -> dict[str, Any]:
    init = {
        "model": "m", "base_url": f"http://127.0.0.1:{port}/v1", "api_key_env": NAME, "timeout_s": 1.0, "retries": 1, "backoff_s": 0.01,
        "max_workers": 1,
    }  # fmt: skip
    return {
        "trainer": {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu", "default_root_dir": str(folder)},
        "skills": {"min_reward": None, "summariser": {"class_path": "skillsd.skills.OpenAISummariser", "init_args": init}},
        "model": {"policy": {"model": model, "lora": {"r": 2, "alpha": 4, "init": None}}},
        "data": {"env_kwargs": ENV, "batch_tasks": 2, "group_size": 2, "rollout": {"max_rows": 8}},
    }


def pieces(size: int = 12) -> list[bytes]:
    return [KEY[at : at + size].encode() for at in range(len(KEY) - size + 1)]


@pytest.mark.slow  # two runs
def test_a_whole_run_leaves_no_key(server, tmp_path, tiny_model):
    pytest.importorskip("openai")
    folder = tmp_path / "run"
    (tmp_path / "crash_callback.py").write_text(CRASH)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings(tiny_model("qwen3"), server.server_port, folder)))
    env = {**os.environ, NAME: KEY, "SKILLSD_DEBUG": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([*sys.path, str(tmp_path)])
    args = [sys.executable, "-c", DRIVER, "fit", "-c", "sokoban", "-c", "method/skillsd", "-c", str(tmp_path / "x.yaml")]
    result = subprocess.run(args, env=env, cwd=tmp_path, capture_output=True, timeout=300)
    out, err = result.stdout, result.stderr
    assert b"FIRST RUN ENDED" in out and result.returncode == 1, err.decode()[-3000:]
    assert b"Traceback" in err and f"outer '[{NAME}]'".encode() in err and f"inner [{NAME}]".encode() in err  # redacted, not missing
    assert b"status 401: " in err and b"no skill from" in err
    assert len(server.seen) > len(Echo.steps) and set(server.seen) == {f"Bearer {KEY}"}  # the server did get it
    blobs = {"stdout": out, "stderr": err}
    for path in sorted(p for top in (folder, tmp_path / "crashed") for p in top.rglob("*") if p.is_file()):
        blobs[str(path)] = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as z:
                blobs |= {f"{path}:{n}": z.read(n) for n in z.namelist()}
    names = " ".join(blobs)
    written = ("last.ckpt:", "tfevents", "bank.sqlite", "run/config.yaml", "metrics.csv", "trajectories.jsonl", "crashed/config.yaml")
    assert all(part in names for part in written), names
    assert f"tell Bearer [{NAME}]".encode() in b"".join(v for k, v in blobs.items() if "bank.sqlite" in k)  # the echoing skill is there
    assert [(name, p) for name, blob in blobs.items() for p in pieces() if p in blob] == []


def refused(tmp_path: Path, capsys: Any, config: dict[str, Any], *flags: str) -> str:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    code = cli.main(["fit", "-c", "sokoban", "-c", str(tmp_path / "x.yaml"), *flags])
    out, err = capsys.readouterr()
    assert code == 2 and err.count("\n") == 1 and not any(p.decode() in out + err for p in pieces()), (code, out, err)
    assert not (tmp_path / "run").exists()
    return str(err)


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SKILLSD_DEBUG", raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(errors, "_held", {})
    yield


def test_a_key_in_the_configuration_is_refused(clean, tmp_path, tiny_model, capsys, monkeypatch):
    pytest.importorskip("openai")
    base = settings(tiny_model("qwen3"), 9, tmp_path / "run")
    flag = "--skills.summariser.init_args."
    # a literal, whose value no environment variable has: it is not repeated
    assert "api_key_env is the name" in refused(tmp_path, capsys, base, f"{flag}api_key_env={KEY}")
    assert "extra_headers: Authorization looks like a key" in refused(
        tmp_path, capsys, base, f"{flag}request={{extra_headers: {{Authorization: Bearer {KEY}}}}}"
    )
    assert "request: api_key looks like a key" in refused(tmp_path, capsys, base, f"{flag}request={{api_key: {KEY}}}")
    assert "base_url holds a user" in refused(tmp_path, capsys, base, f"{flag}base_url=http://user:{KEY}@localhost/v1")
    assert "base_url holds a user" in refused(tmp_path, capsys, base, f"{flag}base_url=http://localhost/v1?x={KEY}")
    refused(tmp_path, capsys, base, f"{flag}api_key={KEY}")  # there is no such key
    # the value of a variable, by interpolation and as it stands
    monkeypatch.setenv(NAME, KEY)
    line = refused(tmp_path, capsys, base, f"{flag}system=${{oc.env:{NAME}}}")
    assert f"skills.summariser.init_args.system holds the value of the environment variable {NAME}" in line
    monkeypatch.setenv("HF_TOKEN", KEY[::-1])
    named = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": KEY[::-1]}}
    base["trainer"]["callbacks"] = [named]
    line = refused(tmp_path, capsys, base)
    assert KEY[::-1] not in line


def test_a_value_that_only_has_a_secret_s_name_is_data(clean, caplog, monkeypatch):
    """A path in CACHE_KEY and a password that is a word stop no run and are masked in no data; what a key of ours holds is refused."""
    monkeypatch.setenv("CACHE_KEY", "/home/me/cache")
    monkeypatch.setenv("POSTGRES_PASSWORD", "password1234")
    monkeypatch.setenv("OPENAI_API_KEY", "ollama")  # what local servers are given
    config = {"trainer.default_root_dir": "/home/me/cache/run", "skills.summariser.init_args.base_url": "http://ollama:11434/v1"}
    refuse_secrets(config)
    assert not caplog.records
    refuse_secrets({**config, "data.env_kwargs.password": "password1234"})
    assert "env_kwargs.password holds the value of the environment variable POSTGRES_PASSWORD" in caplog.text
    said = "log in with the password1234 to ollama, files are in /home/me/cache"
    assert without_keys(said) == said and redacted(said) != said
    monkeypatch.setenv(NAME, KEY)
    for name in ("skills.summariser.init_args.api_key_env", "data.rollout.servers_key_env"):
        with pytest.raises(ConfigError, match=f"^model.x holds the value of the environment variable {NAME}"):
            refuse_secrets({name: NAME, "model.x": ["a", f"Bearer {KEY}"]})
    assert without_keys(f"{KEY} {KEY[:-1]} {KEY}") == f"[{NAME}] {KEY[:-1]} [{NAME}]"


def test_request_settings_that_only_sound_like_keys_are_taken(monkeypatch):
    pytest.importorskip("openai")
    from skillsd.skills import OpenAISummariser

    body = {"skip_special_tokens": True, "stop_token_ids": [1], "top_k": 3}
    made = OpenAISummariser("m", "http://127.0.0.1:9/v1", request={"max_tokens": 5, "prompt_cache_key": "x", "extra_body": body})
    made.close()
    with pytest.raises(ValueError, match="extra_body: api-key looks like a key, and a key in the configuration would be written"):
        OpenAISummariser("m", "http://127.0.0.1:9/v1", request={"extra_body": {"api-key": "x"}})


def test_a_server_s_answer_is_stripped_of_the_key(clean, server, make_trajectory, monkeypatch):
    pytest.importorskip("openai")
    from skillsd.skills import OpenAISummariser

    monkeypatch.setenv(NAME, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = OpenAISummariser("m", f"http://127.0.0.1:{server.server_port}/v1", api_key_env=NAME, retries=0)
    (skill,), failed = made.summarise([make_trajectory()]), made.summarise([make_trajectory()])
    made.close()
    assert server.seen == [f"Bearer {KEY}"] * 2 and failed == [None]
    assert (skill.success_analysis, skill.golden_workflow) == (f"tell Bearer [{NAME}]", f"Bearer [{NAME}]")
    assert not any(p.decode() in skill.render() + made.last_error for p in pieces())


def test_held_secrets_and_their_ends_are_replaced_by_their_names(clean, monkeypatch):
    hold_secret("A", "abcdefghijklmnop")
    assert redacted("x abcdefghijklmnop y") == "x [A] y" and redacted("abcdefgh") == "[A]" and redacted("abcdefg") == "abcdefg"
    assert redacted("Bearer abcdefghij… and ijklmnop!") == "Bearer [A]… and [A]!" and redacted("abcdefghijklmnop" * 2) == "[A]" * 2
    hold_secret("SHORT", "EMPTY")  # what local servers are given
    assert redacted("EMPTY abcd") == "EMPTY abcd"
    hold_secret("B", "sixsix")
    assert redacted("[sixsix]") == "[[B]]"
    secret, plain = ("X_API_KEY", "HF_TOKEN", "DB_PASSWORD", "client_secret"), ("MONKEY", "KEYBOARD", "TOKENIZERS_PARALLELISM")
    for name in (*secret, *plain):
        monkeypatch.setenv(name, f"0123456789{name}")
        assert (redacted(f"0123456789{name}") == f"[{name}]") is (name in secret)
        monkeypatch.delenv(name)


def test_the_traceback_of_an_error_is_redacted(clean, capsys):
    hold_secret("A", KEY)
    try:
        raise ConfigError(f"say {KEY}")
    except ConfigError as e:
        report(type(e), e, e.__traceback__)
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("say [A]\n") and KEY not in err
