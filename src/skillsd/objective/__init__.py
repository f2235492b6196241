"""The mathematics: pure functions on tensors, composed by `Objective`. One algorithm is one file; `signal` says how to write another."""

from skillsd.objective.gates import OutcomeGate, PositiveGate, SigmoidGate, TraceGate
from skillsd.objective.grpo import clipped_policy_loss, float32_rewards, group_advantages
from skillsd.objective.naive_k3 import NaiveK3
from skillsd.objective.objective import Objective, Terms
from skillsd.objective.opid import OPID
from skillsd.objective.rlsd import RLSD
from skillsd.objective.sdar import SDAR
from skillsd.objective.sdpg import SDPG
from skillsd.objective.sdpo import SDPO
from skillsd.objective.signal import Gate, Signal, Tokens, k3
from skillsd.objective.skill_sd import SkillSD
from skillsd.objective.ucob import UCOB

__all__ = [
    "OPID",
    "RLSD",
    "SDAR",
    "SDPG",
    "SDPO",
    "UCOB",
    "Gate",
    "NaiveK3",
    "Objective",
    "OutcomeGate",
    "PositiveGate",
    "SigmoidGate",
    "Signal",
    "SkillSD",
    "Terms",
    "Tokens",
    "TraceGate",
    "clipped_policy_loss",
    "float32_rewards",
    "group_advantages",
    "k3",
]
