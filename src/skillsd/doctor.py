"""`skillsd doctor`: what is installed, what is missing, and the one command that adds it.

Environments bring rows of their own through the entry-point group `skillsd.doctor`: each entry point names a callable without arguments
that returns a list of dicts {check, state, detail, fix}, all str; state is `ok`, `limited` (works, with less) or `missing`; fix is the
command, or "" where nothing is to be done.

A check imports what it looks at: a package that is broken is a row, and the command's first line comes at once.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, requires, version
from typing import Any

from huggingface_hub import constants as hub
from rich.console import Console
from rich.table import Table
from rich.text import Text

from skillsd import __version__
from skillsd.errors import ConfigError, Parser, causes
from skillsd.timeouts import Failure, Threads
from skillsd.words import count

GROUP = "skillsd.doctor"
KEYS = ("check", "state", "detail", "fix")
STATES = {"ok": "green", "limited": "yellow", "optional": "blue", "missing": "red"}
HUB_SECONDS = 2.5
"""The longest wait for the hub."""

Row = dict[str, str]
Finding = tuple[str, str, str]
"""State, detail, fix."""


def rows(network: bool = True) -> list[Row]:
    """All checks, then the environments'; a check that fails unexpectedly is a row as well.

    Args:
        network: False leaves out what asks another machine.
    """
    with redirect_stdout(sys.stderr):  # what libraries print on import would spoil the JSON
        found = [_row(name, *_guarded(check)) for name, check in CHECKS.items() if network or check is not hub_access]
        for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
            found += provided(point)
    return found


def provided(point: EntryPoint) -> list[Row]:
    """The rows of one environment; one row with the error if it cannot be imported, raises, or returns something else."""
    try:
        return [_checked(row) for row in point.load()()]
    except (Exception, SystemExit) as e:
        return [_row(point.name, "missing", f"{point.value}: {causes(e)}", "")]


def _checked(row: Any) -> Row:
    if not isinstance(row, dict) or set(row) != set(KEYS) or not all(isinstance(v, str) for v in row.values()):
        raise ValueError(f"a row is a dict of str with the keys {', '.join(KEYS)}, not {row!r}")
    if row["state"] not in STATES:
        raise ValueError(f"state is {row['state']!r}: one of {', '.join(STATES)}")
    return {key: row[key] for key in KEYS}


def _row(*values: str) -> Row:
    return dict(zip(KEYS, values, strict=True))


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as e:
        return "missing", causes(e), ""


# -- the checks ---------------------------------------------------------------------------------------------------------------


def python() -> Finding:
    return "ok", f"{platform.python_version()} ({platform.system()} {platform.machine()})", ""


def pytorch() -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return "ok", f"{torch.__version__}, {build}, {count(torch.get_num_threads(), 'CPU thread')}", ""


def gpu() -> Finding:
    """Its name and memory; skillsd runs without one, so none is `limited`."""
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return "ok", "; ".join(f"{c.name}, {c.total_memory / 2**30:.0f} GiB" for c in cards), ""
    if shutil.which("nvidia-smi") is None:
        return "limited", "none: CPU only", ""
    if torch.version.cuda is None:
        base = torch.__version__.partition("+")[0]
        return "limited", "CPU only: an NVIDIA driver, but torch is built without CUDA", f"pip install --force-reinstall torch=={base}"
    return "limited", f"CPU only: torch for CUDA {torch.version.cuda} finds no GPU it can use: compare the driver (nvidia-smi)", ""


def bitsandbytes() -> Finding:
    """Its version, and that nf4 really computes, on the CPU and on the GPU if there is one."""
    import torch

    from skillsd.policy.probe import nf4_error

    state, found, fix = _package("bitsandbytes", "for models in 4 bits (model.policy.quantise: nf4)")
    if state != "ok":
        return state, found, fix
    said, works = [], []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        try:
            error = nf4_error(device)
            works.append(error < 0.2)  # also False for nan
            said.append(f"nf4 runs on {device}" if works[-1] else f"nf4 on {device} is wrong (relative error {error:.2f})")
        except Exception as e:
            works.append(False)
            said.append(f"nf4 on {device} fails ({causes(e)})")
    if all(works):
        return "ok", f"{found}, {', '.join(said)}", ""
    return "limited", f"{found}, {', '.join(said)}", f"{_pip('bitsandbytes')} --force-reinstall --no-deps"


def hub_access() -> Finding:
    """Check that hub names can be loaded; being offline is no error."""
    without = "packaged models, local folders and the hub's cache work"
    if hub.HF_HUB_OFFLINE:
        return "limited", f"offline (HF_HUB_OFFLINE is set): {without}", "unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE"
    said = _head(hub.ENDPOINT, HUB_SECONDS)
    if said == "":
        return "ok", f"{hub.ENDPOINT} answers", ""
    return "limited", f"offline ({hub.ENDPOINT}: {said}): {without}", ""


def _head(url: str, seconds: float) -> str:
    """What went wrong with a HEAD request; "" if nothing did."""

    def ask() -> str:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "skillsd"})
            with urllib.request.urlopen(request, timeout=seconds):
                return ""
        except urllib.error.HTTPError as e:
            return f"HTTP {e.code}"
        except urllib.error.URLError as e:
            return getattr(e.reason, "strerror", None) or str(e.reason)
        except Exception as e:
            return causes(e)

    threads = Threads(1, seconds, "network")  # a name server that is silent, or a server that drips, obeys no socket's time limit
    call = threads.submit(ask)
    threads.wait([call])
    threads.close(wait=False)
    said = call.result()
    return f"no answer within {seconds:g} s" if isinstance(said, Failure) else str(said)


def smollm2() -> Finding:
    from skillsd.policy.smollm2 import cached_folder

    try:
        return "ok", str(cached_folder()), ""
    except ConfigError:
        return "missing", "not converted yet (about 100 MB, no hub needed)", "make smollm2"


def openai() -> Finding:
    return _package("openai", "only for OpenAISummariser", "optional")


def triton() -> Finding:
    import torch

    if torch.cuda.is_available():
        return _package("triton", "comes with torch for CUDA")
    state, detail, _ = _package("triton", "comes with torch for CUDA; a CPU does without", "optional")
    return state, detail, ""


def tensorboard() -> Finding:
    return _package("tensorboard", "the logger of the experiments in conf/")


def _package(name: str, purpose: str, without: str = "missing") -> Finding:
    try:
        return "ok", version(name), ""
    except PackageNotFoundError:
        return without, purpose, _pip(name)


def _pip(name: str) -> str:
    """The command that installs the version which skillsd asks for."""
    needed = [r.partition(";")[0].strip() for r in requires("skillsd") or []]
    return f"pip install '{next((r for r in needed if re.split('[^A-Za-z0-9_-]', r)[0] == name), name)}'"


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": python,
    "PyTorch": pytorch,
    "GPU": gpu,
    "bitsandbytes": bitsandbytes,
    "Hugging Face hub": hub_access,
    "SmolLM2-135M": smollm2,
    "openai": openai,
    "Triton": triton,
    "TensorBoard": tensorboard,
}


# -- the command --------------------------------------------------------------------------------------------------------------


def doctor(args: Sequence[str]) -> None:
    """`skillsd doctor ARGS`: print the rows as a table, or as JSON.

    Raises:
        ConfigError: unknown arguments.
    """
    parser = Parser(prog="skillsd doctor", description="Show what is installed, what is missing, and the command that adds it.")
    parser.add_argument("--json", action="store_true", help="print a list of {check, state, detail, fix} instead of a table")
    as_json = parser.parse_args(args).json
    print(f"skillsd {__version__}: looking at what is installed ...", file=sys.stderr, flush=True)
    found = rows()
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    table = Table(title=f"skillsd {__version__}")
    for heading in ("check", "state"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what was found; how to get it", overflow="fold")
    for row in found:  # as Text: brackets in a detail are no markup
        detail = Text(row["detail"]) + Text(f"\n-> {row['fix']}" if row["fix"] else "", "bold")
        table.add_row(Text(row["check"]), Text(row["state"], STATES[row["state"]]), detail)
    Console().print(table)
