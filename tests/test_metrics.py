"""The record of an iteration's numbers."""

import math

import pytest

from skillsd.metrics import METRICS, Metrics


def test_parts_add_up_to_a_sealed_record():
    record = Metrics({"loss/total": 1}, {"reward/mean": 0.5})
    record.add({"skills/bank": 3})
    assert list(record) == list(METRICS) and math.isnan(record["teacher/k3"])
    assert record.measured == {"loss/total": 1.0, "reward/mean": 0.5, "skills/bank": 3.0}
    assert record.seal() is record and record.seal()["skills/bank"] == 3.0


def test_a_number_has_one_owner_and_one_moment():
    record = Metrics({"loss/total": 1.0})
    with pytest.raises(ValueError, match="loss/total was added before"):
        record.add({"loss/total": 1.0})
    with pytest.raises(KeyError, match="loss/sum"):
        record.add({"loss/sum": 1.0})
    record.seal()
    with pytest.raises(ValueError, match="time/summary_s comes too late"):
        record.add({"time/summary_s": 1.0})
    assert record.measured == {"loss/total": 1.0}
