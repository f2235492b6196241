"""Cloning: a tiny model learns two episodes by heart, and what it writes can be loaded."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from tests import sokoban
from tests.sokoban import ENV, rules
from tests.tolerance import close
from tests.training import quiet_trainer

from skillsd.errors import ConfigError
from skillsd.policy import LoraSettings, Policy, PolicySettings
from skillsd.pretrain import Cloning, DemonstrationData, DemonstrationSettings
from skillsd.rollout import RolloutSettings

KWARGS = sokoban.KWARGS | {
    "difficulties": {"short": {"lengths": [3, 5]}}, "splits": {"pretrain": {"short": 1}, "test": {"short": 3}}, "max_turns": 6,
}  # fmt: skip


def make_data(**settings: Any) -> DemonstrationData:
    shown = DemonstrationSettings(episodes=2, noise=0.0)
    return DemonstrationData(
        ENV, KWARGS, rules(), "{success_analysis} {mistake_analysis} : {golden_workflow}\n",
        **({"demonstrations": shown, "batch_size": 2} | settings),
    )  # fmt: skip


class Losses(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def fit(module: Cloning, data: DemonstrationData, folder: Any, epochs: int, **kwargs: Any) -> tuple[L.Trainer, list[float]]:
    losses = Losses()
    trainer = quiet_trainer(losses, max_epochs=epochs, num_sanity_val_steps=0, default_root_dir=folder, **kwargs)
    torch.manual_seed(0)
    trainer.fit(module, datamodule=data)
    return trainer, losses.seen


def test_two_episodes_by_heart(tiny_model, tmp_path, capsys):
    settings = PolicySettings(model=tiny_model("qwen3"))
    module = Cloning(settings, lr=1e-2, warmup_steps=3, weight_decay=0.0, rollout=RolloutSettings(max_turn_tokens=2))
    data = make_data()
    trainer, losses = fit(module, data, tmp_path, 40, limit_val_batches=1.0, check_val_every_n_epoch=1000)
    assert losses[0] > 2 and losses[-1] < 0.05
    # The same weights come back from the folder it wrote, as a model to start from.
    again = Policy(PolicySettings(model=str(tmp_path / "model")))
    ids, _ = next(iter(data.train_dataloader()))
    with torch.no_grad():
        close(again.base(ids).logits, module.policy.base(ids).logits)
    assert again.tokenizer.chat_template == module.policy.tokenizer.chat_template
    assert f"model: {tmp_path}/model" in capsys.readouterr().out

    (scores,) = trainer.validate(module, datamodule=data, verbose=False)  # the panel in three ways
    assert set(scores) == {f"panel/{way}/{what}" for way in ("plain", "own", "shuffled") for what in ("success", "completion")}
    assert "of 3" in capsys.readouterr().out


def test_the_three_ways_of_the_panel(tiny_model, tmp_path):
    data = make_data()
    module = Cloning(PolicySettings(model=tiny_model("qwen3")), rollout=RolloutSettings(max_turn_tokens=2))
    fit(module, data, tmp_path, 1)
    rows = dict(data.val_dataloader())
    assert [r.task.task_id for r in rows["plain"]] == [f"test-{i:04d}" for i in range(3)] and {r.skill for r in rows["plain"]} == {""}
    own, other = ([r.skill for r in rows[way]] for way in ("own", "shuffled"))
    assert other == own[1:] + own[:1] and all(s.startswith("solved none : ") for s in own)


def test_lora_writes_an_adapter_to_start_from(tiny_model, tmp_path):
    lora = {"r": 4, "alpha": 8}
    module = Cloning(PolicySettings(model=tiny_model("llama"), lora=LoraSettings(**lora)), train="lora", lr=1e-2, warmup_steps=1)
    before = None

    class Base(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            nonlocal before
            before = {k: p.clone() for k, p in pl_module.policy.named_parameters() if "lora_" not in k}

    data = make_data(demonstrations=DemonstrationSettings(episodes=2, skill_share=1.0))
    losses = Losses()
    trainer = quiet_trainer(losses, Base(), max_epochs=6, default_root_dir=tmp_path)
    trainer.fit(module, datamodule=data)
    assert losses.seen[-1] < losses.seen[0]
    after = dict(module.policy.named_parameters())
    assert before and all(torch.equal(p, after[k]) for k, p in before.items())  # the base is untouched

    folder = str(tmp_path / "adapter" / "student")
    warm = Policy(PolicySettings(model=tiny_model("llama"), lora=LoraSettings(**lora, init=folder)))
    for name in ("student", "teacher"):
        for k, p in module.policy.adapter("student").items():
            assert torch.equal(warm.adapter(name)[k], p), (name, k)
    assert warm.teacher_is_student and any(p.abs().sum() > 0 for k, p in warm.adapter("student").items() if "lora_B" in k)


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"model\.train is half"):
        Cloning(PolicySettings(), train="half")
    with pytest.raises(ConfigError, match=r"policy\.quantise"):
        Cloning(PolicySettings(quantise="nf4"), train="full")
