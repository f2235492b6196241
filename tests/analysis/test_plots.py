"""Curves are the run's own numbers; their intervals are those of the groups."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from xml.etree import ElementTree

import pytest
from PIL import Image
from tests.analysis.folders import SHORT, append, write_metrics

from skillsd.analysis import Run, plots
from skillsd.files.run_folder import write_record
from skillsd.statistics import t_interval

REWARDS = [[[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], [[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0]]]


@pytest.fixture
def run(tmp_path):
    """Three iterations of groups of two; one episode of the last group of iteration 1 has failed."""
    rows = [
        replace(SHORT, iteration=i, task_id=f"t{k}", member=m, reward=r, success=r == 1.0)
        for i, groups in enumerate(REWARDS) for k, g in enumerate(groups) for m, r in enumerate(g)
    ]  # fmt: skip
    rows[11] = replace(rows[11], finish_reason="failed", reward=0.0, success=False, failure="raised: no")
    append(tmp_path / "trajectories.jsonl", rows)
    write_record(tmp_path)
    write_metrics(tmp_path, [{"loss/total": str(i * 0.5), "reward/mean": "0"} for i in range(3)])
    return Run(tmp_path)


def test_a_curve_s_interval_is_over_groups(run):
    c = plots.curve(run, "reward/mean")
    assert c.index.tolist() == [0, 1, 2]
    for i in (0, 1):
        assert c.loc[i].tolist() == pytest.approx(t_interval([sum(g) / len(g) for g in REWARDS[i]]))
    assert c["mean"][2] == 1.0 and c.loc[2, ["low", "high"]].isna().all()  # one group alone has no interval


def test_a_window_pools_groups(run):
    c = plots.curve(run, "reward/mean", window=2)
    assert c.index.tolist() == [1, 2]
    assert c.loc[1].tolist() == pytest.approx(t_interval([sum(g) / 2 for groups in REWARDS[:2] for g in groups]))


def test_a_metric_without_groups(run):
    c = plots.curve(run, "loss/total", window=2)
    assert c["mean"].tolist() == [0.25, 1.0] and c[["low", "high"]].isna().all(axis=None)
    with pytest.raises(KeyError):
        plots.curve(run, "no/metric")


def test_svg_is_the_same_for_the_same_and_takes_the_pages_ink(run):
    one, two = (plots.svg(plots.curves({"a": run, "<b>": run}, "reward/mean")) for _ in range(2))
    assert one == two
    root = ElementTree.fromstring(one)
    assert root.tag.endswith("svg") and "width" not in root.attrib and "viewBox" in root.attrib
    assert "currentColor" in one and plots._INK not in one and "metadata" not in one
    texts = [x.text for x in root.iter() if x.tag.endswith("text")]
    assert {"iteration", "reward/mean", "a", "<b>"} <= set(texts)


def test_a_png_has_a_white_background(run):
    figure = plots.curves({"a": run}, "loss/total")
    with Image.open(BytesIO(plots.png(figure))) as image:
        assert image.format == "PNG" and image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
    assert figure.patch.get_alpha() == 0.0  # as it was
