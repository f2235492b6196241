"""The command line in-process: whose files it replaces and removes, and whose run folder it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.test_cli import Run, finished, run

from skillsd import cli
from skillsd.errors import ConfigError
from skillsd.files.durable import check_replaceable, is_sealed
from skillsd.files.run_folder import ADAPTER_KIND, RunRecord, check_not_of_run, read_record
from skillsd.files.run_lock import RunLock

__all__ = ["finished", "run"]


@pytest.fixture
def ended(run: Run, finished: Path) -> Run:
    shutil.copytree(finished, run.folder)
    return run


def everything(folder: Path) -> dict[str, Any]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else p.is_symlink() for p in sorted(folder.rglob("*"))}


@pytest.fixture
def precious(ended: Run, tmp_path: Path) -> dict[str, Any]:
    """Files, links and folders of a user's beside a finished run: what is there before."""
    for name in ("thesis/chapter1.txt", "out.tmp/precious.txt", "out.skillsd-tmp/precious.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("thesis")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    return everything(tmp_path)


def test_places_that_an_export_is_not_put_in_are_refused(ended: Run, precious: dict[str, Any], tmp_path: Path) -> None:
    inside = (ended.folder, ended.folder.parent, ended.folder / "adapter", ended.folder / "metrics.csv", ended.folder / "model")
    for out in (".", "..", "thesis", "file", "file/x", "link", "dangling", "empty", "missing/x", "n" * 300, *map(str, inside)):
        with pytest.raises(ConfigError, match=r"^out: "):
            check_not_of_run(Path(out), "out")
            check_replaceable(Path(out), "out", ADAPTER_KIND)
    for out in ("thesis", str(ended.folder / "model")):  # one of each check
        assert "out: " in ended.refuses(f"--out={out}", command="export")
        assert "out: " in ended.refuses(f"--out={out}", "--overwrite=true", command="export")
    assert everything(tmp_path) == precious


def test_an_export_replaces_an_earlier_export_alone(ended: Run, precious: dict[str, Any], tmp_path: Path) -> None:
    assert ended("--out=out", command="export") == 0, ended.err
    assert is_sealed(tmp_path / "out") and {**everything(tmp_path), **precious} == everything(tmp_path)
    made = everything(tmp_path)
    assert ended("--out=out", command="export") == 0 and everything(tmp_path) == made
    (tmp_path / "out" / "notes.txt").write_text("precious")
    ended.refuses("--out=out", command="export")
    (tmp_path / "out" / "notes.txt").unlink()
    (tmp_path / "out" / "README.md").write_text("my own words")
    ended.refuses("--out=out", command="export")
    assert (tmp_path / "out" / "README.md").read_text() == "my own words"


def test_checkpoints_that_are_gone_are_missed(ended: Run, tmp_path: Path) -> None:
    (ended.folder / "checkpoints").rename(tmp_path / "disk")
    for link in (None, tmp_path / "not-mounted"):
        if link is not None:
            (ended.folder / "checkpoints").symlink_to(link)
        before = everything(tmp_path)
        for command in ("fit", "validate", "export"):
            more = ["--out=out"] if command == "export" else []
            assert "checkpoint" in ended.refuses("--ckpt_path=last", *more, command=command)
        assert everything(tmp_path) == before
    (ended.folder / "checkpoints").unlink()
    (tmp_path / "disk").rename(ended.folder / "checkpoints")
    assert ended("--ckpt_path=last") == 0
    shutil.rmtree(ended.folder / "checkpoints")
    assert ended("--overwrite") == 0, ended.err
    assert read_record(ended.folder) == RunRecord(checkpoints="checkpoints")
    assert yaml.safe_load((ended.folder / "config.yaml").read_text()).get("overwrite") is None  # given again, it discards nothing


def test_a_run_that_cannot_start_discards_nothing(ended: Run) -> None:
    before = everything(ended.folder)
    ended.refuses("--overwrite=true", "--model.policy.model=/no/such")
    ended.refuses("--overwrite=true", "--model.policy.lora.init=/no/such")
    assert everything(ended.folder) == before


def test_a_folder_of_an_older_format_is_named(ended: Run, tmp_path: Path, capsys: Any) -> None:
    (ended.folder / "run.json").unlink()
    before = everything(tmp_path)
    for command, *flags in (
        ("fit", "--ckpt_path=last"), ("fit",), ("fit", "--overwrite"), ("validate", "--ckpt_path=last"), ("export", "--out=out"),
    ):  # fmt: skip
        assert "run.json" in ended.refuses(*flags, command=command)
    for args in (["show"], ["report"], ["skills", "export"]):
        assert cli.main([*args, str(ended.folder)]) == 2 and "run.json" in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_a_path_is_read_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    shutil.copytree(yaml.safe_load(run.overlay.read_text())["model"]["policy"]["model"], home / "m1")
    (tmp_path / "home.yaml").write_text(yaml.safe_dump({"trainer": {"default_root_dir": "~/a [red]run"}}))
    args = ["fit", "-c", "sokoban", "-c", str(run.overlay), "--config=~/../home.yaml", "--model.policy.model=~/m1"]
    assert cli.main(args) == 0
    folder = home / "a [red]run"
    assert f"log: {folder}/metrics.csv" in capsys.readouterr().out
    before = everything(tmp_path)
    assert cli.main(args) == 2 and "earlier run" in capsys.readouterr().err
    assert cli.main([*args[:-1], "--model.policy.lora.init=~/no"]) == 2
    assert everything(tmp_path) == before and not (tmp_path / "~").exists()
    assert {p.name for p in home.iterdir()} == {"m1", folder.name} and (folder / "tensorboard").is_dir()
    export = ["export", *args[1:], "--out=~/exported"]
    assert cli.main(export) == 0 and is_sealed(home / "exported")
    assert cli.main(["show", "~/a [red]run"]) == 0


def test_a_run_folder_has_one_owner(ended: Run, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "skills.jsonl").write_text("")
    assert cli.main(["skills", "export", str(ended.folder), "-o", str(tmp_path / "some.jsonl")]) == 0
    lock = RunLock(ended.folder)
    before = everything(tmp_path)
    try:
        for command, *flags in (("fit",), ("fit", "--ckpt_path=last"), ("fit", "--overwrite", "--steal-lock"), ("validate",)):
            assert f"process {lock.me.pid} on {lock.me.host}" in ended.refuses(*flags, command=command)
        assert cli.main(["skills", "import", str(ended.folder), str(tmp_path / "some.jsonl")]) == 2
        assert everything(tmp_path) == before
        assert cli.main(["show", str(ended.folder)]) == 0 and ended("--out=out", command="export") == 0
    finally:
        lock.release()
    assert ended(command="validate") == 0 and not (ended.folder / "run.lock").exists()


def test_places_that_cannot_be_a_run_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = everything(tmp_path)
    for name in ("file", "file/below", "dangling", "loop", "n" * 300, "$HOME/run"):
        run.folder = Path(name)
        for command in ("fit", "validate"):
            assert "trainer.default_root_dir: " in run.refuses(command=command)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("left", [{"RANK": "1", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}, {"SLURM_PROCID": "1"}, {"SLURM_NTASKS": "4"}])
def test_what_a_launcher_has_left_in_the_shell(run: Run, monkeypatch: pytest.MonkeyPatch, left: dict[str, str]) -> None:
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert run("--trainer.max_steps=1") == 0, run.err
    assert all(name in run.err for name in left) and {"metrics.csv", "checkpoints/last.ckpt", "panel.json"} <= run.files().keys()


def test_a_user_s_files_are_not_replaced(ended: Run, tmp_path: Path, capsys: Any, made_gif: Callable[[Path], None]) -> None:
    """By what other commands write."""
    made_gif(tmp_path / "cat.gif")
    for name in ("skills.jsonl", "thesis/report.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    before = everything(tmp_path)
    play = ["play", "-c", "sokoban", "--policy", "oracle", "--gif"]
    for args in (
        ["skills", "export", str(ended.folder), "-o", "skills.jsonl"],
        ["report", str(ended.folder), "-o", "thesis"],
        [*play, "cat.gif"],
    ):
        assert cli.main(args) == 2, args
        assert capsys.readouterr().err.count("\n") == 1
    assert everything(tmp_path) == before
    for args in ([*play, "level.gif"], ["report", str(ended.folder), "-o", "report"]):
        assert cli.main(args) == cli.main(args) == 0


@pytest.fixture
def made_gif() -> Callable[[Path], None]:
    from PIL import Image

    return lambda path: Image.new("RGB", (4, 4)).save(path)
