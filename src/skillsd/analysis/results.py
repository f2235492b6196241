"""What panel.json and validations.jsonl must hold to be shown: a run folder may come from elsewhere, or be damaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LARGEST = 3.4028235e38  # what a float32 holds


def check_round(part: Any) -> None:
    """Raises ValueError, half a sentence, for what is no result of a panel."""
    _needs(part, "n", "success", "success_interval", "levels")
    goals = [name for name in ("task_goal_completion", "scenario_goal_completion") if name in part]
    levels, pass_at = part["levels"], part.get("pass_at", {})
    checks = {
        "n": _whole(part["n"]), "failed": _whole(part.get("failed", 0)), "success": _real(part["success"]),
        "device": isinstance(part.get("device", ""), str), "success_interval": _reals(part["success_interval"], 2),
        "levels": isinstance(levels, list) and all(isinstance(x, Mapping) and _real(x.get("completion")) for x in levels),
        "pass_at": isinstance(pass_at, Mapping) and all(map(_real, pass_at.values())),
        **{name: _real(part[name]) and _reals(part.get(f"{name}_interval"), 2) for name in goals},
    }  # fmt: skip
    _refuse(checks)


def check_validation(record: Any) -> None:
    """The same for a record of `skillsd validate`."""
    _needs(record, "checkpoint", "step", "settings")
    check_round(record)
    settings = record["settings"]
    _needs(settings, "adapter", "attempts", "seeds", "split", "temperature")
    _refuse(
        {
            "attempts": _whole(settings["attempts"]),
            "seeds": isinstance(settings["seeds"], list),
            "temperature": _real(settings["temperature"]),
        }
    )


def check_difference(difference: Any) -> None:
    """The same for the paired differences of after and before."""
    _needs(difference, "success", "completion")
    _refuse({name: _reals(difference[name], 3) for name in ("success", "completion")})


def _needs(part: Any, *names: str) -> None:
    if missing := [name for name in names if not isinstance(part, Mapping) or name not in part]:
        raise ValueError(f"has no {missing[0]}")


def _refuse(checks: Mapping[str, bool]) -> None:
    if wrong := [name for name, fits in checks.items() if not fits]:
        raise ValueError(f"has a {wrong[0]} that is none")


def _whole(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**53


def _real(x: Any) -> bool:
    """NaN stands for what was not measured."""
    return type(x) in (int, float) and (x != x or abs(x) <= _LARGEST)


def _reals(x: Any, n: int) -> bool:
    return isinstance(x, list) and len(x) == n and all(map(_real, x))
