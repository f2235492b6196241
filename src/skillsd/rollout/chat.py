"""Conversations as append-only token ids.

A chat template is used twice only: for the first prompt, and for what stands between an answer and the next one. Nothing
that was sampled is ever decoded and encoded again. That is right only for a template whose rendering of a conversation begins
with its rendering of every shorter one; `Chat` refuses another at start-up.

What a message says is text: the name of a special token in it gets a space behind its first character (`plain`), so that neither an
environment nor a skill can end a turn or open one. Control ids come from the template and from sampling alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from skillsd.errors import ConfigError

Message = Mapping[str, str]
_ANSWER, _MARK = "ANSWER", "OBSERVATION-PROBE"
# What a template might do something to: strip, escape, read as markup or as a thought, leave out.
_PROBES = (
    "", " ", "\n", "a", " a  b ", "\n\na\n\n", "\ta\r\n", "é 漢字 🙂 \u00a0", "<b>&amp;</b> \"a\" 'b' \\n", "{{ a }} {% if a %} {# a #}",
    "<think>\na\n</think>\n\nb", "</think>", "<tool_call>a</tool_call>", "<tool_response>a</tool_response>", "<|im_end|>", "<|eot_id|>",
    "[INST] a [/INST]", "<image>", "/no_think", "None", "0", "[]", "- a\n- b", _ANSWER, "a" * 5000,
)  # fmt: skip
_KEPT = 1 << 22  # ids kept of texts that may come again


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
        names = {*tokenizer.all_special_tokens, *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)}
        self._special = re.compile("|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name)))) or r"(?!)")
        self.system_role = self._takes_system()
        self._around: tuple[str, str] | None = None
        self._check()
        self._around = self._verbatim()
        self._known: dict[str, list[int]] = {}
        self._kept = 0
        self._first = lru_cache(maxsize=256)(self._first_text)
        self._read = lru_cache(maxsize=1024)(self._decode)

    def render(self, messages: Sequence[Message], generation: bool = True) -> str:
        """The text of a conversation. Where the template refuses a system role, its text heads the first user message."""
        turns = [{"role": m["role"], "content": self.plain(m["content"])} for m in messages]
        if turns[0]["role"] == "system" and not self.system_role:
            turns[1]["content"] = f"{turns[0]['content']}\n\n{turns[1]['content']}"
            turns = turns[1:]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))

    def plain(self, text: str) -> str:
        """`text` without the names of special tokens (`<|im_end|>` becomes `< |im_end|>`) and without lone surrogates."""
        return self._special.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text.encode("utf-8", "replace").decode())

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text; special tokens are those the text names."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each; those not met lately go through the tokenizer together. The lists are shared: they are not to be changed."""
        if new := [t for t in dict.fromkeys(texts) if t not in self._known]:
            got = dict(zip(new, self.tokenizer(new, add_special_tokens=False).input_ids, strict=True))
            out = [got[t] if t in got else self._known[t] for t in texts]
            if self._kept > _KEPT:
                self._known, self._kept = {}, 0
            self._known |= got
            self._kept += sum(map(len, got.values()))
            return out
        return [self._known[t] for t in texts]

    def prompt_ids(self, instruction: str, observation: str, skill: str = "") -> list[int]:
        """Ids of the first prompt, up to where the answer begins.

        Args:
            instruction: System text; an empty one is left out.
            observation: The first user message.
            skill: Prepended to whichever of the two comes first; empty for the student.
        """
        return list(self.encode_many([self._first(instruction, observation, skill)])[0])

    def _first_text(self, instruction: str, observation: str, skill: str) -> str:
        first = [{"role": "system", "content": skill + instruction}] if instruction else []
        content = observation if instruction else skill + observation
        return self.render([*first, {"role": "user", "content": content}])

    def prompt_ids_many(self, firsts: Sequence[tuple[str, str, str]]) -> list[list[int]]:
        """`prompt_ids` of each (instruction, observation, skill). Not to be changed."""
        return self.encode_many([self._first(*f) for f in firsts])

    def turn_ids(self, observation: str, stopped: bool) -> list[int]:
        """Ids between an answer and the next one: its closing mark, the observation, the opening of the next answer.

        Args:
            observation: The user message.
            stopped: Whether the answer ended with a sampled stop token, which is then not repeated.
        """
        return list(self.turn_ids_many([observation], [stopped])[0])

    def turn_ids_many(self, observations: Sequence[str], stopped: Sequence[bool]) -> list[list[int]]:
        """`turn_ids` of each. Not to be changed."""
        tails = self.encode_many([self._tail_text(o) for o in observations])
        return [ids[1:] if s and ids[:1] and ids[0] in self.stop_ids else ids for ids, s in zip(tails, stopped, strict=True)]

    def action_text(self, ids: Sequence[int]) -> str:
        """The answer as text, without its stop token."""
        return self._read(tuple(i for i in ids if i not in self.stop_ids))

    def _decode(self, ids: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _tail_text(self, observation: str) -> str:
        if self._around is not None:
            return self._around[0] + self.plain(observation) + self._around[1]
        return self._rendered_tail(observation)

    def _rendered_tail(self, observation: str) -> str:
        messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": observation}]
        head, found, _ = self.render(messages[:2], generation=False).rpartition(_ANSWER)
        full = self.render(messages)
        if not found or not full.startswith(head + _ANSWER):
            raise self._refusal()
        return full[len(head) + len(_ANSWER) :]

    def _verbatim(self) -> tuple[str, str] | None:
        """What the template puts before and after an observation that it leaves as it is; None if it changes any of the probes."""
        before, found, after = self._rendered_tail(_MARK).partition(_MARK)
        if not found or _MARK in after:
            return None
        try:
            same = all(self._rendered_tail(p) == before + self.plain(p) + after for p in _PROBES)
        except (TemplateError, ValueError):
            return None
        return (before, after) if same else None

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
