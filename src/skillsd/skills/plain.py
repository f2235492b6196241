"""Text that others wrote, on its way into a prompt: it must not hold what a tokenizer reads as a control token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def control_texts(tokenizer: Any) -> tuple[str, ...]:
    """How the tokenizer's control tokens are written, e.g. `<|im_end|>`; the longest first."""
    added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]
    return tuple(sorted({t for t in (*tokenizer.all_special_tokens, *added) if t.strip()}, key=lambda t: (-len(t), t)))


def plain(text: str, control: Sequence[str]) -> str:
    """`text` with a space behind the first character of every control token that it spells out: `< |im_end|>`."""
    if not control:
        return text
    pattern = re.compile("|".join(map(re.escape, control)))
    while pattern.search(text):  # a gap may complete another one
        text = pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}" if len(found[0]) > 1 else " ", text)
    return text
