"""Checkpoint files: what is written is read back, and the newest is what the content says."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skillsd.callbacks.resume import CheckpointFiles
from skillsd.errors import ConfigError
from skillsd.files.checkpoint import newest_good, plain, read_checkpoint, step_of
from skillsd.files.durable import DamagedError


def state(step: int = 1, **more: Any) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"w": torch.full((3,), float(step))}, **more}


def save(path: Path, step: int) -> Path:
    CheckpointFiles().save_checkpoint(state(step), path)
    return path


@pytest.mark.parametrize("value", [np.float64(0.1), np.int64(1 << 62), np.bool_(True), np.str_("a"), (1, {2}), Counter("ab"), b"a", None])
def test_what_is_written_is_read_back(value: Any, tmp_path: Path) -> None:
    given = state(callbacks={"Mine": OrderedDict(best=[value])})
    CheckpointFiles().save_checkpoint(given, tmp_path / "a.ckpt")
    read = read_checkpoint(tmp_path / "a.ckpt")
    assert read["callbacks"]["Mine"]["best"] == [value] and torch.equal(read["state_dict"]["w"], given["state_dict"]["w"])
    assert given["callbacks"]["Mine"]["best"][0] is value  # the user's own state is left alone


@pytest.mark.parametrize("value", [np.float32(0.1), np.zeros(2), Path("a"), np.float64, lambda: 0])
def test_what_could_not_be_read_back_is_never_written(value: Any, tmp_path: Path) -> None:
    files = CheckpointFiles()
    with pytest.raises(ConfigError, match=r"trainer\.callbacks: .* mine\.Best, x\.1 is a "):
        files.save_checkpoint(state(callbacks={"mine.Best": {"x": [0, value]}}), tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="hyper_parameters, loader"):
        plain(state(hyper_parameters={"loader": value}))
    files.flush()
    assert not list(tmp_path.iterdir())


def test_a_state_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="hyper_parameters"):
        plain(state(hyper_parameters=loop))


def test_the_newest_is_what_the_content_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert newest_good(tmp_path) is None
    last, previous = save(tmp_path / "last.ckpt", 10), save(tmp_path / "previous.ckpt", 9)
    other = save(tmp_path / "kept.ckpt", 2)
    for at, path in enumerate((last, previous, other)):  # as after `touch`, or a copy without times
        os.utime(path, (at, at))
    assert newest_good(tmp_path) == last and step_of(previous) == 9 and not capsys.readouterr().err
    data = last.read_bytes()
    last.write_bytes(data[:-200])
    assert newest_good(tmp_path) == previous and "last.ckpt is " in capsys.readouterr().err
    for path in (previous, other):
        path.write_bytes(b"x")
    with pytest.raises(DamagedError, match=r"last\.ckpt"):
        newest_good(tmp_path)


def test_a_whole_file_of_other_content_is_not_called_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, odd, foreign = save(tmp_path / "good.ckpt", 1), tmp_path / "odd.ckpt", tmp_path / "foreign.ckpt"
    torch.save(state(5, callbacks={"Mine": {"best": np.float64(0.5)}}), odd)  # as an older version of this program wrote it
    torch.save({"epoch": 1}, foreign)
    for path, why in ((odd, r"odd\.ckpt .*numpy"), (foreign, r"foreign\.ckpt .*state_dict")):
        with pytest.raises(ConfigError, match=f"ckpt_path: .*{why}") as e:
            read_checkpoint(path)
        assert not isinstance(e.value, DamagedError) and "damaged" not in str(e.value)
    assert newest_good(tmp_path) == good
    said = capsys.readouterr().err
    assert "odd.ckpt" in said and "foreign.ckpt" in said and "damaged" not in said


def test_going_on_from_an_older_one_leaves_the_newer_ones_behind(tmp_path: Path) -> None:
    old = save(tmp_path / "elsewhere" / "old.ckpt", 3)
    folder = tmp_path / "run"
    for name, step in (("last.ckpt", 8), ("previous.ckpt", 7), ("kept.ckpt", 2)):
        save(folder / name, step)
    files = CheckpointFiles()
    files.load_checkpoint(old)
    files.save_checkpoint(state(4), folder / "last.ckpt")
    assert newest_good(folder) == folder / "last.ckpt" and step_of(folder / "last.ckpt") == 4
    assert sorted(p.name for p in folder.iterdir()) == ["kept.ckpt", "last.ckpt", "previous.ckpt.abandoned"]
    files.save_checkpoint(state(5), folder / "last.ckpt")
    assert step_of(folder / "previous.ckpt") == 4
