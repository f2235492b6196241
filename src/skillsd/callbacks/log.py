"""The record of a run: metrics.csv, trajectories.jsonl, and what TensorBoard shows beside the numbers."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any
from zlib import crc32

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray

from skillsd import parallel
from skillsd.bounded import visible
from skillsd.callbacks import tensorboard
from skillsd.errors import ConfigError
from skillsd.files.durable import DamagedError, checksum, named, sync
from skillsd.files.run_folder import METRICS_FILE, TRAJECTORIES_FILE
from skillsd.metrics import METRICS, Metrics
from skillsd.skills.callback import SkillBankCallback, find_selection
from skillsd.timeouts import Failure
from skillsd.trajectory import Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)

LOGS = METRICS_FILE, TRAJECTORIES_FILE
COLUMNS = ("iteration", "epoch", *METRICS)


def check_recorded(trainer: L.Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to go on without the record that a run began with, or with one that it began without: it would have a gap.

    Raises:
        ConfigError: `log.enabled` is not as it was.
    """
    before = "run_log" in checkpoint
    if before != any(isinstance(c, RunLog) for c in trainer.callbacks):  # type: ignore[attr-defined]
        was, now = str(before).lower(), str(not before).lower()
        raise ConfigError(
            f"log.enabled: it was {was} and is {now}, and the record of the run would have a gap: set it as it was, or name a new run "
            "folder (trainer.default_root_dir)."
        )


class RunLog(L.Callback):
    """Appends a line an iteration to metrics.csv and a line a trajectory to trajectories.jsonl.

    A checkpoint holds the length and the CRC-32 of both files; a resumed run cuts them back to it, and TensorBoard's as well, so that
    nothing stands twice. One that was moved away begins anew. TensorBoard gets an episode and the bank's skills at each epoch's start,
    histograms of tokens, and the hyper-parameters. Of several ranks rank 0 writes.

    Args:
        trajectories: Write trajectories.jsonl.
        histogram_every: Iterations between two histograms for TensorBoard; 0 never.
        enabled: false leaves the callback out of the run.
    """

    def __init__(self, trajectories: bool = True, histogram_every: int = 10, enabled: bool = True) -> None:
        super().__init__()
        if histogram_every < 0:
            raise ConfigError(f"log.histogram_every is {histogram_every}: give 0 (never) or a number of iterations.")
        self.trajectories, self.histogram_every, self.enabled = trajectories, histogram_every, enabled
        self.draws = True  # until the environment fails to
        self.trains = False  # a finished run that is run again does not
        self.seen: dict[str, tuple[int, int]] = {}  # length and CRC-32 of each file

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(c, SkillBankCallback) for c in callbacks[callbacks.index(self) :]):
            raise ConfigError("trainer.callbacks: SkillBankCallback comes after RunLog, which writes its numbers: give it before.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trains = False
        if not parallel.is_rank_zero():
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.seen = {name: self._take_up(folder / name, *self.seen.get(name, (0, 0))) for name in LOGS}
        metrics, header = folder / METRICS_FILE, ",".join(COLUMNS) + "\n"
        if not metrics.is_file() or not metrics.stat().st_size:
            self._append(metrics, header)
        with metrics.open(encoding="utf-8") as f:
            if f.readline() != header:
                raise ConfigError(f"trainer.default_root_dir: {metrics} has the columns of another version of skillsd: name a new folder.")
        if config := getattr(trainer, "skillsd_config", {}):
            for logger in trainer.loggers:
                if not isinstance(logger, TensorBoardLogger):
                    logger.log_hyperparams(tensorboard.hyperparameters(config))
            for writer in tensorboard.writers(trainer):
                tensorboard.add_session(writer, config)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        iteration = batch[0].trajectories[0].iteration
        if not self.trains and iteration:
            folder = Path(trainer.default_root_dir).resolve()
            for logger in tensorboard.loggers(trainer) if parallel.is_rank_zero() else ():
                if folder in Path(logger.log_dir).resolve().parents:  # elsewhere other runs may have written
                    tensorboard.cut_back(logger, iteration)
        self.trains = True
        due = self.histogram_every and iteration % self.histogram_every == 0
        pl_module.learner.keep_tokens = bool(due and tensorboard.loggers(trainer))  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        groups: Sequence[TrajectoryGroup] = batch
        folder = Path(trainer.default_root_dir)
        metrics: Metrics = outputs["metrics"].seal()
        if not parallel.is_rank_zero():
            return
        iteration = groups[0].trajectories[0].iteration
        row = {"iteration": iteration, "epoch": trainer.current_epoch} | {k: "" if math.isnan(v) else repr(v) for k, v in metrics.items()}
        text = StringIO()
        csv.DictWriter(text, COLUMNS, lineterminator="\n").writerow(row)
        self._append(folder / METRICS_FILE, text.getvalue())
        if self.trajectories:
            self._append(folder / TRAJECTORIES_FILE, "".join(t.to_json() + "\n" for g in groups for t in g.trajectories))
        for writer in tensorboard.writers(trainer):
            for name, values in tensorboard.token_histograms(outputs["tokens"]):
                writer.add_histogram(name, values, iteration)
            if batch_idx == 0:
                self._show(trainer, writer, groups[0].trajectories[0])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for writer in tensorboard.writers(trainer) if parallel.is_rank_zero() and self.trains else ():
            tensorboard.add_session(writer, None)

    def _show(self, trainer: L.Trainer, writer: Any, t: Trajectory) -> None:
        writer.add_text("episode", tensorboard.episode(t), t.iteration)
        if pictures := self._pictures(trainer, t):
            writer.add_image("episode", tensorboard.strip(pictures), t.iteration, dataformats="HWC")
        selection = find_selection(trainer)
        if selection is not None and selection.bank is not None and (table := tensorboard.skill_table(selection.bank)):
            writer.add_text("skills", table, t.iteration)

    def _pictures(self, trainer: L.Trainer, t: Trajectory) -> list[NDArray]:
        """Pictures of the episode's observations, by an environment that has just played; empty where it offers none."""
        collector = trainer.datamodule.collector  # type: ignore[attr-defined]
        if not self.draws or not collector.envs:
            return []
        with collector.alarm as alarm:
            final = [] if t.final_observation is None else [t.final_observation]  # shown however long the episode is
            seen = [*(turn.observation for turn in t.turns[: tensorboard.FRAMES - len(final)]), *final]
            found: Any = alarm(lambda: [collector.envs[0].picture(observation) for observation in seen])
        if isinstance(found, Failure):
            log.warning("TensorBoard shows no boards: the environment's picture() failed (%s).", visible(found.text()))
            self.draws = False
            return []
        return [picture for picture in found if picture is not None]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not parallel.is_rank_zero():
            return
        for name, (length, _) in self.seen.items():
            if length:
                sync(Path(trainer.default_root_dir) / name)  # the checkpoint says that they are there
        checkpoint["run_log"] = {name: {"bytes": length, "crc32": crc} for name, (length, crc) in self.seen.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            check_recorded(trainer, checkpoint)
        self.seen = {name: (x["bytes"], x["crc32"]) for name, x in checkpoint.get("run_log", {}).items()}

    def _take_up(self, path: Path, length: int, crc: int) -> tuple[int, int]:
        """Cut a file back to what the checkpoint saw of it.

        Raises:
            DamagedError: It is not that.
        """
        if not path.is_file():
            if length:
                parallel.print_rank_zero(f"{path} is not there: it begins anew, without the iterations up to here.")
            return 0, 0
        if checksum(path, length) != crc or path.stat().st_size < length:
            raise DamagedError(
                f"{path} is damaged: its first {length} bytes are not what the checkpoint saw. Restore it, or move it away to go on "
                "with a new one."
            )
        if path.stat().st_size > length:
            with path.open("r+b") as f:
                f.truncate(length)
        return length, crc

    def _append(self, path: Path, text: str) -> None:
        length, crc = self.seen[path.name]
        data = text.encode()
        if (path.stat().st_size if path.is_file() else 0) != length:
            raise DamagedError(f"{path} was changed or removed while the run was writing it: go on from the last checkpoint.")
        with named(path), path.open("ab") as f:
            f.write(data)
        self.seen[path.name] = length + len(data), crc32(data, crc)
