"""Numbers in sentences."""

from skillsd.words import count, duration


def test_one_is_singular():
    assert [count(n, "method") for n in (0, 1, 2)] == ["0 methods", "1 method", "2 methods"]
    assert [count(n, "trajectory") for n in (1, 1024)] == ["1 trajectory", "1,024 trajectories"]


def test_durations_have_the_unit_that_reads_best():
    assert [duration(s) for s in (0, 42.2, 59.7, 210, 3599, 7500)] == ["0 s", "42 s", "1.0 min", "3.5 min", "1 h 00 min", "2 h 05 min"]
