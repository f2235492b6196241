"""From trajectories to skills: by rules, by the policy's own base model, or by an OpenAI-compatible endpoint."""

from skillsd.skills.summarisers.base import BaseSummariser, Generate, SeedKey
from skillsd.skills.summarisers.checked import CheckedSummariser
from skillsd.skills.summarisers.openai import OpenAISummariser
from skillsd.skills.summarisers.prompt import FIELD_PROMPT, FIELD_QUESTIONS, SYSTEM_PROMPT, USER_PROMPT, analyst_messages
from skillsd.skills.summarisers.protocol import Finished, Summariser, SynchronousSummariser
from skillsd.skills.summarisers.rules import RulesSummariser

__all__ = [
    "FIELD_PROMPT",
    "FIELD_QUESTIONS",
    "SYSTEM_PROMPT",
    "USER_PROMPT",
    "BaseSummariser",
    "CheckedSummariser",
    "Finished",
    "Generate",
    "OpenAISummariser",
    "RulesSummariser",
    "SeedKey",
    "Summariser",
    "SynchronousSummariser",
    "analyst_messages",
]
