"""A run that goes on is the run that began: what is refused, what is said, and what makes no difference."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.test_cli import Run

from skillsd.cli import configured as cli_configured
from skillsd.data import RolloutData
from skillsd.errors import ConfigError
from skillsd.files.continuation import check_episodes, describe_changes, episodes, settings
from skillsd.module import SkillSD
from skillsd.policy.nano import TEMPLATE, build_tokenizer
from skillsd.trajectory import Task

TASKS = [Task("a", "train"), Task("b", "train", options={"board": "#"})]


def played(**changes: Any) -> dict[str, str]:
    given: dict[str, Any] = {"env": "m:E-v0", "env_kwargs": {"size": 5, "make": object()}, "tasks": TASKS, "seed": 0, "batch_tasks": 2}
    return episodes(**given | changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_tasks": 3}, "batch_tasks was 2 and is 3"),
        ({"env": "m:E-v1"}, "env was .*v0.* and is .*v1"),
        ({"env_kwargs": {"size": 6, "make": object()}}, r"env_kwargs\.size was 5 and is 6"),
        ({"env_kwargs": {"size": 5, "make": object(), "boxes": 2}}, r"env_kwargs\.boxes was not set and is 2"),
        ({"tasks": TASKS[::-1]}, "tasks was 2 with"),
        ({"tasks": [TASKS[0], Task("b", "train", options={"board": "X"})]}, "tasks was 2 with"),
    ],
    ids=["seed", "batch_tasks", "env", "a changed argument", "a new argument", "order of tasks", "a changed task"],
)
def test_other_episodes_are_refused(change: dict[str, Any], said: str) -> None:
    check_episodes(played(), played())
    with pytest.raises(ConfigError, match=said):
        check_episodes(played(), played(**change))


def test_another_template_or_vocabulary_is_refused() -> None:
    tokenizer, other, words = build_tokenizer(), build_tokenizer(), build_tokenizer()
    other.chat_template += " "
    words.add_tokens(["new"])
    check_episodes(played(tokenizer=tokenizer), played(tokenizer=build_tokenizer()))
    for changed, key in ((other, r"policy\.chat_template"), (words, r"policy\.model")):
        with pytest.raises(ConfigError, match=key):
            check_episodes(played(tokenizer=tokenizer), played(tokenizer=changed))


def test_a_moved_run_has_the_same_settings() -> None:
    config = {"trainer": {"default_root_dir": "/a/run", "callbacks": [{"x": 1}]}, "dir": "/a/run/log", "near": "/a/running", "lr": 0.1}
    moved = {"trainer": {"default_root_dir": "b", "callbacks": [{"x": 1}]}, "dir": "b/log", "near": "/a/running", "lr": 0.1}
    assert settings(config, "/a/run") == settings(moved | {"steal_lock": True}, "b/")  # the same run by another start
    assert describe_changes(settings(config, "/a/run"), settings(moved | {"lr": 0.2}, "b")).endswith("lr was 0.1 and is 0.2")
    began = {"model.policy.lora.init": "nano-recover", "lr": "1"}
    assert describe_changes(began, began | {"model.policy.lora.init": "null"}) == ""  # it had its effect when the run began


class Keeps(L.Callback):
    """A user's callback with a state of NumPy's."""

    def __init__(self, double: bool) -> None:
        self.best: Any = np.float64(0.1) if double else np.float32(0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"score": [self.best]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], str]) -> Path:
    """The folder of a finished run on a base called `m1`, beside it."""
    base = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_model("qwen3"), base / "m1")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(base)
        assert Run(base, "m1", None)("--trainer.callbacks+=tests.files.test_continuation.Keeps", "--trainer.callbacks.double=true") == 0
    return base


@pytest.fixture
def run(finished: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of it, to go on with."""
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copytree(finished / "m1", tmp_path / "m1")
    monkeypatch.chdir(tmp_path)
    return Run(tmp_path, "m1", capsys)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--seed_everything=1", "seed was 0 and is 1"),
        ("--data.group_size=3", "group_size was 2 and is 3"),
        ("--data.batch_tasks=1", "batch_tasks was 2 and is 1"),
        ("--data.env_kwargs.max_turns=3", r"env_kwargs\.max_turns was 2 and is 3"),
        ("--model.policy.chat_template=other.jinja", r"policy\.chat_template"),
        ("--data.env_kwargs.splits={train: {short: 4}, test: {short: 2}}", "tasks was 2 with .* and is 4 with"),
    ],
)
def test_a_run_goes_on_with_its_episodes(run: Run, flag: str, said: str) -> None:
    before = run.files()
    Path("other.jinja").write_text("{# the same, said otherwise #}" + TEMPLATE, encoding="utf-8")
    line = run.refuses("--ckpt_path", "last", "--trainer.max_epochs=2", flag)
    assert re.search(said, line), line
    assert run.files() == before


def test_other_settings_are_printed(run: Run, tmp_path: Path) -> None:
    """And a base that was moved is the same base; only what changed is said."""
    shutil.move(tmp_path / "m1", tmp_path / "elsewhere")
    flags = ["--trainer.max_epochs=2", "--model.optimizer.lr=0.1", "--model.policy.model=./elsewhere"]
    assert run("--ckpt_path", "last", *flags) == 0
    (said,) = [x for x in run.out.splitlines() if "going on with other settings" in x]
    for change in ("trainer.max_epochs was 1 and is 2", "optimizer.lr was 0.0004 and is 0.1", 'policy.model was "m1" and is "./elsewhere"'):
        assert change in said, said
    assert run("--ckpt_path", "last", *flags) == 0 and "other settings" not in run.out


def test_other_weights_under_the_same_name_are_refused(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "m1" / "model.safetensors"
    save_file({k: t + 1 for k, t in load_file(file).items()}, file, {"format": "pt"})
    before = run.files()
    for command, flags in (("fit", ["--trainer.max_epochs=2"]), ("validate", []), ("export", [f"--out={tmp_path / 'out'}"]), ("play", [])):
        line = run.refuses("--ckpt_path", "last", *flags, command=command)
        assert "ckpt_path" in line and "policy.model" in line, (command, line)
    assert run.files() == before and not (tmp_path / "out").exists()


class OtherData(RolloutData):
    """A user's own class, whose state is not under the name of the one that the run began with."""


def test_another_data_class_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run.files()
    monkeypatch.setattr(cli_configured, "EXPERIMENT", (SkillSD, OtherData))
    line = run.refuses("--ckpt_path", "last", "--trainer.max_epochs=2")
    assert "ckpt_path" in line and "OtherData" in line and "RolloutData" in line and run.files() == before


def test_every_command_takes_the_checkpoint_with_the_highest_step(run: Run, tmp_path: Path) -> None:
    """Not the one that was touched last."""
    assert run("--ckpt_path", "last", "--trainer.max_epochs=2") == 0
    folder = run.folder / "checkpoints"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2
    (folder / "previous.ckpt").touch()
    assert run("--ckpt_path", "last", f"--out={tmp_path / 'out'}", command="export") == 0
    assert "for 2 iterations" in (tmp_path / "out" / "README.md").read_text()


def test_a_callback_whose_state_could_not_be_read_back(run: Run, tmp_path: Path) -> None:
    checkpoint = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["Keeps"] == {"score": [0.1]}
    run.folder = tmp_path / "new"
    line = run.refuses("--trainer.callbacks+=tests.files.test_continuation.Keeps", "--trainer.callbacks.double=false")
    assert "Keeps" in line and "score.0" in line and "float32" in line
    assert not list(run.folder.rglob("*.ckpt*"))
