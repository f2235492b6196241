"""Gates: which tokens and rows the teacher's signal is let through for."""

from __future__ import annotations

import math

import pytest
import torch

from skillsd.objective import (
    OutcomeGate,
    PositiveGate,
    Tokens,
    TraceGate,
)


@pytest.mark.parametrize(
    ("gaps", "success", "want"),
    [
        ([0.2, 0.2], True, 1),
        ([0.2, 0.2], False, -1),
        ([-0.2, -0.2], True, -1),
        ([-0.2, -0.2], False, 1),
        ([0.04, 0.04], True, 0),
        ([0.05, 0.05], True, 0),  # up to and including
        ([-0.04, 0.0], False, 0),
        ([100.0, -2.0], True, 1),
        ([100.0, -2.0, -2.0], True, -1),  # one token counts for 3 nats at most
        ([-100.0, 2.0, 2.0], True, 1),
    ],
)
def test_outcome_gate(gaps, success, want):
    """One word for a trajectory; another trajectory between its tokens changes nothing."""
    d = torch.tensor([x for g in gaps for x in (g, -7.0)], dtype=torch.float64)
    row = torch.tensor([0, 2] * len(gaps))
    zero = torch.zeros_like(d)
    t = Tokens(zero, zero, zero, d, zero, torch.where(row == 0, success, True), zero, row)
    assert OutcomeGate()(t)[row == 0].tolist() == [want] * len(gaps) and OutcomeGate()(t)[row == 2].eq(-1).all()


def test_positive_gate_leaves_out_the_average():
    a = torch.tensor([-1.0, -1e-9, 0.0, 1e-9, 1.0])
    zero, row = torch.zeros(5), torch.arange(5)
    assert PositiveGate()(Tokens(zero, zero, zero, zero, a, zero > 0, zero, row)).tolist() == [0, 0, 0, 1, 1]


def test_trace_gate_ends_where_the_teacher_would_not_have_gone():
    """Each trajectory begins at 1; a step that the teacher likes better makes up for nothing; one that it rules out ends it."""
    d = torch.tensor([0.0, 2.0, -1.0, 3.0, -0.5, 9.0, -math.inf, 1.0, -math.inf, 2.0, -0.25], dtype=torch.float64)
    row, zero = torch.tensor([0] * 6 + [3] * 4 + [4]), torch.zeros_like(d)
    want = [1, 1, 1, math.exp(-1), math.exp(-1), math.exp(-1.5), 1, 0, 0, 0, 1]
    assert TraceGate()(Tokens(zero, zero, zero, d, zero, zero > 0, zero, row)).tolist() == pytest.approx(want, abs=1e-15)
