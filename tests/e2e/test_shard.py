"""A fit on a base that is split over two ranks: the run is that of one rank with the whole base."""

import lightning as L
import pytest
import torch
from tests.e2e.commands import boards, metrics
from tests.ranks import Ranks, torchrun
from tests.tolerance import ROUNDING

from skillsd.callbacks import Panel, RunCheckpoint, RunLog, TeacherSync
from skillsd.data import RolloutData
from skillsd.files.checkpoint import read_checkpoint
from skillsd.module import SkillSD
from skillsd.objective import Objective
from skillsd.optimizer import OptimizerSettings
from skillsd.policy import LoraSettings, PolicySettings
from skillsd.rollout import RolloutSettings
from skillsd.skills import BaseSummariser
from skillsd.skills.callback import SkillBankCallback

LEVELS = boards(6, 3, lengths=(4, 8), boxes=3, max_turns=5)


def work(folder, ranks, steps, ckpt_path):
    """One task an iteration, whose three rows one rank plays and summarises, and two of which it trains on, one by one."""
    policy = PolicySettings(lora=LoraSettings(init="nano-recover"), shard=ranks > 1)
    optimizer = OptimizerSettings(lr=1e-2)
    module = SkillSD(policy, Objective(distillation_weight=0.5), optimizer, micro_batch_tokens=1, grad_norm_every=1)
    rollout = RolloutSettings(max_turn_tokens=1)
    data = RolloutData("skillsd_sokoban:skillsd/Sokoban-v0", LEVELS, batch_tasks=1, group_size=3, rollout=rollout)
    bank = SkillBankCallback(BaseSummariser(max_new_tokens=2))
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=ranks, strategy="ddp", max_epochs=1, max_steps=steps, logger=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[TeacherSync("ema"), bank, RunLog(), Panel(), RunCheckpoint()],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)


@pytest.fixture
def fit(tmp_path):
    """In processes of their own, which have none of this one's threads and locks."""
    server = Ranks(tmp_path)

    def fitted(folder, ranks, steps, ckpt_path=None):
        server.run("tests.e2e.test_shard:work", str(folder), ranks, steps, ckpt_path, environments=torchrun(ranks))
        rows = [{k: float(v) for k, v in row.items() if v and not k.startswith(("time/", "memory/"))} for row in metrics(folder)]
        return rows, read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]

    yield fitted
    server.close()


def test_two_ranks_with_half_the_base_each_are_one_with_all_of_it(fit, tmp_path):
    """Then each goes on where the other was."""
    short = {n: fit(tmp_path / str(n), n, 1) for n in (1, 2)}
    long = {n: fit(tmp_path / str(n), 3 - n, 2, "last") for n in (1, 2)}
    for (rows, state), (wanted, of_one) in ((short[2], short[1]), (long[2], long[1])):
        assert rows[-1]["grad_norm/total"] > 1e-3 and rows[-1]["skills/failed"] == 3 * len(rows)
        assert len(rows) == 1 or rows[1]["grad_norm/distillation"] > 1e-6
        for row, want in zip(rows, wanted, strict=True):
            assert row == pytest.approx(want, rel=1e-4, abs=ROUNDING)
        for k, v in state.items():
            torch.testing.assert_close(v, of_one[k], atol=1e-4, rtol=1e-3)
