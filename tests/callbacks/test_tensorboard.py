"""What TensorBoard shows, piece by piece; tests/e2e/test_tensorboard.py reads it back from runs."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from skillsd.callbacks import tensorboard
from skillsd.skills import Skill, SkillBank
from skillsd.trajectory import Trajectory, Turn

HOSTILE = "a|b\n|---|\n<script>alert(1)</script> **x** [l](javascript:1) `c` &lt; \\| $é"


def test_the_strip_keeps_every_picture():
    pictures = [np.full((4 + i % 2, 6, 3), 10 + i, np.uint8) for i in range(tensorboard.ACROSS + 3)]
    sheet = tensorboard.strip(pictures)
    assert sheet.shape == (2 * 5 + tensorboard.GAP, tensorboard.ACROSS * (6 + tensorboard.GAP) - tensorboard.GAP, 3)
    for i, picture in enumerate(pictures):
        y, x = i // tensorboard.ACROSS * (5 + tensorboard.GAP), i % tensorboard.ACROSS * (6 + tensorboard.GAP)
        assert np.array_equal(sheet[y : y + picture.shape[0], x : x + 6], picture)
    assert (sheet == 255).sum() == sheet.size - sum(p.size for p in pictures)
    assert np.array_equal(tensorboard.strip(pictures[:1]), pictures[0])


def cells(table):
    """The rows of a table as TensorBoard shows it."""
    html = markdown_to_safe_html(table)
    assert "<script" not in html and "<a " not in html and "<strong>" not in html and "<code>" not in html
    return [[unescape(c) for c in re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)] for row in re.findall(r"<tr>(.*?)</tr>", html, re.S)][1:]


def test_the_table_of_skills(monkeypatch):
    with SkillBank() as bank:
        assert tensorboard.skill_table(bank) == ""
        ids = [bank.insert([Skill("good", "bad", f"up {i}", f"task-{i}", source_reward=i / 100)], 0)[0] for i in range(25)]
        (odd,) = bank.insert([Skill("good", "bad", HOSTILE, HOSTILE[:9])], 0)
        (long,) = bank.insert([Skill("good", "bad", "word " * 1000, "z")], 0)
        for skill_id, uses in ((odd, 3), (long, 2), (ids[24], 1)):
            for _ in range(uses):
                bank.record_use(skill_id, 1, reward=0.5)
        rows = cells(tensorboard.skill_table(bank))
        assert [int(r[0]) for r in rows] == [odd, long, ids[24], *ids[: tensorboard.ROWS - 3]]  # by uses, then by id
        assert rows[0][1:] == [" ".join(HOSTILE[:9].split()), "3", "0.000", " ".join(HOSTILE.split())]
        assert rows[1][4] == ("word " * 1000)[: tensorboard.CHARS] + "..."
        assert rows[2][1:] == ["task-24", "1", f"{bank.get(ids[24]).mean_reward:.3f}", "up 24"] and rows[2][3] == "0.240"
        assert tensorboard.skill_table(bank).startswith("20 of 27 skills\n")
        monkeypatch.setattr(tensorboard, "READ", 22)  # a bank of millions would take minutes; "z" comes last
        bounded = tensorboard.skill_table(bank)
        assert bounded.startswith("20 of 27 skills, the most used of 22\n") and long not in [int(r[0]) for r in cells(bounded)]


def test_an_episode_is_code_whatever_it_holds():
    turns = (Turn("# board\r<b>x</b>\x1b[2J", "go\n\n# up", 0.0), Turn("last", "", 1.0))
    t = Trajectory(0, "t<i>", 1, 0, "", (), (), (), (), turns, 1.0, 0.5, False, "failed", failure="raised: x", final_observation="# won")
    text = tensorboard.episode(t)
    assert text.startswith(
        "task t&#60;i&#62;, member 1: failed &#40;raised&#58; x&#41;, completion 0.50\n\n    # board\\r<b>x</b>\\x1b[2J\n    > go\n    \n"
    )
    html = markdown_to_safe_html(text)
    assert html.count("<pre>") == 1 and "<h1" not in html and "<b>" not in html and "# up" in html and "# won" in html


def test_a_failure_is_no_markdown():
    failed = "raised: ValueError: ![p](http://evil/p.png) [click](http://evil)"
    t = Trajectory(0, failed, 0, 0, "", (), (), (), (), (), 0.0, 0.0, False, "failed", failure=failed)
    html = markdown_to_safe_html(tensorboard.episode(t))
    assert "<img" not in html and "<a " not in html and unescape(html).count(failed) == 2


def test_histograms_of_finite_numbers():
    parts = [(torch.tensor([1.0, float("nan")]), torch.tensor([0.5])), (torch.tensor([2.0]), torch.tensor([float("inf"), -0.5]))]
    found = dict(tensorboard.token_histograms(parts))
    assert {k: v.tolist() for k, v in found.items()} == {"tokens/gap": [1.0, 2.0], "tokens/log_rho": [0.5, -0.5]}
    assert dict(tensorboard.token_histograms([])) == {} == dict(tensorboard.token_histograms([(torch.zeros(0), torch.zeros(0))]))
    assert list(dict(tensorboard.token_histograms([(torch.zeros(0), torch.ones(1))]))) == ["tokens/log_rho"]


def test_hyperparameters_are_columns():
    loss = {"class_path": "S", "init_args": {"form": "k3"}}
    trainer = {"default_root_dir": "/x", "logger": {"class_path": "T", "init_args": {"name": "/x"}}, "callbacks": [{"class_path": "A"}]}
    model = {"loss": loss, "gate": None, "lr": 0.5}
    data = {"lengths": [3, 6], "on": True, "empty": []}
    config = {"seed_everything": 1, "ckpt_path": "last", "config": ["x"], "trainer": trainer, "model": model, "data": data}
    assert tensorboard.hyperparameters(config) == {
        "seed_everything": 1,
        "trainer.callbacks.0": "A",
        "model.loss": "S",
        "model.loss.init_args.form": "k3",
        "model.gate": "null",
        "model.lr": 0.5,
        "data.lengths": "[3, 6]",
        "data.on": "true",
        "data.empty": "[]",
    }


def test_a_resumed_run_has_no_step_twice(tmp_path):
    """Scalars, histograms, images and texts that were written after the checkpoint are taken back; what is damaged is left alone."""

    def begin(steps: range, cut: int | None = None) -> None:
        logger = TensorBoardLogger(tmp_path, name="", version="")
        w = logger.experiment
        if cut is not None:
            tensorboard.cut_back(logger, cut)
        for i in steps:
            logger.log_metrics({"loss": float(100 * len(steps) + i)}, i)
            w.add_histogram("h", np.arange(3.0), i)
            w.add_image("p", np.zeros((2, 2, 3), np.uint8), i, dataformats="HWC")
            w.add_text("t", str(i), i)
        w.close()

    begin(range(5))
    (first,) = tmp_path.glob("events*")
    whole = first.read_bytes()
    first.write_bytes(whole[:-3])  # as a kill leaves it
    other = tmp_path / "events.out.tfevents.0.other"
    other.write_bytes(bytes(range(64, 190)))
    begin(range(3, 7), cut=3)
    assert other.read_bytes() == bytes(range(64, 190))
    other.unlink()
    events = EventAccumulator(str(tmp_path), dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)).Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(7))
    assert [e.value for e in events.Scalars("loss")] == [500.0, 501.0, 502.0, 403.0, 404.0, 405.0, 406.0]
    assert [e.step for e in events.Histograms("h")] == [e.step for e in events.Images("p")] == list(range(7))
    assert [e.step for e in events.Tensors("t/text_summary")] == list(range(7))
