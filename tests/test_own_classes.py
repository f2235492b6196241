"""For a class of the user's that does not fit its key the error says what it lacks; one that fits is taken, whatever its annotations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import skillsd
from skillsd import cli
from skillsd.class_paths import KEYS
from skillsd.errors import ConfigError
from skillsd.skills.callback import SkillBankCallback

SOURCE = """
from skillsd import Gate, Signal, Summariser, SynchronousSummariser

class Bare:
    asynchronous = False
    def summarise(self, trajectories): return []
    def submit(self, iteration, trajectories): pass
    def collect(self): return []

class Renamed(Bare):
    def submit(self, number, trajectories): pass
    def drain(self): pass
    def close(self): pass

class Whole(Renamed):
    def summarise(self, trajectories: list) -> list: return []
    def submit(self, iteration: int, trajectories: tuple): pass

class FromProtocol(Summariser):
    asynchronous = False
    def summarise(self, trajectories): return []

class Half(SynchronousSummariser):
    pass

class Unrelated:
    pass

def function():
    pass
"""
REFUSED = {
    "skills.summariser=own_classes.Bare": ["skills.summariser", "lacks close and drain", "skillsd.skills.SynchronousSummariser"],
    "skills.summariser=own_classes.Renamed": ["skills.summariser", "own_classes.Renamed.submit", "number", "iteration"],
    "skills.summariser=own_classes.Half": ["skills.summariser", "own_classes.Half lacks summarise"],
    "skills.summariser=own_classes.function": ["skills.summariser", "own_classes.function"],
    "skills.summariser=absent.X": ["skills.summariser", "absent", "PYTHONPATH"],
    "skills.context=own_classes.Unrelated": ["skills.context", "lacks __call__", "skillsd.skills.GroupContext"],
    "model.objective.loss=own_classes.Unrelated": ["model.objective.loss", "skillsd.objective.Signal"],
    "model.objective.gate=own_classes.Unrelated": ["model.objective.gate", "skillsd.objective.Gate"],
    "trainer.callbacks+=own_classes.Unrelated": ["trainer.callbacks", "lightning.pytorch.Callback"],
    "trainer.logger=own_classes.Unrelated": ["trainer.logger", "lightning.pytorch.loggers.Logger"],
}  # fmt: skip


@pytest.fixture
def own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_classes.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_classes", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("named", ["skills.summariser=lies_here.Whole", "model.objective.gate=lies_here.OwnGate"])
def test_the_present_folder_is_importable(tmp_path, monkeypatch, capsys, named):
    (tmp_path / "lies_here.py").write_text(
        SOURCE + "from skillsd import Gate\nclass OwnGate(Gate):\n    def __call__(self, t):\n        return t.gap\n"
    )
    (tmp_path / "lightning.py").write_text("raise SystemExit('a file here has taken the place of a package')")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "-c", "sokoban", f"--{named}", "--print_config"])
    assert stop.value.code == 0 and named.partition("=")[2] in capsys.readouterr().out
    assert sys.path == before
    sys.modules.pop("lies_here")


@pytest.mark.parametrize("flag", REFUSED)
def test_what_a_class_lacks_is_said(own_classes: None, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert cli.main(["fit", "-c", "sokoban", f"--{flag}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and all(part in err for part in REFUSED[flag]), err


def test_a_gate_of_another_shape_is_the_user_s(tmp_path, monkeypatch, capsys):
    (tmp_path / "wrong_gate.py").write_text(
        "import torch, skillsd\nclass Three(skillsd.Gate):\n    def __call__(self, t):\n        return torch.ones(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = [
        "--model.objective.gate=wrong_gate.Three",
        "--data.env_kwargs.splits.train.short=1",
        "--skills.context=skillsd.skills.HindsightContext",
    ]
    small = ["--panel.enabled=false", "--trainer.max_steps=1", "--trainer.default_root_dir=run"]
    assert cli.main(["fit", "-c", "sokoban", *flags, *small]) == 2
    err = capsys.readouterr().err
    assert "error: model.objective: Three gave [3]" in err and "Traceback" not in err
    sys.modules.pop("wrong_gate")


def test_a_summariser_s_own_init_need_not_call_the_base_s():
    class Own(skillsd.SynchronousSummariser):
        def __init__(self, word: str) -> None:
            self.word = word

        def summarise(self, trajectories):
            return [None for _ in trajectories]

    summariser = Own("x")
    summariser.submit(3, [])
    assert [f.iteration for f in summariser.collect()] == [3] and summariser.word == "x"


def test_annotations_are_not_compared(own_classes: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "-c", "sokoban", "--skills.summariser=own_classes.Whole", "--print_config"])
    assert stop.value.code == 0 and "class_path: own_classes.Whole" in capsys.readouterr().out


def test_a_method_of_the_protocol_itself_does_nothing(own_classes: None) -> None:
    import own_classes as module  # type: ignore[import-not-found]

    with pytest.raises(ConfigError, match=r"skills\.summariser: FromProtocol lacks close and collect and drain and submit"):
        SkillBankCallback(module.FromProtocol())
    whole: Any = module.Whole()
    assert SkillBankCallback(whole).selection.summariser is whole


def test_base_classes_are_where_one_looks() -> None:
    for name in ("Callback", "Gate", "GroupContext", "PrivilegedContext", "Signal", "Summariser", "SynchronousSummariser", "Tokens"):
        assert getattr(skillsd, name).__name__ == name
    for key in KEYS:  # every base of skillsd's own is exported by the package that its path names
        for base in key.bases:
            module, _, name = base.rpartition(".")
            if module.startswith("skillsd"):
                assert name in sys.modules[module].__all__
    with pytest.raises(AttributeError):
        _ = skillsd.nosuch
