"""Peers: scripts that may run in another environment. They import nothing of skillsd and print a line of JSON for each measurement."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--peer-python", default=shlex.quote(sys.executable), help='such as "env PYTHONPATH=/opt/peers python3"')
    parser.add_argument("--peer-timeout", type=float, default=600, help="seconds after which the peer is ended")
    parser.add_argument("--peer-memory", type=float, help="share of the GPU's memory for vLLM")


def measurements(script: str, python: str, timeout: float, **options: Any) -> Iterator[dict[str, Any]]:
    """What the peer measures, as it comes; the rest of what it prints goes to stderr. A peer that fails ends this with a printed word.

    Args:
        script: A file of this folder.
        python: The command of its interpreter.
        options: Its `--options`, with - for _; a list is several values, None leaves the option out.
    """
    command = [*shlex.split(python), str(Path(__file__).with_name(script))]
    for key, value in options.items():
        if value is not None:
            command += [f"--{key.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    env = {k: v for k, v in os.environ.items() if k != "PYTORCH_ALLOC_CONF"}  # ours: peers run as they come
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, errors="replace", start_new_session=True, encoding="utf-8") as peer:
        assert peer.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            os.killpg(peer.pid, signal.SIGKILL)

        timer = threading.Timer(timeout, end)
        timer.start()
        try:
            for line in peer.stdout:
                if line.startswith('{"'):
                    yield json.loads(line)
                else:
                    print(line, end="", file=sys.stderr, flush=True)
            code = peer.wait()
        finally:
            timer.cancel()
            if peer.poll() is None:
                os.killpg(peer.pid, signal.SIGKILL)
    if code:
        print(f"{script} {f'did not end within {timeout:.0f} s' if late.is_set() else f'ended with status {code}'}", flush=True)
