"""The panel: a fixed list of held-out tasks, played before and after training, with intervals."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.progress import Progress

from skillsd import parallel
from skillsd.callbacks.progress import draws_bar
from skillsd.errors import ConfigError
from skillsd.files.checkpoint import read_checkpoint
from skillsd.files.durable import write
from skillsd.files.run_folder import PANEL_FILE, VALIDATIONS_FILE, read_panel, read_validations
from skillsd.statistics import bootstrap_mean, paired_difference, wilson_interval
from skillsd.trajectory import Trajectory
from skillsd.words import count

SHARES = ("success", "completion", "task_goal_completion", "scenario_goal_completion")
"""What is logged of a result; the last two where tasks have scenarios."""


class Panel(L.Callback):
    """Plays the data module's held-out tasks before the first and after the last iteration and writes panel.json.

    Lightning's own validation (`skillsd validate`, or `trainer.check_val_every_n_epoch` during a fit) plays the same panel. What `validate`
    finds is a line of validations.jsonl, beside what the run itself has measured. Of several ranks each plays a share.

    Args:
        before: Play it before training (a resumed run reads panel.json instead).
        after: Play it after training (a finished run that is run again reads panel.json instead).
        every: Play it every so many iterations in between, for a learning curve (`during` of panel.json); 0 never.
        enabled: false leaves the callback out of a fit.
    """

    def __init__(self, before: bool = True, after: bool = True, every: int = 0, enabled: bool = True) -> None:
        super().__init__()
        if every < 0:
            raise ConfigError(f"panel.every is {every}: give 0 (never) or a number of iterations.")
        self.before, self.after, self.every, self.enabled = before, after, every, enabled
        self.played: list[Trajectory] = []
        self.result: dict[str, Any] = {}
        self.trained = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trained = False
        stored = _stored(trainer)
        if "before" in stored and self.after and not self._same(trainer, stored["before"]):
            raise ConfigError(
                f"data.panel_split: the panel of {trainer.default_root_dir} was played on other episodes: set data.env, data.env_kwargs, "
                "data.panel_split, data.panel_attempts and data.panel_seeds as they were, or start a new run folder."
            )
        if self.before and "before" not in stored:
            if trainer.global_step:
                parallel.print_rank_zero("panel: this run was resumed and panel.json has no `before`; it is left out.")
                return
            self._keep(trainer, "before")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.trained:
            self.trained = True
            write_panel(trainer.default_root_dir, {}, drop=("after", "difference"))  # of an earlier end that training now goes beyond

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self.every and step % self.every == 0 and step < trainer.estimated_stepping_batches and not trainer.should_stop:
            result = self._play(trainer, f"after {count(step, 'iteration')}")
            # A resumed run plays some again, with the same result.
            during = _stored(trainer).get("during", {}) | {str(step): {"n": result["n"], **_shares(result)}}
            write_panel(trainer.default_root_dir, {"during": during})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stored = _stored(trainer).get("after")
        if self.after and not self.trained and stored is not None and self._same(trainer, stored):
            self.result = stored
        elif self.after:
            self._keep(trainer, "after")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the loggers the run's last result."""
        for logger in trainer.loggers if self.trained and self.result else ():
            logger.log_metrics({f"final/{k}": self.result[k] for k in ("success", "completion")}, trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.played = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.played += batch

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.result = summarise(self.played, _scenarios(trainer)) | {"device": _device_name(trainer)}
        for key, share in _shares(self.result).items():
            pl_module.log(f"panel/{key}", share, batch_size=1, sync_dist=True)  # every rank has the same; Lightning warns otherwise
        if trainer.state.fn == "validate":
            for k, share in self.result["pass_at"].items():
                pl_module.log(f"panel/pass@{k}", share, batch_size=1, sync_dist=True)
            add_validation(trainer.default_root_dir, _what_was_played(trainer) | self.result)

    def _same(self, trainer: L.Trainer, result: dict[str, Any]) -> bool:
        rows = trainer.datamodule.val_dataloader().rows  # type: ignore[attr-defined]
        return [(x["task_id"], x["member"], x["seed"]) for x in result["levels"]] == [(r.task.task_id, r.member, s) for s, r in rows]

    def _keep(self, trainer: L.Trainer, when: str) -> None:
        self.result = self._play(trainer, when) | {"device": _device_name(trainer)}
        write_panel(trainer.default_root_dir, {when: self.result})
        for logger in trainer.loggers:
            logger.log_metrics({f"panel/{k}": v for k, v in _shares(self.result).items()}, trainer.global_step)

    def _play(self, trainer: L.Trainer, when: str) -> dict[str, Any]:
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        played: list[Trajectory] = []
        drawn = draws_bar(trainer) and parallel.is_rank_zero()
        with Progress(disable=not drawn, transient=True) as bar:
            if not drawn:
                parallel.print_rank_zero(f"panel {when}: {count(len(loader.rows), 'episode')}")
            else:
                task = bar.add_task(f"panel {when}", total=len(loader.rows))
                loader.progress = lambda _, played, __: bar.update(task, completed=played)
            for batch in loader:
                played += batch
        result = summarise(played, _scenarios(trainer))
        parallel.print_rank_zero(f"panel {when}: " + ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in _shares(result).items()))
        return result


def _what_was_played(trainer: L.Trainer) -> dict[str, Any]:
    """The checkpoint (None: the agent as it starts), its step, and the panel's settings."""
    d: Any = trainer.datamodule  # type: ignore[attr-defined]
    checkpoint = trainer.ckpt_path
    step = read_checkpoint(Path(checkpoint))["global_step"] if checkpoint and Path(checkpoint).is_file() else None
    settings = {"env": d.env_id, "env_kwargs": d.env_kwargs, "tasks_file": d.tasks_file, "split": d.panel_split}
    settings["held_out"] = d.panel_split != d.train_split
    played = {"attempts": d.panel_attempts, "seeds": d.panel_seeds, "temperature": d.panel_temperature, "adapter": d.panel_adapter}
    return {"checkpoint": None if checkpoint is None else str(checkpoint), "step": step if checkpoint else 0, "settings": settings | played}


def _device_name(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _stored(trainer: L.Trainer) -> dict[str, Any]:
    """panel.json as rank 0 finds it."""
    return parallel.broadcast(read_panel(trainer.default_root_dir) if parallel.is_rank_zero() else {})


def _scenarios(trainer: L.Trainer) -> dict[str, str]:
    return {t.task_id: t.scenario for t in trainer.datamodule.panel_tasks}  # type: ignore[attr-defined]


def _shares(result: dict[str, Any]) -> dict[str, float]:
    return {k: result[k] for k in SHARES if k in result}


def summarise(played: Sequence[Trajectory], scenarios: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Shares with 95% intervals, and every episode.

    Args:
        played: The episodes.
        scenarios: Task id -> its scenario; "" for a task that stands alone.

    Returns:
        n, failed (how many of them the environment gave up; they count as not solved), success and its interval over tasks (Wilson's; the
        bootstrap's where several episodes of a task differ), completion, pass_at (k -> unbiased pass@k of Chen et al. 2021,
        arXiv:2107.03374, averaged over tasks), what `goal_completion` gives if a task has a scenario, and levels: [{task_id, member,
        seed, success, completion, turns, finish_reason}].
    """
    wins = sum(t.success for t in played)
    by_task: dict[str, list[bool]] = {}
    for t in played:
        by_task.setdefault(t.task_id, []).append(t.success)
    pass_at = {}
    for k in (k for k in (1, 2, 4, 8, 16, 32, 64) if k <= min(map(len, by_task.values()), default=0)):
        chances = [1 - comb(len(v) - sum(v), k) / comb(len(v), k) for v in by_task.values()]
        pass_at[str(k)] = sum(chances) / len(chances)
    return {
        "n": len(played),
        "failed": sum(t.finish_reason == "failed" for t in played),
        "success": wins / max(1, len(played)),
        "success_interval": _mean(by_task.values())[1],
        "completion": sum(t.completion for t in played) / max(1, len(played)),
        "pass_at": pass_at,
        **(goal_completion(played, scenarios) if scenarios and any(scenarios.values()) else {}),
        "levels": [
            {
                "task_id": t.task_id, "member": t.member, "seed": t.seed, "success": t.success, "completion": t.completion,
                "turns": len(t.turns), "finish_reason": t.finish_reason,
            }
            for t in played
        ],
    }  # fmt: skip


def goal_completion(played: Sequence[Trajectory], scenarios: Mapping[str, str]) -> dict[str, Any]:
    """AppWorld's figures (Trivedi et al. 2024, arXiv:2407.18901), as shares.

    With several attempts or seeds a task's score is the mean over its episodes, and a scenario's the share of attempts in which all of its
    tasks were solved. Either way a task, or a scenario, is one item of its interval.

    Returns:
        task_goal_completion, the share of tasks solved; scenario_goal_completion, the share of scenarios all of whose tasks are solved; and
        of each its `_interval`: Wilson's over tasks or scenarios, the bootstrap's over them where some score lies between 0 and 1.
    """
    tasks: dict[str, list[bool]] = {}
    attempts: dict[tuple[str, str], dict[tuple[int, int], bool]] = {}
    for t in played:
        tasks.setdefault(t.task_id, []).append(t.success)
        scenario = scenarios.get(t.task_id, "")
        solved = attempts.setdefault((scenario, "" if scenario else t.task_id), {})
        solved[t.seed, t.member] = solved.get((t.seed, t.member), True) and t.success
    (tgc, tgc_interval), (sgc, sgc_interval) = _mean(tasks.values()), _mean([s.values() for s in attempts.values()])
    return {
        "task_goal_completion": tgc, "task_goal_completion_interval": tgc_interval,
        "scenario_goal_completion": sgc, "scenario_goal_completion_interval": sgc_interval,
    }  # fmt: skip


def _mean(items: Iterable[Collection[bool]]) -> tuple[float, list[float]]:
    """Mean over the items of their shares, and its 95% interval."""
    shares = [sum(x) / len(x) for x in items]
    if any(0 < x < 1 for x in shares):
        mean, *interval = bootstrap_mean(shares, bounds=(0.0, 1.0))
        return mean, interval
    wins = round(sum(shares))
    return wins / max(1, len(shares)), list(wilson_interval(wins, len(shares)))


def write_panel(folder: str | Path, part: dict[str, Any], drop: Sequence[str] = ()) -> None:
    """Add a part to panel.json and leave others out. Of several ranks rank 0 writes."""
    if not parallel.is_rank_zero():
        return
    path = Path(folder) / PANEL_FILE
    content = {k: v for k, v in read_panel(folder).items() if k not in drop} | part
    if drop and content == read_panel(folder):
        return
    if "before" in content and "after" in content:
        content["difference"] = {k: list(paired_difference(content["before"], content["after"], k)) for k in ("success", "completion")}
    write(path, json.dumps(content, indent=1))


def add_validation(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Add a line to validations.jsonl. Of several ranks rank 0 writes.

    Raises:
        ConfigError: The file is damaged; it stays as it is.
    """
    if parallel.is_rank_zero():
        lines = [json.dumps(x) + "\n" for x in (*read_validations(folder), record)]
        write(Path(folder) / VALIDATIONS_FILE, "".join(lines))
