"""Every number that an iteration logs: its name, its meaning and unit, and the record that carries them to whoever writes them.

Each part adds what it has measured under these names: the batch (what was rolled out, too), the update, the skill bank. The record is
sealed before it is written; nobody changes it afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from skillsd.trajectory import FAILURES

MEANINGS: dict[str, str] = {
    "loss/total": "L = L_GRPO + lambda L_SDL (Eq. 14), mean over the N action tokens that train",
    "loss/policy": "L_GRPO times policy_weight (Eq. 3-4)",
    "loss/distillation": "what the teacher's signal adds to the loss, lambda included",
    "reward/mean": "mean reward of the episodes that have not failed",
    "reward/success": "share of them that solved their task",
    "reward/completion": "mean completion of them, 0 to 1",
    "reward/zero_variance": "share of the groups in which all rewards are equal",
    "teacher/skill_share": "share of the episodes whose teacher sees something that its student does not",
    "teacher/dropped_rows": "episodes whose teacher's prompt does not fit into the context, so that no teacher is scored",
    "teacher/gap_mean": "mean of log pi_tea - log pi_stu over the action tokens that a teacher scored, nats",
    "teacher/gap_std": "its standard deviation, nats",
    "teacher/health": "mean of advantage times gap over the same tokens: positive where the teacher agrees with the reward",
    "teacher/k3": "mean of exp(-ell) - 1 + ell over the same tokens, an estimate of KL(student || teacher), nats",
    "policy/entropy": "mean entropy of the student at its action tokens, nats",
    "policy/clip_fraction": "share of the action tokens at which the ratio's bound was active",
    "policy/logp_drift": "mean of |log pi now - log pi at the rollout|, nats",
    "policy/logp_drift_max": "the largest of these, nats",
    "grad_norm/total": "gradient norm before clipping",
    "grad_norm/policy": "norm of the policy term's own gradient, every grad_norm_every iterations",
    "grad_norm/distillation": "norm of the distillation term's own gradient, likewise",
    "teacher/weight": "lambda of this iteration",
    "teacher/shift": "mean size of what the signal adds to the advantage, over the tokens that a teacher scored",
    "optimizer/lr": "learning rate of this update",
    "rollout/env_steps": "turns played",
    "rollout/tokens": "tokens of all trajectories, prompts included",
    "rollout/action_tokens": "tokens that were sampled",
    "rollout/turns": "mean turns of an episode",
    "rollout/finish_length": "share of the episodes that ended at a token limit",
    "rollout/failed": "share of the episodes that failed; every other number leaves them out, but for those under rollout/",
    **{f"rollout/failed_{kind}": f"episodes that failed: {kind}" for kind in FAILURES},
    "policy/skipped_steps": "updates that were skipped since the run began, because they were not finite",
    "learner/tokens": "tokens that student and teacher scored",
    "skills/bank": "skills in the bank",
    "skills/failed": "summaries that gave no skill since the run began",
    "memory/peak_gib": "most memory since the start, GiB: reserved on the GPU, resident on a CPU, of the rank that has most",
    "memory/micro_batch_tokens": "tokens in one forward and backward, at most",
    "time/rollout_s": "seconds of the rollout",
    "time/teacher_s": "seconds of teacher scoring",
    "time/update_s": "seconds of the update without it",
    "time/summary_s": "seconds that training waited for summaries",
    "time/rollout_tokens_per_s": "rollout/tokens a second of rollout",
    "time/learner_tokens_per_s": "learner/tokens a second of teacher scoring and update",
}
METRICS = tuple(MEANINGS)
"""Every number's name, in the order of metrics.csv. Only those under time/ and memory/ differ when a run is repeated."""


class Metrics(Mapping[str, float]):
    """The numbers of one iteration, by name in the order of METRICS; NaN where nothing was measured.

    Args:
        *parts: Numbers by name, each part's own.
    """

    def __init__(self, *parts: Mapping[str, float]) -> None:
        self._numbers, self._sealed = dict.fromkeys(METRICS, math.nan), False
        for part in parts:
            self.add(part)

    def add(self, numbers: Mapping[str, float]) -> None:
        """Add what a part has measured.

        Raises:
            KeyError: A name is not in METRICS.
            ValueError: A number was added before, or the record is sealed.
        """
        for name, value in numbers.items():
            if self._sealed:
                raise ValueError(f"{name} comes too late: the iteration's metrics are sealed. Give its callback before RunLog.")
            if not math.isnan(self._numbers[name]):
                raise ValueError(f"{name} was added before: a number has one owner.")
            self._numbers[name] = float(value)

    def seal(self) -> Metrics:
        """From here on nothing is added. May be called again."""
        self._sealed = True
        return self

    @property
    def measured(self) -> dict[str, float]:
        """Those that are no NaN."""
        return {name: value for name, value in self._numbers.items() if not math.isnan(value)}

    def progress(self) -> dict[str, float]:
        """What a progress bar shows: share solved, memory, and tokens of experience a second of rollout and update."""
        seconds = sum(self[f"time/{part}_s"] for part in ("rollout", "teacher", "update"))
        shown = {"success": self["reward/success"], "GiB": self["memory/peak_gib"], "tokens/s": self["rollout/tokens"] / seconds}
        return {name: value for name, value in shown.items() if not math.isnan(value)}

    def __getitem__(self, name: str) -> float:
        return self._numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def mean(values: Iterable[float]) -> float:
    """The mean of numbers or booleans; 0 of none."""
    listed = [float(v) for v in values]
    return sum(listed) / max(1, len(listed))
