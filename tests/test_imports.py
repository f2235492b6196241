"""Commands that train nothing import neither torch nor Lightning: those take seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.analysis.folders import SHORT, append, write_metrics

from skillsd.files.run_folder import write_record

SLOW = {"bitsandbytes", "jsonargparse", "lightning", "peft", "tensorboard", "torch", "transformers"}
CODE = """
import sys
from skillsd.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as e:
    code = e.code or 0
print("imported", code, *sorted(name for name in sys.modules if "." not in name))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two iterations."""
    folder: Path = tmp_path_factory.mktemp("run")
    write_record(folder)
    write_metrics(folder, [{}, {}])
    append(folder / "trajectories.jsonl", [SHORT])
    return folder


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["shwo"], 2),
        (["fit", "-c", "sokobann"], 2),
        (["config", "-c", "sokoban"], 0),
        (["show", "RUN"], 0),
        (["show", "RUN", "--trajectory", "0"], 0),
        (["show", "RUN", "--no-such-flag"], 2),
        (["skills", "--help"], 0),
        (["report", "--help"], 0),
        (["view", "--help"], 0),
        (["doctor", "--help"], 0),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else str(x),
)
def test_no_slow_package_is_imported(folder, args, code):
    given = [str(folder) if a == "RUN" else a for a in args]
    said = subprocess.run([sys.executable, "-c", CODE, *given], capture_output=True, text=True)
    _, returned, *imported = said.stdout.splitlines()[-1].split()
    assert int(returned) == code, said.stderr
    assert not SLOW & set(imported)
