"""Colours say which way and how far; text stays text."""

import re
from math import nan

import pytest

from skillsd.analysis.heatmap import STRENGTH, heat


def test_colours_show_sign_and_size():
    html = heat(["up", " ", "left", "board"], [1.0, -4.0, 0.0, nan])
    spans = re.findall(r'<span title="(.*?)" style="background: rgba\((.*?), ([\d.]+)\)">(.*?)</span>', html)
    assert [(title, text) for title, _, _, text in spans] == [("+1.000", "up"), ("-4.000", " "), ("+0.000", "left")]
    assert [float(s) for *_, s, _ in spans] == [
        pytest.approx(STRENGTH / 2, abs=0.01),
        STRENGTH,
        0.0,
    ]  # half of the limit, beyond it, nothing
    assert spans[0][1] != spans[1][1]
    assert html.endswith("</span>board")


def test_text_is_escaped():
    html = heat(["<script>alert(1)</script>", "<b>"], [0.5, nan])
    assert "<script" not in html and "<b>" not in html and "&lt;script&gt;" in html


def test_texts_and_values_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match="2 texts and 1 values"):
        heat(["a", "b"], [0.0])
    with pytest.raises(ValueError, match="limit > 0"):
        heat(["a"], [0.0], limit=0.0)
