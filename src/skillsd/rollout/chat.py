"""Conversations as append-only token ids.

A chat template is used twice only: for the first prompt, and for what stands between an answer and the next one. Nothing
that was sampled is ever decoded and encoded again. That is right only for a template whose rendering of a conversation begins
with its rendering of every shorter one; `Chat` refuses another at start-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from skillsd.errors import ConfigError

Message = Mapping[str, str]
_ANSWER = "ANSWER"


class Chat:
    """Turns messages into ids with a tokenizer's chat template.

    Args:
        tokenizer: With a chat template.
        stop_ids: Ids that end an answer.

    Raises:
        ConfigError: the template is not prefix-preserving.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
        self.tokenizer, self.stop_ids = tokenizer, frozenset(stop_ids)
        self.system_role = self._takes_system()
        self._check()
        self._tail = lru_cache(maxsize=65536)(self._tail_ids)

    def render(self, messages: Sequence[Message], generation: bool = True) -> str:
        """The text of a conversation. Where the template refuses a system role, its text heads the first user message."""
        turns = [dict(m) for m in messages]
        if turns[0]["role"] == "system" and not self.system_role:
            turns[1]["content"] = f"{turns[0]['content']}\n\n{turns[1]['content']}"
            turns = turns[1:]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text; special tokens are those the text names."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def prompt_ids(self, instruction: str, observation: str, skill: str = "") -> list[int]:
        """Ids of the first prompt, up to where the answer begins.

        Args:
            instruction: System text; an empty one is left out.
            observation: The first user message.
            skill: Prepended to whichever of the two comes first; empty for the student.
        """
        first = [{"role": "system", "content": skill + instruction}] if instruction else []
        content = observation if instruction else skill + observation
        return self.encode(self.render([*first, {"role": "user", "content": content}]))

    def turn_ids(self, observation: str, stopped: bool) -> list[int]:
        """Ids between an answer and the next one: its closing mark, the observation, the opening of the next answer.

        Args:
            observation: The user message.
            stopped: Whether the answer ended with a sampled stop token, which is then not repeated.
        """
        ids = self._tail(observation)
        return list(ids[1:] if stopped and ids[:1] and ids[0] in self.stop_ids else ids)

    def action_text(self, ids: Sequence[int]) -> str:
        """The answer as text, without its stop token."""
        kept = [i for i in ids if i not in self.stop_ids]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    def _tail_ids(self, observation: str) -> tuple[int, ...]:
        return tuple(self.encode(self._tail_text(observation)))

    def _tail_text(self, observation: str) -> str:
        messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": observation}]
        head, found, _ = self.render(messages[:2], generation=False).rpartition(_ANSWER)
        full = self.render(messages)
        if not found or not full.startswith(head + _ANSWER):
            raise self._refusal()
        return full[len(head) + len(_ANSWER) :]

    def _takes_system(self) -> bool:
        probe = [{"role": "system", "content": "SYSTEM-PROBE"}, {"role": "user", "content": "-"}]
        try:
            return "SYSTEM-PROBE" in str(self.tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True))
        except (TemplateError, ValueError):
            return False

    def _check(self) -> None:
        """Grow a conversation turn by turn, one answer with a thinking block, and compare with the template's rendering of the whole."""
        messages: list[Message] = [{"role": "system", "content": "s"}, {"role": "user", "content": "first"}]
        text = self.render(messages)
        for answer, observation in (("one", "second"), ("<think>\nhm\n</think>\n\ntwo", "third"), ("three", "fourth")):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": observation}]
            text += answer + self._tail_text(observation)
            if text != self.render(messages):
                raise self._refusal()

    def _refusal(self) -> ConfigError:
        return ConfigError(
            "policy.chat_template: the model's chat template is not prefix-preserving (it rewrites earlier turns): "
            "set policy.chat_template to a packaged one that is, e.g. qwen3 for Qwen3 models."
        )
