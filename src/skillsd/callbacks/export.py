"""The student as a PEFT folder that PeftModel.from_pretrained loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from skillsd import parallel
from skillsd.files.durable import sealed_folder
from skillsd.files.run_folder import ADAPTER, ADAPTER_KIND
from skillsd.words import count

CARD = """---
library_name: peft
base_model: {base}
tags: [lora, skillsd]
---
# A student trained with skillsd

LoRA adapter (rank {r}, alpha {alpha}, {targets}) on `{base}`, trained by skillsd {version} for {steps}. Load it with

    from peft import PeftModel
    model = PeftModel.from_pretrained(base_model, "this folder")

where the base model is the one whose weights have the digest {digest} (base.json), under whatever name.

Give it the plain task prompt, without a skill, unless its run let it act with one (`data.actor`). The base model's licence
applies to what is built on it.
"""


def export_adapter(policy: Any, folder: Path, steps: int, key: str = "trainer.default_root_dir") -> Path:
    """Write the student to `folder` (weights, configuration, model card, checksums), also in place of an earlier export that nobody has
    changed since.

    Args:
        policy: Whose student.
        folder: Where to; its parent must be there.
        steps: Iterations, for the model card.
        key: What named the folder, for messages.

    Raises:
        ConfigError: Something else is there.
    """
    from skillsd import __version__

    lora = policy.settings.lora
    card = CARD.format(
        base=policy.settings.model, digest=policy.digest, r=lora.r, alpha=lora.alpha, targets=lora.targets, version=__version__,
        steps=count(steps, "iteration"),
    )  # fmt: skip
    with sealed_folder(folder, key, ADAPTER_KIND) as work:
        policy.save_student(work)
        (work / "README.md").write_text(card, encoding="utf-8")
    return folder


class AdapterExport(L.Callback):
    """Writes adapter/student in the run folder when training ends.

    Args:
        enabled: false leaves the callback out of the run.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if parallel.is_rank_zero():
            folder = Path(trainer.default_root_dir) / ADAPTER
            folder.mkdir(parents=True, exist_ok=True)
            export_adapter(pl_module.policy, folder / "student", trainer.global_step)
