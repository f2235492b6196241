"""An iteration of W ranks on paper, each with as much work as one has alone (weak scaling):

    t(W) = rollout * straggler(W) + gather(W) + update + reduce(W) + leader(W) + step + fixed

    straggler   the longest of W * rows episodes over the longest of rows; with episodes all in progress at one time a rollout is as long
                as its longest. And the slowest of W machines: noise, sd / mean of ranks' rollouts under the same load
    gather      every rank pickles its own share, W - 1 shares of B bytes come over its link, and it unpickles W: grows with W
    reduce      2 (W - 1) / W of the gradient's bytes over the link, as a ring does
    leader      what is done for the whole batch, above all rank 0's log and bank while others wait: all of it is taken to grow with W,
                which is an upper bound
    step, fixed what takes as long for any W: clipping and optimizer; checkpoint and the loop's own

The update has no straggler: its rows are dealt out by tokens, of the whole batch. Environments have a core each here; W ranks on a host of
C cores whose environments take c CPU seconds an iteration and rank need W * c / C of them for that alone.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from scipy.integrate import quad
from scipy.stats import norm


@dataclass(frozen=True)
class Work:
    """What one rank does in an iteration, in seconds, tokens and bytes.

    Attributes:
        rollout_s, update_s: Its own rollout; forward and backward of its rows, teacher included.
        tokens: Tokens that it rolls out, prompts included.
        rows: Episodes, all in progress at one time.
        spread, longest: Episodes' lengths: sd / mean; the longest possible / mean (a limit of turns), or infinity.
        noise: sd / mean of the ranks' rollout seconds under the same load.
        bytes_per_token, pickle_s, unpickle_s: What a token of the gathered share takes, in bytes and seconds.
        gradient_bytes: Bytes of the gradient that are reduced.
        leader_s: What rank 0 does for a batch of this size while others wait.
        step_s: The learner's step beside its update: clipping, optimizer.
        fixed_s: All the rest.
    """

    rollout_s: float
    update_s: float
    tokens: float
    rows: int
    spread: float
    longest: float
    bytes_per_token: float
    pickle_s: float
    unpickle_s: float
    gradient_bytes: float
    leader_s: float
    step_s: float
    fixed_s: float
    noise: float = 0.0


@dataclass(frozen=True)
class Links:
    """Bytes a second into one rank: of the gather (gloo, CPU memory) and of the reduction (NCCL, GPU memory)."""

    gather: float
    reduce: float


@dataclass(frozen=True)
class Iteration:
    """Seconds of an iteration by part."""

    rollout: float
    gather: float
    update: float
    reduce: float
    leader: float
    step: float
    fixed: float
    tokens: float

    @property
    def seconds(self) -> float:
        return self.rollout + self.gather + self.update + self.reduce + self.leader + self.step + self.fixed

    def rates(self) -> dict[str, float]:
        """Tokens/s as benchmarks/scaling.py measures them: a rollout ends when all have the whole batch, a learner's step when all have
        reduced."""
        parts = {"rollout": self.rollout + self.gather, "learner": self.update + self.reduce + self.step, "iteration": self.seconds}
        return {k: self.tokens / s for k, s in parts.items()}

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "seconds": self.seconds}


def expected_maximum(n: int) -> float:
    """The expected maximum of n independent standard normal variables."""
    return quad(lambda x: x * n * norm.pdf(x) * norm.cdf(x) ** (n - 1), -12, 12, limit=200, points=[0.0, math.sqrt(2 * math.log(n))])[0]


def longest(rows: int, spread: float, maximum: float) -> float:
    """The expected longest of `rows` episodes, in mean lengths. Lengths are normally distributed and cut off at `maximum`."""
    return min(maximum, 1 + spread * expected_maximum(rows))


def straggler(w: Work, ranks: int) -> float:
    """How much longer the slowest of `ranks` rollouts is expected to take than one alone."""
    episodes = longest(ranks * w.rows, w.spread, w.longest) / longest(w.rows, w.spread, w.longest)
    return episodes * (1 + w.noise * expected_maximum(ranks))


def predict(w: Work, links: Links, ranks: int) -> Iteration:
    """An iteration of `ranks` ranks with this work each."""
    share = w.tokens * w.bytes_per_token
    several = ranks > 1
    return Iteration(
        rollout=w.rollout_s * straggler(w, ranks),
        gather=several * (w.tokens * (w.pickle_s + ranks * w.unpickle_s) + (ranks - 1) * share / links.gather),
        update=w.update_s,
        reduce=2 * (ranks - 1) / ranks * w.gradient_bytes / links.reduce,
        leader=ranks * w.leader_s,
        step=w.step_s,
        fixed=w.fixed_s,
        tokens=ranks * w.tokens,
    )
