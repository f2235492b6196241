"""Skills: what a finished trajectory teaches, the bank that keeps them, and how one is chosen for the teacher."""

from skillsd.skills.bank import SkillBank
from skillsd.skills.context import (
    BankContext,
    GroundTruthContext,
    GroupContext,
    HindsightContext,
    NoContext,
    PrivilegedContext,
    ShuffledContext,
    SiblingContext,
)
from skillsd.skills.retrieval import select, ucb_score
from skillsd.skills.skill import FIELDS, SKILL_TEMPLATE, Skill
from skillsd.skills.summarisers import BaseSummariser, Finished, OpenAISummariser, RulesSummariser, Summariser, SynchronousSummariser
from skillsd.skills.tables import Eviction, ValueEstimate

__all__ = [
    "FIELDS",
    "SKILL_TEMPLATE",
    "BankContext",
    "BaseSummariser",
    "Eviction",
    "Finished",
    "GroundTruthContext",
    "GroupContext",
    "HindsightContext",
    "NoContext",
    "OpenAISummariser",
    "PrivilegedContext",
    "RulesSummariser",
    "ShuffledContext",
    "SiblingContext",
    "Skill",
    "SkillBank",
    "Summariser",
    "SynchronousSummariser",
    "ValueEstimate",
    "select",
    "ucb_score",
]
