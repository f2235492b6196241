"""The panel's stream of held-out episodes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from skillsd import parallel
from skillsd.rollout import Episode
from skillsd.stream import Source
from skillsd.trajectory import Trajectory


class PanelStream:
    """The validation loader: batches of held-out episodes in the panel's order, of which each rank plays a share. Played anew each time."""

    def __init__(self, data: Source) -> None:
        self.data = data
        self.rows = [(seed, Episode(task, k)) for seed in data.panel_seeds for task in data.panel_tasks for k in range(data.panel_attempts)]
        self.size = 4 * data.rollout.max_rows * parallel.world()
        self.progress = data.progress
        """Called with `panel`; of several ranks by this one's share."""

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[list[Trajectory]]:
        d = self.data
        for start in range(0, len(self.rows), self.size):
            part = self.rows[start : start + self.size]
            local = [part[i] for i in parallel.share(len(part))]
            played: list[Trajectory] = []
            with d.policy.together():
                for seed in dict.fromkeys(s for s, _ in local):
                    rows = [r for s, r in local if s == seed]
                    finished = start + len(played) * len(part) // len(local)
                    report = self.progress and partial(self._report, finished, len(part) / len(local))
                    played += d.collector.collect(
                        rows, seed=seed, iteration=0, temperature=d.panel_temperature, adapter=d.panel_adapter, progress=report
                    )
            yield [t for theirs in parallel.gather(played) for t in theirs]

    def _report(self, before: int, scale: float, n: int, of: int) -> None:
        """Pass on that n more episodes than `before` are finished, each of which stands for `scale` of all ranks' together."""
        assert self.progress is not None
        self.progress("panel", before + round(n * scale), len(self.rows))
