"""What a chat template makes of a conversation: the same text on every day, and the token that ends an answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from skillsd.errors import ConfigError

log = logging.getLogger(__name__)
_DAY = datetime(2024, 7, 26)  # the one that Llama 3's templates fall back to
_ANSWER = "ANSWER"
_TODAY = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], generation: bool) -> str:
    """The text of a conversation. A template that writes today's date gets a fixed one: a run gives the same numbers tomorrow.

    Args:
        tokenizer: With a chat template.
        messages: Each with role and content.
        generation: True if the opening of the next answer follows.

    Raises:
        ConfigError: The template refuses the conversation, or fails.
    """
    turns = [dict(m) for m in messages]
    template = _dated(tokenizer.chat_template) if isinstance(tokenizer.chat_template, str) else None
    try:
        return str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=generation))
    except Exception as e:  # whatever the template's expressions raise
        why = " ".join(str(e).split()) or type(e).__name__
        raise ConfigError(f"model.policy.chat_template: the template fails on a plain conversation ({why}): name another one.") from e


@lru_cache(maxsize=16)
def _dated(template: str) -> str:
    """The template with a fixed date in place of today's."""
    fixed, n = _TODAY.subn(lambda m: repr(_DAY.strftime(m[2])), template)
    if n:
        log.warning("model.policy.chat_template writes the date: it is always %s here, so that runs can be repeated.", f"{_DAY:%d %b %Y}")
    return fixed


def closing_mark(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template puts behind an answer, perhaps after a blank; None if it puts another text there, or nothing."""
    said = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _ANSWER}]
    _, found, tail = render(tokenizer, said, generation=False).rpartition(_ANSWER)
    ids = tokenizer(tail.lstrip(), add_special_tokens=False).input_ids if found and tail.strip() else []
    return int(ids[0]) if ids and ids[0] in control_ids(tokenizer) else None


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of special tokens, without the one that stands for unknown text."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*added, *tokenizer.all_special_ids} - {tokenizer.unk_token_id})
