"""The mathematics: pure functions on tensors, composed by `Objective`. One algorithm is one file; `signal` says how to write another."""

from skillsd.objective.full_reverse_kl import FullReverseKL
from skillsd.objective.gap_advantage import GapAdvantage
from skillsd.objective.gap_multiplier import GapMultiplier
from skillsd.objective.gated_log_ratio import GatedLogRatio
from skillsd.objective.gates import OutcomeGate, PositiveGate, SigmoidGate, TraceGate
from skillsd.objective.grpo import clipped_policy_loss, float32_rewards, group_advantages
from skillsd.objective.objective import Objective, Terms
from skillsd.objective.sampled_reverse_kl import SampledReverseKL
from skillsd.objective.signal import Gate, NotPerToken, Signal, Tokens, k3
from skillsd.objective.top_k_jsd import TopKJSD
from skillsd.objective.two_view_kl import TwoViewKL
from skillsd.objective.unweighted_k3 import UnweightedK3

__all__ = [
    "FullReverseKL",
    "GapAdvantage",
    "GapMultiplier",
    "Gate",
    "GatedLogRatio",
    "NotPerToken",
    "Objective",
    "OutcomeGate",
    "PositiveGate",
    "SampledReverseKL",
    "SigmoidGate",
    "Signal",
    "Terms",
    "Tokens",
    "TopKJSD",
    "TraceGate",
    "TwoViewKL",
    "UnweightedK3",
    "clipped_policy_loss",
    "float32_rewards",
    "group_advantages",
    "k3",
]
