"""Gates: which tokens listen to the teacher. d = log pi_tea - log pi_stu."""

from __future__ import annotations

import torch
from torch import Tensor

from skillsd.objective.signal import Gate, Tokens


class SigmoidGate(Gate):
    """sigma(beta d): more where the teacher likes the token better (SDAR, arXiv:2605.15155; UCOB).

    Args:
        beta: Steepness, >= 0, in 1 / nats.
    """

    def __init__(self, beta: float = 5.0) -> None:
        if not beta >= 0:
            raise ValueError(f"SigmoidGate.beta is {beta}: give 0 or more.")
        self.beta = beta

    def __call__(self, t: Tokens) -> Tensor:
        return torch.sigmoid(self.beta * t.gap)


class PositiveGate(Gate):
    """1 in trajectories of positive advantage, else 0 (SDPG, arXiv:2606.04036): only what went well is distilled."""

    def __call__(self, t: Tokens) -> Tensor:
        return (t.advantage > 0).to(t.logp.dtype)


class OutcomeGate(Gate):
    """+1 in trajectories where teacher and outcome agree, -1 where they do not, 0 where the teacher has no view (SGSD, arXiv:2605.28791).

    The teacher is for a trajectory if it makes it likelier: sign of the mean of d, cut at 3 nats, over its tokens. A teacher that is
    against a solved one, or for an unsolved one, is wrong, and the student is pushed away from it: take a bounded signal (TopKJSD).

    Args:
        indifference: Absolute value of the mean of d up to which the teacher has no opinion, in nats.
    """

    def __init__(self, indifference: float = 0.05) -> None:
        if not indifference >= 0:
            raise ValueError(f"OutcomeGate.indifference is {indifference}: give 0 or more.")
        self.indifference = indifference

    def __call__(self, t: Tokens) -> Tensor:
        d = t.gap.clamp(-3.0, 3.0)
        rows = int(t.row.max()) + 1 if len(t.row) else 0
        total, count = (torch.zeros(rows, dtype=d.dtype, device=d.device).index_add(0, t.row, x) for x in (d, torch.ones_like(d)))
        mean = (total / count.clamp_min(1.0))[t.row]
        opinion = mean.sign() * (mean.abs() > self.indifference)
        return torch.where(t.success, opinion, -opinion)


class TraceGate(Gate):
    """prod of min(1, pi_tea / pi_stu) over the trajectory's earlier tokens: the teacher counts where it would have come itself.

    A plan says nothing of states that it does not pass. The student's first step off it still counts; behind that step the weight is as
    small as the teacher found the step unlikely. The product is the cut trace of Retrace (arXiv:1606.02647), which keeps off-policy
    corrections to the states that the other policy reaches.
    """

    def __call__(self, t: Tokens) -> Tensor:
        place = torch.arange(len(t.row), device=t.row.device) - torch.searchsorted(t.row, t.row)  # a trajectory's tokens lie together
        before = t.gap.new_zeros(int(t.row.max()) + 1 if len(t.row) else 0, int(place.max()) + 2 if len(t.row) else 1)
        before[t.row, place + 1] = t.gap.clamp(max=0.0)
        step = 1
        while step < before.shape[1]:  # a running sum; cumsum of floats is not deterministic on a GPU
            before = torch.cat([before[:, :step], before[:, step:] + before[:, :-step]], 1)
            step *= 2
        return before.exp()[t.row, place]
