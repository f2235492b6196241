"""`sharded.py` in a process of its own: its ranks are forked, and the fork of a process with threads, a test runner's say, may hang."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="forked processes cannot use autograd beside CUDA")
def test_a_base_that_is_split_over_two_ranks():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/policy/sharded.py"]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert completed.returncode == 0 and " passed" in completed.stdout, completed.stdout[-6000:] + completed.stderr[-2000:]
