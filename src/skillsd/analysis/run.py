"""A run folder as data frames."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from skillsd.analysis.index import COLUMNS, Index
from skillsd.errors import ConfigError
from skillsd.run_folder import BANK_FILE, CONFIG_FILE, METRICS_FILE, TRAJECTORIES_FILE, read_panel
from skillsd.skills import SkillBank
from skillsd.skills.skill import FIELDS
from skillsd.trajectory import Trajectory

_SKILL = ("task_id", "source_iteration", "source_member", "source_reward", "source_completion", "uses", "mean_reward", "sources", *FIELDS)
_NOTHING = pd.DataFrame(index=pd.Index([], name="iteration", dtype=int))


class Run:
    """A run folder, also one that is being written: each frame is read when it is first asked for, and kept until `refresh()`.

    Tokens and texts stay on the disk: of 100,000 trajectories the numbers alone are in memory.

    Args:
        folder: What `trainer.default_root_dir` named.

    Raises:
        ConfigError: it is no run folder; any attribute raises it for a file that is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not any((self.folder / name).is_file() for name in (CONFIG_FILE, METRICS_FILE)):
            raise ConfigError(
                f"{self.folder} is no run folder (it has neither {CONFIG_FILE} nor {METRICS_FILE}): name one that fit has made."
            )
        self._index = Index(self.folder / TRAJECTORIES_FILE)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def refresh(self) -> None:
        """Forget what was read; of trajectories only what was appended is read again."""
        for name in ("config", "metrics", "panel", "trajectories", "events", "skills"):
            self.__dict__.pop(name, None)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, nested; empty if it is missing."""
        path = self.folder / CONFIG_FILE
        try:
            return dict(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as e:
            raise ConfigError(f"{path} is no configuration ({' '.join(str(e).split())}).") from e

    @cached_property
    def panel(self) -> dict[str, Any]:
        """What panel.json holds: results on the held-out tasks `before` and `after`, with intervals; empty if it is missing."""
        return read_panel(self.folder)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row an iteration (the index): `epoch`, and every scalar of `skillsd.module.METRICS`, NaN where it was not measured.

        Units: `time/*_s` seconds; `memory/*_gib` GiB; log-probs, gaps and entropy nats; rewards the environment's; `rollout/failed`,
        `reward/success`, `reward/completion`, `reward/zero_variance` and `policy/clip_fraction` shares.
        """
        path = self.folder / METRICS_FILE
        whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""  # a line without its end is still being written
        try:
            rows = list(csv.DictReader(whole.decode().splitlines()))
            numbers = [{name: float(value) if value else math.nan for name, value in row.items()} for row in rows]
            return pd.DataFrame(numbers).astype({"iteration": int, "epoch": int}).set_index("iteration") if rows else _NOTHING
        except (ValueError, TypeError, KeyError, csv.Error) as e:
            raise ConfigError(f"{path} cannot be read ({' '.join(str(e).split())}).") from e

    @cached_property
    def trajectories(self) -> pd.DataFrame:
        """A row a trajectory, in the order of the file, whose line from 0 is the index `trajectory`.

        Columns: `iteration`, `task_id`, `member` (of its group, from 0), `seed`; `reward`, `completion` (share, 0 to 1), `success`;
        `finish_reason` (done, horizon, length, failed), `failure` (why, or ""); `skill_id` of its teacher's skill (or missing); `n_turns`;
        `prompt_tokens`, `tokens` after the prompt, and how many of these were sampled, `action_tokens`.
        """
        self._index.update()
        frame = pd.DataFrame(self._index.rows, columns=list(COLUMNS))
        frame.index.name = "trajectory"
        return frame.astype({"success": bool, "skill_id": "Int64"})

    def trajectory(self, number: int) -> Trajectory:
        """One trajectory, whole. Raises IndexError if there is none of that number."""
        if number >= len(self._index):
            self._index.update()
        return self._index.read(number)

    def turns(self, numbers: Iterable[int] | int) -> pd.DataFrame:
        """A row a turn of the given trajectories: `trajectory`, `turn` (from 0), `observation`, `action`, `reward`."""
        rows = [(n, k, turn.observation, turn.action, turn.reward) for n, t in self._whole(numbers) for k, turn in enumerate(t.turns)]
        return pd.DataFrame(rows, columns=["trajectory", "turn", "observation", "action", "reward"])

    def tokens(self, numbers: Iterable[int] | int) -> pd.DataFrame:
        """A row a token after the prompt: `trajectory`, `position` (from 0), `turn`, `token_id`, `sampled`, `logprob` (nats, under the
        policy and at the temperature that sampled it; NaN where the environment spoke). `turn` is the one whose action the token is in;
        what the environment answers belongs to the turn that it begins."""
        rows = []
        for n, t in self._whole(numbers):
            turn, before = 0, True
            for at, (token, sampled, logp) in enumerate(zip(t.token_ids, t.action_mask, t.logprobs, strict=True)):
                turn, before = turn + (before and not sampled), sampled
                rows.append((n, at, turn, token, sampled, logp if sampled else float("nan")))
        return pd.DataFrame(rows, columns=["trajectory", "position", "turn", "token_id", "sampled", "logprob"])

    def _whole(self, numbers: Iterable[int] | int) -> Iterator[tuple[int, Trajectory]]:
        for n in [numbers] if isinstance(numbers, int) else numbers:
            yield int(n), self.trajectory(int(n))

    @cached_property
    def events(self) -> pd.DataFrame:
        """The bank's log, a row an event, its number from 1 the index `event`.

        Columns: `kind` (insert, merge, use, drop), `iteration`, `task_id`, `skill_id`, and of a use `reward` (mean of the group) and `gap`
        (outcome-aligned, nats), NaN if they were not given.
        """
        columns = ["kind", "iteration", "task_id", "skill_id", "reward", "gap"]
        rows: list[tuple[Any, ...]] = []
        with self._bank() as bank:
            tasks: dict[int, str] = {}
            for e in bank.events():
                if e.skill_id not in tasks:
                    tasks[e.skill_id] = bank.get(e.skill_id).task_id
                rows.append((e.kind, e.iteration, tasks[e.skill_id], e.skill_id, e.reward, e.gap))
        frame = pd.DataFrame(rows, columns=columns, index=pd.RangeIndex(1, len(rows) + 1, name="event"))
        return frame.astype({"reward": float, "gap": float})

    @property
    def retrievals(self) -> pd.DataFrame:
        """Those of `events` in which a skill was put before its task's teacher: `iteration`, `task_id`, `skill_id`, `reward`, `gap`."""
        return self.events[self.events["kind"] == "use"].drop(columns="kind")

    @cached_property
    def skills(self) -> pd.DataFrame:
        """A row a skill that ever entered the bank, by `skill_id`.

        Columns: `task_id`; of the trajectory it was made from `source_iteration`, `source_member`, `source_reward`, `source_completion`;
        `uses`, `mean_reward` (what that is, the bank's `booking` says), `sources` (how many trajectories gave this text); the texts
        `success_analysis`, `mistake_analysis`, `golden_workflow`; `inserted` and `dropped`, iterations, missing while it is held.
        """
        first = self.events.drop_duplicates(["kind", "skill_id"]).set_index("skill_id")
        at = {kind: first.loc[first["kind"] == kind, "iteration"] for kind in ("insert", "drop")}
        with self._bank() as bank:
            rows = [[getattr(skill, name) for name in _SKILL] for skill in map(bank.get, at["insert"].index)]
        frame = pd.DataFrame(rows, columns=list(_SKILL), index=pd.Index(at["insert"].index, name="skill_id"))
        return frame.assign(inserted=at["insert"], dropped=at["drop"].reindex(frame.index).astype("Int64"))

    def _bank(self) -> SkillBank:
        path = self.folder / BANK_FILE
        return SkillBank(path, read_only=True) if path.is_file() else SkillBank()
