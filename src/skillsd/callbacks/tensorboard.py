"""What TensorBoard shows of a run beside its numbers: an episode, skills, histograms, hyper-parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from heapq import nsmallest
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from google.protobuf.message import DecodeError
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from torch import Tensor

from skillsd.bounded import visible
from skillsd.config_errors import leaves
from skillsd.files.durable import write
from skillsd.skills import SkillBank
from skillsd.trajectory import Trajectory
from skillsd.words import count

FRAMES, ACROSS, GAP = 32, 8, 6
"""Most boards of an episode that are shown, boards in a row, pixels between them."""
ROWS, CHARS = 20, 300
"""Most rows of the table of skills, and most characters in a cell."""
READ = 10_000
"""Skills that are looked at for it, at most: half a second."""
NO_HYPERPARAMETERS = ("trainer.default_root_dir", "trainer.logger", "config", "ckpt_path", "overwrite", "steal_lock", "weights_only")
"""Keys that say where a run is and how it was begun; they and what is under them."""


def loggers(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """The run's TensorBoard loggers."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def writers(trainer: L.Trainer) -> list[Any]:
    """The SummaryWriter of each TensorBoard logger."""
    return [logger.experiment for logger in loggers(trainer)]


def episode(t: Trajectory) -> str:
    """A trajectory as Markdown: a line on how it ended, then what was said as code."""
    text = "\n\n".join(f"    {turn.observation}\n> {turn.action}".replace("\n", "\n    ") for turn in t.turns)
    if t.final_observation is not None:
        text += f"\n\n    {t.final_observation}".replace("\n", "\n    ")
    finish = f"{t.finish_reason} ({t.failure})" if t.failure else t.finish_reason
    return f"task {_cell(t.task_id)}, member {t.member}: {_cell(finish)}, completion {t.completion:.2f}\n\n{visible(text)}"


def strip(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Pictures, [h, w, 3] each and one at least, side by side on white, ACROSS in a row: [H, W, 3]."""
    height, width = (max(p.shape[i] for p in pictures) + GAP for i in (0, 1))
    across = min(ACROSS, len(pictures))
    sheet = np.full((-(-len(pictures) // across) * height, across * width, 3), 255, np.uint8)
    for i, p in enumerate(pictures):
        y, x = i // across * height, i % across * width
        sheet[y : y + p.shape[0], x : x + p.shape[1]] = p
    return sheet[:-GAP, :-GAP]


def skill_table(bank: SkillBank) -> str:
    """The skills that were used most, as a Markdown table; "" for an empty bank."""
    held = islice((skill for task_id in bank.tasks() for skill in bank.skills(task_id)), READ)
    rows = nsmallest(ROWS, held, key=lambda s: (-s.uses, s.skill_id))
    if not rows:
        return ""
    limited = f", the most used of {READ:,}" * (len(bank) > READ)
    return "\n".join(
        [
            f"{len(rows)} of {count(len(bank), 'skill')}{limited}\n",
            "| id | task | uses | mean reward | workflow |",
            "|--:|---|--:|--:|---|",
            *(f"| {s.skill_id} | {_cell(s.task_id)} | {s.uses} | {s.mean_reward:.3f} | {_cell(s.golden_workflow)} |" for s in rows),
        ]
    )


def _cell(text: str) -> str:
    """Neither Markdown nor HTML, whatever it is: all but letters, digits and spaces as character references."""
    line = " ".join(text[: 2 * CHARS].split())
    line = visible(line if len(line) <= CHARS else f"{line[:CHARS]}...")
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in line)


def token_histograms(parts: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Values of the tokens of an update: the teacher's gap where one spoke, and the log of the importance ratio, around 0 as the
    histogram's bins are (they are narrow there: a rounding error is seen). Finite ones alone; what has none is left out."""
    for k, name in enumerate(("tokens/gap", "tokens/log_rho")):
        x = np.concatenate([part[k].double().cpu().numpy() for part in parts]) if parts else np.zeros(0)
        if (x := x[np.isfinite(x)]).size:
            yield name, x


# -- hyper-parameters: TensorBoard itself compares the sessions of all runs, and tells which columns differ ----------------------------


def hyperparameters(config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """A resolved configuration, flat: dotted keys as on the command line; the class of `a` under `a`; null, true and lists as text,
    so that a key which one run sets and another leaves null is a column with two values."""
    out: dict[str, int | float | str] = {}
    for key, value in leaves(config):
        if any(f"{key}.".startswith(f"{skipped}.") for skipped in NO_HYPERPARAMETERS):
            continue
        plain = isinstance(value, int | float | str) and not isinstance(value, bool)
        out[key.removesuffix(".class_path")] = value if plain else json.dumps(value, default=str)
    return out


def add_session(writer: Any, config: Mapping[str, Any] | None) -> None:
    """Write what a run is made with, or that it has ended (None). No list of columns is written: TensorBoard takes that of one of several
    runs, and would not show the others'."""
    from torch.utils.tensorboard.summary import hparams  # late: TensorBoard is slow to import

    _, start, end = hparams({} if config is None else hyperparameters(config), {})
    writer._get_file_writer().add_summary(end if config is None else start)


def cut_back(logger: TensorBoardLogger, step: int) -> None:
    """Take what earlier processes wrote for this step and later ones out of their event files: a resumed run writes it again.

    SummaryWriter's `purge_step` would leave texts: TensorBoard does not purge them. A file that is damaged stays as it is.
    """
    from tensorboard.compat.proto.event_pb2 import Event  # late: TensorBoard is slow to import

    own = Path(logger.experiment._get_file_writer().event_writer._file_name).name
    for path in Path(logger.log_dir).glob("events.out.tfevents.*"):
        data, kept, at = path.read_bytes(), [], 0
        with suppress(DecodeError):
            while path.name != own and at + 12 <= len(data):
                end = at + 16 + int.from_bytes(data[at : at + 8], "little")  # a record: length, its CRC, an event, its CRC
                if end > len(data):
                    break
                if Event.FromString(data[at + 12 : end - 4]).step < step:
                    kept.append(data[at:end])
                at = end
            if sum(map(len, kept)) < at:
                write(path, b"".join(kept))
