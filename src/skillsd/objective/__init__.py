"""The mathematics: pure functions on tensors, composed by `Objective`."""

from skillsd.objective.advantage import group_advantages
from skillsd.objective.distillation import ESTIMATORS, k3, score, skill_sd
from skillsd.objective.objective import Objective, Terms
from skillsd.objective.policy_loss import clipped_policy_loss

__all__ = ["ESTIMATORS", "Objective", "Terms", "clipped_policy_loss", "group_advantages", "k3", "score", "skill_sd"]
