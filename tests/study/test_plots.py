"""What the figures show, where it is more than a drawing."""

from __future__ import annotations

from math import nan

import pandas as pd
import pytest

from skillsd.study.plots import _over_seeds, styles
from skillsd.study.settings import StudySettings


def test_seeds_that_end_at_different_iterations():
    """A point needs every seed; the last one is the mean of their ends, not that of the longest run alone."""
    rows = [("m", seed, i, 10.0 * i, 0.5 + 0.1 * seed + 0.01 * i) for seed, n in ((0, 4), (1, 6)) for i in range(n + 1)]
    curves = pd.DataFrame(rows, columns=["method", "seed", "iteration", "env_steps", "y"])
    band = _over_seeds(curves, "m", "env_steps", "y")
    assert band["x"].tolist() == [0, 10, 20, 30, 50]
    assert band["mean"].tolist() == pytest.approx([0.55, 0.56, 0.57, 0.58, (0.54 + 0.66) / 2])
    spread = 12.706205 * 0.1 / 2  # of two numbers 0.1 apart: 0.64, so the band ends where a share does
    assert (band["low"].tolist()[0], band["high"].tolist()[0]) == (0.0, 1.0) and spread > 0.55
    curves["y"] /= 10
    assert _over_seeds(curves, "m", "env_steps", "y")["high"].tolist()[0] == pytest.approx((0.55 + spread) / 10, rel=1e-6)
    curves.loc[curves["iteration"].isin([1, 3]), "y"] = nan  # not played
    assert _over_seeds(curves, "m", "env_steps", "y")["x"].tolist() == [0, 20, 50]
    assert _over_seeds(curves, "other", "env_steps", "y").empty


def test_fifteen_methods_have_lines_of_their_own():
    methods = [f"m{i}" for i in range(15)]
    drawn = styles(StudySettings(configs=["x"], methods={m: [] for m in methods}, baseline="m3"))
    assert drawn["m3"]["color"] == "black" and len({(s["color"], s.get("linestyle", "-")) for s in drawn.values()}) == 15
