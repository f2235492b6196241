"""Runs, trajectories and skills for reading: `Run("runs/sokoban").trajectories` is a data frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skillsd.analysis.run import Run

__all__ = ["Run"]


def __getattr__(name: str) -> Any:
    if name == "Run":  # late: pandas is slow to import, and `skillsd play` needs none
        from skillsd.analysis.run import Run

        return Run
    raise AttributeError(name)
