"""How many of an iteration's episodes may fail."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from skillsd import parallel
from skillsd.bounded import one_line
from skillsd.errors import ConfigError
from skillsd.trajectory import Trajectory

log = logging.getLogger(__name__)


def check_failed(played: Sequence[Trajectory], iteration: int, max_failed: float, how_to_resume: Callable[[], str]) -> None:
    """Count failed episodes on all ranks, before anything is made of them.

    Args:
        played: This rank's.
        iteration: The one that they belong to.
        max_failed: Share of all that may fail (`data.rollout.max_failed`).
        how_to_resume: Where a run that stops can be taken up, in words.

    Raises:
        ConfigError: More have.
    """
    every = parallel.gather((len(played), [t for t in played if t.failed]))
    episodes, failed = sum(n for n, _ in every), [t for _, theirs in every for t in theirs]
    if failed and parallel.is_rank_zero():
        log.warning("iteration %d: %d of %d episodes failed: %s", iteration, len(failed), episodes, one_line(failed[0].failure, 1000))
    if len(failed) <= max_failed * episodes:
        return
    kinds = Counter(t.failure_kind for t in failed)
    first = {t.failure_kind: t for t in reversed(failed)}
    listed = "; ".join(f"{n} {k}, first on task {first[k].task_id}: {first[k].failure[:200]}" for k, n in kinds.items())
    cures = ["mend the environment"] if set(kinds) - {"model"} else []
    if "model" in kinds:
        cures.append("see whether the weights of model.policy.model and of the adapters are finite and model.policy.dtype has their range")
    raise ConfigError(
        f"data.rollout.max_failed is {max_failed:g}, and in iteration {iteration} {len(failed)} of {episodes} episodes "
        f"failed ({listed}). {how_to_resume()}: {', '.join(cures)} and resume, or set a larger share."
    )
