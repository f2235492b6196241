"""Behaviour cloning of demonstrations: makes the nano agent from nothing, or warms up a hub model with LoRA."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from skillsd.engines.in_process import InProcessEngine
from skillsd.errors import ConfigError
from skillsd.files.durable import sealed_folder
from skillsd.files.run_folder import ADAPTER, ADAPTER_KIND, MODEL, MODEL_KIND
from skillsd.policy import Policy, PolicySettings
from skillsd.pretrain.demonstrations import Demonstrations, DemonstrationSettings, collate
from skillsd.rollout import Chat, Collector, Episode, RolloutSettings
from skillsd.skills import RulesSummariser
from skillsd.statistics import wilson_interval


class Cloning(L.LightningModule):
    """Cross-entropy on the labels of demonstrations.

    Args:
        policy: The model. `nano-untrained` is the nano agent before its first step.
        train: `full` trains every weight and writes a model folder, `lora` the student adapter and writes a PEFT folder.
        lr: Peak learning rate of AdamW, with linear warm-up and a cosine to 0.
        warmup_steps: Steps of the warm-up.
        weight_decay: AdamW's.
        gradient_clip_norm: Largest gradient norm.
        bf16: Autocast to bfloat16 on a GPU.
        rollout: Limits of the validation episodes.
    """

    def __init__(
        self, policy: PolicySettings, train: str = "full", lr: float = 1e-3, warmup_steps: int = 100, weight_decay: float = 0.01,
        gradient_clip_norm: float = 1.0, bf16: bool = True, rollout: RolloutSettings | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if train not in ("full", "lora"):
            raise ConfigError(f"model.train is {train}: give full or lora.")
        if policy.shard:
            raise ConfigError("model.policy.shard: cloning takes the base whole: set it to false.")
        if train == "full" and policy.quantise != "none":
            raise ConfigError("model.train: full needs model.policy.quantise: none; train a quantised base with lora.")
        self.settings, self.train_what, self.lr, self.warmup_steps, self.weight_decay = policy, train, lr, warmup_steps, weight_decay
        self.gradient_clip_norm, self.bf16, self.rollout = gradient_clip_norm, bf16, rollout or RolloutSettings()
        self.policy: Policy = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = Policy(self.settings, self.device, adapters=self.train_what == "lora")
            if self.train_what == "full":
                self.policy.base.requires_grad_(True)
                self.policy.base.float()

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.98))
        steps = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            return min((step + 1) / max(1, self.warmup_steps), 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"},
        }

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        ids, labels = batch
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16 and ids.device.type == "cuda"):
            hidden = self.policy.backbone(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            rows, cols = (labels[:, 1:] >= 0).nonzero(as_tuple=True)
            logits = self.policy.head(hidden[rows, cols])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[rows, cols + 1])
        self.log("loss/cloning", loss, prog_bar=True)
        self.log("tokens", float(ids.numel()), on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return tuple(x.to(device) for x in batch) if isinstance(batch[0], Tensor) else batch  # episodes to play stay where they are

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.gradient_clip_norm)

    def validation_step(self, batch: tuple[str, list[Episode]], batch_idx: int) -> None:
        """Plays the held-out levels greedily: plain, with their own skill in front, with another level's."""
        name, rows = batch
        data: DemonstrationData = self.trainer.datamodule  # type: ignore[attr-defined]
        chat = Chat(self.policy.tokenizer, self.policy.stop_ids)
        collector = Collector(
            data.env_id, data.panel_env_kwargs, chat, InProcessEngine(self.policy), self.rollout, self.policy.context_length
        )
        played = collector.collect(rows, seed=0, iteration=0, temperature=0.0, adapter="student")
        wins = sum(t.success for t in played)
        low, high = wilson_interval(wins, len(played))
        self.print(f"\npanel {name:8s} success {wins / len(played):.3f} [{low:.3f}, {high:.3f}] of {len(played)}")
        self.log(f"panel/{name}/success", wins / len(played), batch_size=1, on_epoch=True, on_step=False)
        self.log(f"panel/{name}/completion", sum(t.completion for t in played) / len(played), batch_size=1, on_epoch=True, on_step=False)

    def on_fit_start(self) -> None:
        if self.trainer.world_size > 1:
            raise ConfigError("trainer.devices: pre-training runs on one: set it to 1 and trainer.num_nodes to 1.")

    def on_train_end(self) -> None:
        folder = Path(self.trainer.default_root_dir)
        key = "trainer.default_root_dir"
        if self.train_what == "lora":
            (folder / ADAPTER).mkdir(parents=True, exist_ok=True)
            with sealed_folder(folder / ADAPTER / "student", key, ADAPTER_KIND) as work:
                self.policy.save_student(work)
            self.print(f"adapter: {folder / ADAPTER / 'student'}")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with sealed_folder(folder / MODEL, key, MODEL_KIND) as work:
                self.policy.base.save_pretrained(work)
                self.policy.tokenizer.save_pretrained(work)
            self.print(f"model: {folder / MODEL}")


class DemonstrationData(L.LightningDataModule):
    """Streams demonstrations and, for validation, the panel in three ways.

    Args:
        env: Gymnasium id, `module:Id-v0`; it must offer `solution()`, `actions` and `stream(split, index)`.
        env_kwargs: Its keyword arguments.
        rules: Makes the skills; training must use the same texts.
        template: Wrapper of a skill in front of the prompt; training must use the same.
        demonstrations: Which episodes.
        batch_size: Episodes a step.
        num_workers: Processes that make episodes.
        panel_split: Split of the panel.
        panel_env_kwargs: Keyword arguments that differ when the panel is played, such as its horizon.
        seed: Run seed (linked to `seed_everything`): of the levels' order and the noise.
    """

    def __init__(
        self, env: str, env_kwargs: dict[str, Any], rules: RulesSummariser, template: str,
        demonstrations: DemonstrationSettings | None = None, batch_size: int = 256, num_workers: int = 0, panel_split: str = "test",
        panel_env_kwargs: dict[str, Any] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.env_id, self.env_kwargs, self.rules, self.template = env, env_kwargs, rules, template
        self.demonstrations, self.batch_size, self.num_workers = demonstrations or DemonstrationSettings(), batch_size, num_workers
        self.panel_split, self.panel_env_kwargs, self.seed = panel_split, env_kwargs | (panel_env_kwargs or {}), seed

    def _set(self) -> Demonstrations:
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        policy: Policy = module.policy
        chat = Chat(policy.tokenizer, policy.stop_ids)
        return Demonstrations(self.env_id, self.env_kwargs, chat, self.rules, self.template, self.demonstrations, self.seed)

    def train_dataloader(self) -> DataLoader[tuple[list[int], list[int]]]:
        return DataLoader(
            self._set(), self.batch_size, num_workers=self.num_workers, collate_fn=collate, drop_last=True,
            prefetch_factor=4 if self.num_workers else None,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader[tuple[str, list[Episode]]]:
        shown = self._set()
        shown.env_kwargs = self.panel_env_kwargs
        tasks = shown.env.tasks(self.panel_split, "panel_split")
        skills = [shown.skill(t, 0.0, random.Random(0)) for t in tasks]
        ways = {"plain": [""] * len(tasks), "own": skills, "shuffled": skills[1:] + skills[:1]}
        batches = [(name, [Episode(t, 0, s) for t, s in zip(tasks, texts, strict=True)]) for name, texts in ways.items()]
        return DataLoader(batches, batch_size=None, collate_fn=lambda x: x)  # type: ignore[arg-type]
