"""Runs, trajectories and skills for reading: `Run("runs/sokoban").trajectories` is a data frame."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skillsd.analysis.run import Run
    from skillsd.analysis.score import Scorer
    from skillsd.analysis.similar import SkillIndex

__all__ = ["Run", "Scorer", "SkillIndex"]
_WHERE = {"Run": "run", "Scorer": "score", "SkillIndex": "similar"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"skillsd.analysis has no {name}")
    return getattr(import_module(f"skillsd.analysis.{_WHERE[name]}"), name)  # late: pandas is slow to import, and `skillsd play` needs none
