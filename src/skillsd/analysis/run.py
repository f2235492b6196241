"""A run folder as data frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from skillsd.analysis.index import Index
from skillsd.analysis.metrics import read_metrics
from skillsd.analysis.results import check_difference, check_round, check_validation
from skillsd.bounded import fill
from skillsd.config_file import read_config
from skillsd.errors import ConfigError
from skillsd.files.paths import read_path
from skillsd.files.run_folder import (
    BANK_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    PANEL_FILE,
    TRAJECTORIES_FILE,
    VALIDATIONS_FILE,
    check_format,
    folder_of,
    read_results,
)
from skillsd.skills import Skill, SkillBank
from skillsd.skills.skill import FIELDS as TEXTS
from skillsd.skills.skill import SKILL_TEMPLATE
from skillsd.trajectory import COUNTS, FIELDS, Trajectory

_SKILL = ("task_id", "source_iteration", "source_member", "source_reward", "source_completion", "uses", "mean_reward", "sources", *TEXTS)
_EVENT = ("kind", "iteration", "task_id", "skill_id", "reward", "gap")


def text_frame(*args: Any, **kwargs: Any) -> pd.DataFrame:
    """A pandas.DataFrame whose texts stay Python's own strings.

    Where pyarrow is installed, pandas would keep them in Arrow's, which refuses lone surrogates: JSON may hold those, and so may a record.
    """
    with pd.option_context("mode.string_storage", "python"):
        return pd.DataFrame(*args, **kwargs)


class Run:
    """A run folder, also one that is being written: each frame is read when it is first asked for, and kept until `refresh()`.

    Trajectories' tokens and texts stay on the disk: of 100,000 the numbers alone are in memory. Numbers may be NumPy's.

    Args:
        folder: What `trainer.default_root_dir` named, or its config.yaml.

    Raises:
        ConfigError: it is no run folder, or one of another format; any attribute raises it for a file that is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder_of(read_path(folder, "RUN"))
        check_format(self.folder)
        if not any((self.folder / name).is_file() for name in (CONFIG_FILE, METRICS_FILE, BANK_FILE, VALIDATIONS_FILE)):
            raise ConfigError(
                f"{self.folder} is no run folder (it has no {CONFIG_FILE}, {METRICS_FILE} or {BANK_FILE}): name one that fit has made."
            )
        self._index = Index(self.folder / TRAJECTORIES_FILE)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def refresh(self) -> None:
        """Forget what was read; of trajectories only what was appended is read again."""
        for name in ("_config", "metrics", "panel", "trajectories", "_lines", "_bank", "bank_size"):
            self.__dict__.pop(name, None)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, nested; empty if the file is missing or empty."""
        if isinstance(self._config, ConfigError):
            raise self._config
        return self._config

    @cached_property
    def _config(self) -> dict[str, Any] | ConfigError:
        # An error is kept as well: what is costly to refuse is refused once.
        path = self.folder / CONFIG_FILE
        try:
            return read_config(path) if path.is_file() and path.stat().st_size else {}
        except ConfigError as e:
            return e

    @property
    def skill_template(self) -> str:
        """The wrapper of a skill in front of the teacher's prompt. Raises ConfigError if the configuration's cannot be filled."""
        skills = self.config.get("skills")
        template = (skills.get("template") if isinstance(skills, dict) else None) or SKILL_TEMPLATE
        try:
            fill(template, dict.fromkeys(TEXTS, ""))
        except (TypeError, ValueError) as e:
            raise ConfigError(f"{self.folder / CONFIG_FILE}: skills.template cannot be filled ({e}).") from e
        return str(template)

    @property
    def environment(self) -> tuple[str, dict[str, Any]]:
        """Gymnasium id and keyword arguments. Raises KeyError, TypeError or AttributeError if the configuration does not say them."""
        data = self.config["data"]
        return data["env"], {**(data.get("env_kwargs") or {}), **(data.get("env_overrides") or {}).get(data["env"], {})}

    @cached_property
    def panel(self) -> dict[str, Any]:
        """Results on the held-out tasks, with intervals: `before` and `after` of panel.json, and the list `validations`, what each
        `skillsd validate` found, if there was one."""
        found = read_results(self.folder)
        checks: list[tuple[str, str, Callable[[Any], None], Any]] = [
            *((PANEL_FILE, when, check_round, found[when]) for when in ("before", "after") if when in found),
            *((PANEL_FILE, when, check_difference, found[when]) for when in ("difference",) if when in found),
            *((VALIDATIONS_FILE, f"line {i}", check_validation, x) for i, x in enumerate(found.get("validations", ()), 1)),
        ]
        for name, where, check, part in checks:
            try:
                check(part)
            except ValueError as e:
                raise ConfigError(f"{self.folder / name} is damaged ({where} {e}): move it away.") from e
        return found

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row an iteration (the index): `epoch`, and every scalar of `skillsd.metrics.METRICS`, NaN where it was not measured.

        Units: `time/*_s` seconds; `memory/*_gib` GiB; log-probs, gaps and entropy nats; rewards the environment's; `rollout/failed`,
        `reward/success`, `reward/completion`, `reward/zero_variance` and `policy/clip_fraction` shares.
        """
        path = self.folder / METRICS_FILE
        frame = read_metrics(path, whole=False) if path.is_file() else pd.DataFrame()
        if "iteration" not in frame:  # nothing yet
            return pd.DataFrame(index=pd.Index([], name="iteration", dtype=int))
        return frame.astype({"iteration": int, "epoch": int}).set_index("iteration")

    @cached_property
    def _lines(self) -> Index:
        self._index.update()
        return self._index

    @cached_property
    def trajectories(self) -> pd.DataFrame:
        """A row a trajectory, in the order of the file, whose line from 0 is the index `trajectory`.

        Columns: `iteration`, `task_id`, `member` (of its group, from 0), `seed`; `reward`, `completion` (share, 0 to 1), `success`;
        `finish_reason` (done, horizon, length, failed), `failure` (why, or ""); `skill_id` of its teacher's skill (or missing); `n_turns`;
        `prompt_tokens`, `tokens` after the prompt, and how many of these were sampled, `action_tokens`.
        """
        frame = text_frame(self._lines.rows, columns=[*FIELDS, *COUNTS])
        frame.index.name = "trajectory"
        return frame.astype({"success": bool, "skill_id": "Int64"})

    def trajectory(self, number: int) -> Trajectory:
        """One trajectory, whole. Raises IndexError if there is none of that number."""
        return self._lines.read(number)

    def turns(self, numbers: Iterable[int] | int) -> pd.DataFrame:
        """A row a turn of the given trajectories: `trajectory`, `turn` (from 0), `observation`, `action`, `reward`,
        `next_observation` (the environment's answer; None where the call failed, and at the end of a record of an older version)."""
        rows = []
        for n, t in self._whole(numbers):
            after = [*(turn.observation for turn in t.turns[1:]), t.final_observation]
            rows += [(n, k, x.observation, x.action, x.reward, y) for k, (x, y) in enumerate(zip(t.turns, after, strict=False))]
        return text_frame(rows, columns=["trajectory", "turn", "observation", "action", "reward", "next_observation"])

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
        return text_frame(rows, columns=["trajectory", "position", "turn", "token_id", "sampled", "logprob"])

    def _whole(self, numbers: Iterable[int] | int) -> Iterator[tuple[int, Trajectory]]:
        for n in [numbers] if isinstance(numbers, Integral) else numbers:  # type: ignore[union-attr, list-item]
            yield int(n), self.trajectory(int(n))

    @property
    def events(self) -> pd.DataFrame:
        """The bank's log, a row an event, its number from 1 the index `event`.

        Columns: `kind` (insert, merge, use, evict), `iteration` (-1: imported, before the run), `task_id`, `skill_id`, and of a use
        `reward` (mean of the group) and `gap` (outcome-aligned, nats), NaN if they were not given.
        """
        return self._bank.events

    @property
    def retrievals(self) -> pd.DataFrame:
        """Those of `events` in which a skill was put before its task's teacher: `iteration`, `task_id`, `skill_id`, `reward`, `gap`."""
        return self.events[self.events["kind"] == "use"].drop(columns="kind")

    @property
    def skills(self) -> pd.DataFrame:
        """A row a skill that ever entered the bank, by `skill_id`.

        Columns: `task_id`; of the trajectory it was made from `source_iteration`, `source_member`, `source_reward`, `source_completion`;
        `uses`, `mean_reward` (what that is, the bank's `value_estimate` says), `sources` (how many trajectories gave this text); the texts
        `success_analysis`, `mistake_analysis`, `golden_workflow`; `inserted` and `evicted`, iterations, missing while it is held.
        """
        return self._bank.frame

    def skill(self, skill_id: int) -> Skill:
        """A skill of the bank. Raises KeyError if there never was one of that id."""
        return self._bank.skills[int(skill_id)]

    @cached_property
    def bank_size(self) -> dict[str, int]:
        """How many skills the bank has `held` (now) and `ever`, and how many `tasks` have one; no skill is read."""
        with opened_bank(self.folder / BANK_FILE) as bank:
            sizes = bank.stats()
        return {"held": int(sizes["size"]), "ever": int(sizes["size"] + sizes["evicted"]), "tasks": int(sizes["tasks"])}

    @cached_property
    def _bank(self) -> Bank:
        return read_bank(self.folder / BANK_FILE)


class Bank(NamedTuple):
    """A bank at one moment: `Run.events`, `Run.skills`, and the skills themselves by id."""

    events: pd.DataFrame
    frame: pd.DataFrame
    skills: dict[int, Skill]


@contextmanager
def opened_bank(path: Path) -> Iterator[SkillBank]:
    """A bank's file for reading; an empty bank if there is none. What is damaged in it is a ConfigError, also within the block."""
    try:
        with SkillBank(path, read_only=True) if path.is_file() else SkillBank() as bank:
            yield bank
    except ValueError as e:
        raise ConfigError(str(e)) from e


def read_bank(path: Path) -> Bank:
    """A bank's file as data frames; empty ones if there is none.

    Raises:
        ConfigError: it is damaged.
    """
    with opened_bank(path) as bank:
        log = list(bank.events())
        skills = {e.skill_id: bank.get(e.skill_id) for e in log if e.kind == "insert"}
    rows = [(e.kind, e.iteration, skills[e.skill_id].task_id, e.skill_id, e.reward, e.gap) for e in log]
    events = text_frame(rows, columns=list(_EVENT), index=pd.Index([e.seq for e in log], name="event", dtype=int))
    frame = text_frame(
        [[getattr(skill, name) for name in _SKILL] for skill in skills.values()],
        columns=list(_SKILL), index=pd.Index(skills, name="skill_id", dtype=int),
    )  # fmt: skip
    at = {kind: pd.Series({e.skill_id: e.iteration for e in log if e.kind == kind}, dtype="Int64") for kind in ("insert", "evict")}
    frame = frame.assign(inserted=at["insert"].reindex(frame.index), evicted=at["evict"].reindex(frame.index))
    return Bank(events.astype({"reward": float, "gap": float}), frame, skills)
