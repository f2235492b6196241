"""On a GPU: a whole fit in nf4 with the kernels, the same killed and continued, and its export. `make gpu-check` runs this."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.e2e.runs import VARIANTS, Fresh, Run, close_on_a_gpu, nf4_policy, overlay
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from skillsd.files.checkpoint import read_checkpoint
from skillsd.policy import LoraSettings, Policy, PolicySettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("gpu")
    run = Run(folder / "whole", Fresh(), overlay(folder / "overlay.yaml", **VARIANTS["ema"], policy=nf4_policy(folder / "qwen3")))
    run.fit()
    return run


def test_a_fit_trains_and_the_kernels_agree(whole: Run) -> None:
    """It trains, and what the kernels recorded is what the learner computes, up to bfloat16."""
    rows = whole.rows()
    assert len(rows) == 9 and all(math.isfinite(float(row["loss/total"])) for row in rows)
    assert any(float(row["grad_norm/total"]) > 0 for row in rows) and max(float(row["policy/logp_drift"]) for row in rows) < 0.1
    text = whole.log.read_text()
    assert "rollout.kernels" not in text, "the log says why the kernels stand aside"


def test_a_killed_run_goes_on(whole: Run, tmp_path: Path) -> None:
    """In an update, in a rollout, and with the log ahead of the checkpoint."""
    killed = Run(tmp_path / "killed", Fresh(), whole.overlay)
    for where, calls, after in (
        ("skillsd.learner:Learner._step", 2, True),
        ("skillsd.engines.in_process:InProcessSession.step", 6, True),
        ("skillsd.callbacks.log:RunLog.on_train_batch_end", 2, True),
    ):
        killed.kill(where, calls, after)
    killed.resume()
    close_on_a_gpu(killed.record(), whole.record())


def test_the_exported_adapter_is_the_run_s(whole: Run) -> None:
    """PEFT makes of the base as its users load it, and of the adapter, what the run had."""
    model = str(whole.overlay.with_name("qwen3"))
    ours = Policy(PolicySettings(model=model, quantise="nf4", lora=LoraSettings(r=4, alpha=8)), "cuda")
    ours.load_adapter_state(read_checkpoint(whole.folder / "checkpoints" / "last.ckpt")["state_dict"])
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": 0})
    ids = torch.arange(5, 29, device="cuda")[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits.float()
        got = PeftModel.from_pretrained(base, whole.folder / "adapter" / "student")(input_ids=ids).logits.float()
        with ours.acting("student"):
            want = ours.base(input_ids=ids).logits.float()
    off, effect = (float((got - x).abs().max()) for x in (want, plain))
    assert off <= 0.02 * float(want.abs().max()) and off < effect / 2, f"off by {off}, the adapter's effect is {effect}"
