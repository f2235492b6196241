"""Conversations as append-only token ids.

A chat template is used twice only: for the first prompt, and for what stands between an answer and the next one. Nothing
that was sampled is ever decoded and encoded again. That is right only for a template whose rendering of a conversation begins
with its rendering of every shorter one, and which ends an answer with a token that ends sampling; `Chat` refuses another at start-up.

A special token's name in what is said (`<|im_end|>` in an observation) is text like any other: control tokens come from the
template and the policy alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import chain

from transformers import PreTrainedTokenizerBase

from skillsd.errors import ConfigError
from skillsd.policy.template import closing_mark, control_ids, render

Message = Mapping[str, str]
Text = str | tuple[str, ...]
"""What is to be encoded. Of several pieces each is encoded by itself: they part a special token's name after its first character."""
_ANSWER, _MARK = "ANSWER", "OBSERVATION-PROBE"
# Thoughts in the forms of several models: a template may leave them out of earlier answers.
_ANSWERS = (
    "one", "<think>\nhm\n</think>\n\ntwo", "hm\n</think>\n\nthree", "<reasoning>\nhm\n</reasoning>\nfour", "[THINK]hm[/THINK]five", "six",
)  # fmt: skip
_SAID = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
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
        stop_ids: Ids that end an answer; the template's closing mark is one of them in any case.

    Attributes:
        closing_ids: What the template puts behind an answer, to the closing mark; a blank may come before the mark.

    Raises:
        ConfigError: the template is not prefix-preserving, leaves out what is said, or ends no answer with a token to stop at.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
        mark = closing_mark(tokenizer)
        self.tokenizer, self.stop_ids = tokenizer, frozenset(stop_ids) | ({mark} if mark is not None else set())
        control = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        control |= {str(t) for t in (*tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens(sorted(self.stop_ids)))}
        names = "|".join(re.escape(t) for t in sorted(control) if len(t) > 1)
        self._control, self._begins = re.compile(names or "(?!)"), re.compile(f"(?s)(?={names or '(?!)'})(.)")
        self.system_role = self._takes_system()
        self._around: tuple[str, str] | None = None
        self._known: dict[Text, list[int]] = {}
        self._kept = 0
        self._first = lru_cache(maxsize=256)(self._first_text)
        for instruction in ("s", ""):
            self._check(instruction)
        self.closing_ids = self._closing()
        self._compare()
        self._around = self._verbatim()
        self._known, self._kept = {}, 0
        self._read = lru_cache(maxsize=1024)(self._decode)

    def render(self, messages: Sequence[Message], generation: bool = True) -> str:
        """The text of a conversation. Where the template refuses a system role, its text heads the first user message."""
        turns = [dict(m) for m in messages]
        if turns[0]["role"] == "system" and not self.system_role:
            turns[1]["content"] = f"{turns[0]['content']}\n\n{turns[1]['content']}"
            turns = turns[1:]
        return render(self.tokenizer, turns, generation)

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text; special tokens are those the text names."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode_many(self, texts: Sequence[Text]) -> list[list[int]]:
        """`encode` of each, or of its pieces; those not met lately go through the tokenizer together. The lists are not to be changed."""
        if new := [t for t in dict.fromkeys(texts) if t not in self._known]:
            whole = [t for t in new if isinstance(t, str)]
            got: dict[Text, list[int]] = {t: list(chain(*map(self.encode, t))) for t in new if isinstance(t, tuple)}
            got |= zip(whole, self.tokenizer(whole, add_special_tokens=False).input_ids if whole else [], strict=True)
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

    def _first_text(self, instruction: str, observation: str, skill: str) -> Text:
        if not instruction:
            return self._guarded(lambda said: self.render([{"role": "user", "content": said}]), skill + observation)
        return self._guarded(
            lambda rules, said: self.render([{"role": "system", "content": rules}, {"role": "user", "content": said}]),
            skill + instruction, observation,
        )  # fmt: skip

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a whole conversation, up to where the next answer begins."""

        def render(*said: str) -> str:
            return self.render([{**m, "content": c} for m, c in zip(messages, said, strict=True)])

        return list(self.encode_many([self._guarded(render, *(m["content"] for m in messages))])[0])

    def _guarded(self, render: Callable[..., str], *contents: str) -> Text:
        """Render texts so that no special token is read in them."""
        if not any(map(self._control.search, contents)):
            return render(*contents)
        mark = "\ue000"
        while any(mark in c for c in contents):
            mark += "\ue000"
        return tuple(render(*(self._begins.sub(lambda m: m[1] + mark, c) for c in contents)).split(mark))

    def prompt_ids_many(self, firsts: Sequence[tuple[str, str, str]]) -> list[list[int]]:
        """`prompt_ids` of each (instruction, observation, skill). Not to be changed."""
        return self.encode_many([self._first(*f) for f in firsts])

    def turn_ids(self, observation: str, stopped: bool) -> list[int]:
        """Ids between an answer and the next one: its closing mark, the observation, the opening of the next answer.

        Args:
            observation: The user message.
            stopped: True if the answer ended with a sampled stop token, which is then not repeated.
        """
        return list(self.turn_ids_many([observation], [stopped])[0])

    def turn_ids_many(self, observations: Sequence[str], stopped: Sequence[bool]) -> list[list[int]]:
        """`turn_ids` of each. Not to be changed."""
        tails = self.encode_many([self._guarded(self._tail, o) for o in observations])
        n = len(self.closing_ids)
        return [ids[n:] if s else ids for ids, s in zip(tails, stopped, strict=True)]

    def action_text(self, ids: Sequence[int]) -> str:
        """The answer as text, without its stop token."""
        return self._read(tuple(i for i in ids if i not in self.stop_ids))

    def _decode(self, ids: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _tail(self, observation: str) -> str:
        if self._around is not None:
            return self._around[0] + observation + self._around[1]
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
            same = all(self._rendered_tail(p) == before + p + after for p in _PROBES)
        except ConfigError:
            return None
        return (before, after) if same else None

    def _takes_system(self) -> bool:
        probe = [{"role": "system", "content": "SYSTEM-PROBE"}, {"role": "user", "content": "-"}]
        try:
            return "SYSTEM-PROBE" in render(self.tokenizer, probe, generation=True)
        except ConfigError:
            return False

    def _check(self, instruction: str) -> None:
        """Grow a conversation turn by turn, some answers with thinking blocks, and compare with the template's rendering of the whole."""
        messages: list[Message] = [{"role": "system", "content": instruction}] if instruction else []
        messages.append({"role": "user", "content": _SAID[0]})
        text = self.render(messages)
        for answer, observation in zip(_ANSWERS, _SAID[1:], strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": observation}]
            text += answer + self._tail(observation)
            if text != self.render(messages):
                raise self._refusal()
        if missing := [said for said in _SAID if said not in text]:
            raise ConfigError(
                f"model.policy.chat_template: the template leaves out what the user says ({missing[0]!r}), so the model would see no "
                "observation: name one that renders plain text."
            )

    def _closing(self) -> list[int]:
        """The ids that end an answer, by the template."""
        tail = self._rendered_tail("-")
        mark, ids = self.encode(tail.lstrip())[:1], self.encode(tail)
        if mark and mark[0] in self.stop_ids and mark[0] in ids:
            return ids[: ids.index(mark[0]) + 1]
        raise ConfigError(
            f"model.policy.chat_template: no token ends an answer: the template goes on with {tail.strip()[:40]!r} behind it, which begins "
            "neither with the tokenizer's eos_token nor with a special token that closes an answer, so every answer would run to its "
            "limit: name a template that ends answers with a special token."
        )

    def _compare(self) -> None:
        """Grow a conversation in ids, with sampled stops and without: its control tokens are those of the template's rendering of the
        whole. Other ids may differ, as the model need not sample an answer in the tokens in which it would be encoded."""
        control = control_ids(self.tokenizer) | self.stop_ids
        for stopped in (True, False):
            messages: list[Message] = [{"role": "system", "content": "s"}, {"role": "user", "content": _SAID[0]}]
            ids = self.prompt_ids("s", _SAID[0])
            for answer, observation in zip(("one", "two", "three"), _SAID[1:], strict=False):
                ids += [*self.encode(answer), *(self.closing_ids[-1:] if stopped else []), *self.turn_ids(observation, stopped)]
                messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": observation}]
            whole = self.encode(self.render(messages))
            if [i for i in ids if i in control] != [i for i in whole if i in control]:
                raise self._refusal()

    def _refusal(self) -> ConfigError:
        return ConfigError(
            "model.policy.chat_template: the model's chat template is not prefix-preserving (it rewrites earlier turns): "
            "set model.policy.chat_template to a packaged one that is, e.g. qwen3 for Qwen3 models."
        )
