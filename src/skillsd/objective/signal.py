"""What the teacher says, and the three places where it can be said. An algorithm of the family is a `Signal` in a file of its own.

    loss          L_GRPO + lambda * mean of w g s           s = signal.loss, w g = weights below
    advantage     A_t = A + lambda w g s                    s = signal.advantage
    multiplier    A_t = A ((1 - lambda w g) + lambda w g s) s = signal.multiplier

g is the gate, w is 1 where the teacher has a context or other weights, and 0 elsewhere. Write one of the three methods; name the
class in `model.objective` under the key of that place. Nothing else has to be touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The n action tokens of a micro-batch, flat, trajectory by trajectory. Only `logp` and `divergence` carry gradient.

    Args:
        logp: log pi_stu of the sampled tokens, [n] float, nats.
        logp_old: The same under the student that was current at the rollout.
        logp_behaviour: The same under whoever sampled them: the old student, or the old teacher where it rolled out (Eq. 13).
        logp_teacher: log pi_tea of them under the teacher's prompt; equal to `logp` where no teacher was scored.
        advantage: The advantage of the token's trajectory.
        success: True if its trajectory solved the task, bool.
        return_gap: Mean return of its group's members that acted under the teacher's prompt minus that of those that acted under the
            student's; nan where nobody acted under the teacher's.
        row: Index of the token's trajectory in the micro-batch, int64.
        divergence: `Signal.divergence` at the token's state, if the signal asks for distributions.
    """

    logp: Tensor
    logp_old: Tensor
    logp_behaviour: Tensor
    logp_teacher: Tensor
    advantage: Tensor
    success: Tensor
    return_gap: Tensor
    row: Tensor
    divergence: Tensor | None = None

    @property
    def gap(self) -> Tensor:
        """d = log pi_tea - log pi_stu, detached: > 0 where the teacher likes the token better."""
        return self.logp_teacher.detach() - self.logp.detach()

    @property
    def ratio(self) -> Tensor:
        """rho = pi_stu / sg(pi_behaviour), with gradient through the numerator (Eq. 11, 13)."""
        return (self.logp - self.logp_behaviour.detach()).exp()


class Signal:
    """Base of the algorithms. Write `loss`, `advantage` or `multiplier`."""

    distributional = False
    """The signal compares whole distributions at each state: then `divergence` is written too, and only `loss` makes sense."""

    def loss(self, t: Tokens) -> Tensor:
        """Loss per token, [n] with gradient."""
        raise self._lacks("loss")

    def advantage(self, t: Tokens) -> Tensor:
        """What is added to the advantage, [n] without gradient."""
        raise self._lacks("advantage")

    def multiplier(self, t: Tokens) -> Tensor:
        """What the advantage is multiplied by, [n] without gradient, > 0 so that its sign stays."""
        raise self._lacks("multiplier")

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[n, V] log-probs of both, of the student with gradient -> [n]. Called on pieces of the batch: n varies."""
        raise self._lacks("divergence")

    def writes(self, placement: str) -> bool:
        """True if this class has the method of that name."""
        return getattr(type(self), placement) is not getattr(Signal, placement)

    def _lacks(self, method: str) -> TypeError:
        return TypeError(f"{type(self).__name__} has no {method}: write that method, or give the signal in another place.")


class Gate(ABC):
    """Weight of each token's signal, in [-1, 1]."""

    @abstractmethod
    def __call__(self, t: Tokens) -> Tensor:
        """[n] without gradient."""


class NotPerToken(ValueError):
    """A signal or a gate gave something else than one number for each action token."""


def per_token(given: Tensor, t: Tokens, by: object) -> Tensor:
    """`given`, which a signal or gate `by` made of `t`.

    Raises:
        NotPerToken: it is no tensor [n]; it would be broadcast, or fail where nobody finds the cause.
    """
    if not isinstance(given, Tensor) or given.shape != t.logp.shape:
        has = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise NotPerToken(f"{type(by).__name__} gave {has}, not {list(t.logp.shape)}: one number for each action token.")
    return given


def k3(ell: Tensor) -> Tensor:
    """exp(-ell) - 1 + ell >= 0: Schulman's low-variance KL estimate. expm1 keeps its precision near 0."""
    return torch.expm1(-ell) + ell
