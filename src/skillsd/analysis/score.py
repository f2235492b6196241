"""Recorded trajectories under another adapter, another skill, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from skillsd.analysis.run import Run
from skillsd.diagnosis import explain
from skillsd.errors import ConfigError
from skillsd.files.checkpoint import check_base, newest_good, read_checkpoint
from skillsd.files.run_folder import CHECKPOINTS
from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence
from skillsd.rollout import Chat
from skillsd.skills import Skill
from skillsd.trajectory import Trajectory


class Scorer:
    """A run's model, to score what the run recorded: what each adapter makes of it, with a skill in front of it or without.

    Args:
        run: The run.
        adapters: Where `student` and `teacher` come from: a checkpoint (`.ckpt`), or a folder with a PEFT adapter, which then is both.
            Default: the run's newest checkpoint that is whole.
        device: Where to compute.

    Raises:
        ConfigError: the run has no configuration or no checkpoint, or the adapters do not fit its model.
    """

    def __init__(self, run: Run, adapters: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        self.run = run
        try:
            given: dict[str, Any] = run.config["model"]["policy"]
            lora = LoraSettings(**given["lora"])
        except (KeyError, TypeError) as e:
            raise ConfigError(f"{run.folder}: its configuration names no policy ({e!r}): it is not from `skillsd fit`.") from e
        source = Path(adapters) if adapters is not None else newest_good(run.folder / CHECKPOINTS)
        if source is None or not source.exists():
            raise ConfigError(f"{source or run.folder / CHECKPOINTS}: no adapters there: name a checkpoint or a PEFT folder.")
        lora = replace(lora, init=str(source) if source.is_dir() else None)
        self.policy = Policy(PolicySettings(**given | {"lora": lora}), device)
        if not source.is_dir():
            try:
                checkpoint = read_checkpoint(source)
            except Exception as e:
                if (line := explain(e)) is None:
                    raise
                raise ConfigError(f"{source}: {line}") from e
            check_base(checkpoint, self.policy.identity)
            self.policy.load_adapter_state(checkpoint["state_dict"])
        self.chat = Chat(self.policy.tokenizer, self.policy.stop_ids)
        self.template = run.skill_template
        self.temperature = float(run.config["data"].get("rollout", {}).get("temperature", 1.0))

    def logprobs(self, number: int, adapter: str | None = "student", skill: Skill | str | int | None = None) -> npt.NDArray[np.float32]:
        """Log-probs of a trajectory's tokens, a column for `Run.tokens(number)`.

        Args:
            number: The trajectory.
            adapter: `student`, `teacher`, or None for the untouched base.
            skill: What stands in front of the task: a skill, the bank's one of that id, a text, or nothing (""). None (or a missing value,
                as `Run.trajectories` has it): the prompt under which it was recorded. What a context other than the bank's showed the
                teacher is not on record: give it as a text.

        Returns:
            [T] in nats at the run's sampling temperature, NaN where the policy sampled nothing.

        Raises:
            IndexError: there is no such trajectory.
            KeyError: there is no such skill.
            ValueError: there is no such adapter.
        """
        t = self.run.trajectory(number)
        logp = np.full(len(t.token_ids), np.nan, np.float32)
        sequence = TokenSequence(self._prompt(t, skill), t.token_ids, t.action_mask)
        if t.n_actions:
            with torch.no_grad():
                scores = self.policy.score(adapter, [sequence], self.temperature)
            logp[list(t.action_mask)] = scores.logp[0].float().cpu().numpy()[list(t.action_mask)]
        return logp

    def prompt(self, number: int, skill: Skill | str | int | None = None) -> str:
        """The first prompt of a trajectory as text; `skill` as for `logprobs`."""
        return str(self.policy.tokenizer.decode(self._prompt(self.run.trajectory(number), skill)))

    def texts(self, number: int) -> list[str]:
        """What each token of a trajectory, after the prompt, adds to the text; "" for all but the last of those that share a character."""
        ids, decode = self.run.trajectory(number).token_ids, self.policy.tokenizer.decode
        out, start, emitted = [], 0, 0  # of the ids up to `emitted` the text is out; those from `start` on say how the next one joins it
        for end in range(1, len(ids) + 1):
            text = str(decode(ids[start:end]))
            if text.endswith("\ufffd") and end < len(ids):  # the first bytes of a character
                out.append("")
                continue
            out.append(text[len(str(decode(ids[start:emitted]))) :])
            start, emitted = emitted, end
        return out

    def _prompt(self, t: Trajectory, skill: Skill | str | int | None) -> Sequence[int]:
        if skill is None or skill is pd.NA:
            return t.prompt_ids
        if isinstance(skill, Integral):
            skill = self.run.skill(int(skill))
        text = skill.render(self.template) if isinstance(skill, Skill) else str(skill)
        return self.chat.prompt_ids(t.instruction, t.turns[0].observation, text) if t.turns else t.prompt_ids
