"""A finished run of the shipped agent, made once, and commands whose output is looked at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.commands import command


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, only to be read."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert command("fit", folder) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def output_of(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that succeeds; what it printed on a terminal of 120 columns."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(name: str, folder: Path, *flags: str) -> str:
        assert command(name, folder, *flags) == 0
        return str(capsys.readouterr().out)

    return call
