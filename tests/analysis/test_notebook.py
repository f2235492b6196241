"""What notebooks begin with."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from skillsd.analysis.notebook import open_run, quiet
from skillsd.errors import ConfigError
from skillsd.files.run_folder import write_record


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_record(folder)
    (folder / "config.yaml").write_text("seed_everything: 7\n")
    return folder


def test_open_run_finds_the_usual_place_or_the_one_that_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("SKILLSD_RUN", raising=False)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.raises(ConfigError, match=r"no run at \.\./runs/sokoban or runs/sokoban: run `make fit`"):
        open_run()
    usual, other = made(tmp_path / "runs" / "sokoban"), made(tmp_path / "other")
    assert open_run().folder.resolve() == usual and open_run().config == {"seed_everything": 7}
    monkeypatch.chdir(tmp_path)
    assert open_run().folder.resolve() == usual
    monkeypatch.setenv("SKILLSD_RUN", str(other))
    assert open_run().folder == other and open_run(usual).folder == usual
    monkeypatch.setenv("SKILLSD_RUN", "nowhere")
    with pytest.raises(ConfigError, match="no run at nowhere: run `make fit`"):
        open_run()


def test_quiet_hides_what_a_reader_cannot_change(monkeypatch):
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "as it was")  # so that it is put back
        monkeypatch.delenv(name)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet()
        warnings.warn("IProgress not found. Please update", UserWarning, stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("mind this", UserWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == ["mind this"]
