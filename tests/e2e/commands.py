"""Whole commands in this process, on tiny boards with the shipped agent; and what they leave, read back."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from skillsd import cli
from skillsd.trajectory import Trajectory


def boards(train: int, test: int, lengths: tuple[int, int] = (3, 6), boxes: int = 1, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of a Sokoban with so many tasks of each split, solved in `lengths` moves."""
    return {
        "size": 6, "boxes": boxes, "difficulties": {"short": {"lengths": list(lengths)}},
        "splits": {"train": {"short": train}, "test": {"short": test}},
        "max_turns": 6, "action_format": "bare", "prompts": {"instruction": ""}, **changes,
    }  # fmt: skip


TINY: dict[str, Any] = {
    "trainer": {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu"},
    "model": {
            "policy": {"model": "nano", "lora": {"r": 4, "alpha": 8, "init": None}},
            "optimizer": {"lr": 5e-3, "warmup_steps": 0},
            "objective": {"distillation_weight": 0.01},
            "grad_norm_every": 2,
        },
    "data": {
            "env_kwargs": boards(5, 4), "batch_tasks": 3, "group_size": 3, "rollout": {"max_rows": 16},
        },
}  # fmt: skip


def command(name: str, folder: Path, *flags: str) -> int:
    overlay = folder.with_suffix(".yaml")
    overlay.write_text(yaml.safe_dump(TINY))
    return cli.main([name, "-c", "sokoban", "-c", "method/skillsd", "-c", str(overlay), f"--trainer.default_root_dir={folder}", *flags])


def panel(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "panel.json").read_text()))


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with (folder / "metrics.csv").open() as f:
        return list(csv.DictReader(f))


def unchanged(folder: Path) -> dict[Path, bytes]:
    """The files that playing nothing more leaves as they are: all but TensorBoard's and config.yaml."""
    paths = (p for p in folder.rglob("*") if p.is_file() and "tensorboard" not in p.parts and p.name != "config.yaml")
    return {p: p.read_bytes() for p in paths}


def trajectories(folder: Path) -> list[Trajectory]:
    return [Trajectory.from_json(line) for line in (folder / "trajectories.jsonl").read_text().splitlines()]
