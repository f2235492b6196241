"""What the keys and values of rollouts may take of the learner's GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheBudget:
    """Sized in rows, so that a rollout knows with how many it can begin again.

    Args:
        rows: Rows that are sure to fit at one time, each with `tokens` tokens.
        tokens: See `rows`.
        keep: True if the cache, with the graphs that are recorded on it, stays between rollouts.
        prefill: Most tokens of one forward over prompts.
    """

    rows: int
    tokens: int
    keep: bool
    prefill: int

    @property
    def slots(self) -> int:
        """A slot for each row, and one for each prompt that rows may share."""
        return self.rows * 3 // 2

    def bytes(self, token_bytes: int) -> int:
        """The cache's size, rounded up as `engines.cache.SlotCache` does: whole blocks of 64 tokens and a spare index in each slot."""
        return self.slots * (-(-self.tokens // 64) * 64 + 1) * token_bytes
