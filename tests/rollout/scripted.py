"""An engine that gives the same answer each turn, and Sokoban as the collector's tests play it."""

from collections.abc import Iterable, Sequence

from skillsd.engines.engine import Completion, Request, Session
from skillsd.rollout import Collector, Episode
from skillsd.trajectory import Task, Trajectory

SOKOBAN = "skillsd_sokoban:skillsd/Sokoban-v0"
KWARGS = {"action_format": "bare", "max_turns": 5, "boxes": 1, "prompts": {"instruction": "answer with one move."}}


class Scripted(Session):
    """An engine that gives the same answer each turn, cut at the limit, and keeps the requests."""

    def __init__(self, answer: Sequence[int], stop: int) -> None:
        self.answer, self.stop, self.requests, self.given = list(answer), stop, [], []

    def open(self, temperature: float, adapter: str | None = "student") -> "Scripted":
        return self

    def close(self, failed: bool = False) -> None:
        pass

    @property
    def busy(self) -> bool:
        return bool(self.given)

    def submit(self, requests: Sequence[Request]) -> None:
        self.requests += requests
        self.given += requests

    def step(self) -> list[tuple[int, Completion]]:
        given, self.given = self.given, []
        cut = [(r.row, self.answer[: r.limit]) for r in given]
        return [(row, Completion(ids, [-0.5] * len(ids), ids[-1] == self.stop)) for row, ids in cut]

    def forget(self, rows: Iterable[int]) -> None:
        pass


def play(collector: Collector, *names: str) -> list[Trajectory]:
    return collector.collect([Episode(Task(n)) for n in names], seed=0, iteration=0)
