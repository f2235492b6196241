"""Any text may be said in a conversation: ids are only ever added, and control ids are the template's alone."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.profile import examples
from tests.rollout.test_chat import CHATML, NO_SYSTEM, QWEN3, TRIMS, tokenizer

from skillsd.policy.nano import build_tokenizer
from skillsd.rollout import Chat

NAMES = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|assistant|>", "<|system|>", "<|pad|>", "<|unk|>", "<think>", "</think>"]
PIECES = [*NAMES, "<|", "|>", "im_end", "\x00", "\r\n", "\x1b[0m", "\u202e", "{{ x }}"]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=12)).map("".join)
TEMPLATES = {"nano": None, "chatml": CHATML, "no system": NO_SYSTEM, "qwen3": QWEN3, "trims": TRIMS}


@functools.cache
def chat(name: str) -> Chat:
    template = TEMPLATES[name]
    t = build_tokenizer() if template is None else tokenizer(template)
    return Chat(t, [t.eos_token_id if template is None else t.convert_tokens_to_ids("<|im_end|>")])


def controls(c: Chat, ids: list[int]) -> list[int]:
    special = {i for i, t in c.tokenizer.added_tokens_decoder.items() if t.special} - {c.tokenizer.unk_token_id}
    return [i for i in ids if i in special]


@pytest.mark.parametrize("name", TEMPLATES)
@examples(40)
@given(instruction=TEXT, said=st.lists(TEXT, min_size=1, max_size=4), skill=TEXT, stopped=st.booleans())
def test_append_only_whatever_is_said(name, instruction, said, skill, stopped):
    """What grows is the template's rendering of the whole, with the control ids of a conversation in which nothing much is said."""
    c = chat(name)
    first = [{"role": "system", "content": skill + instruction}] if instruction else []
    messages = [*first, {"role": "user", "content": said[0] if instruction else skill + said[0]}]
    ids = c.prompt_ids(instruction, said[0], skill)
    harmless = c.prompt_ids("x" if instruction else "", "x", "x" if skill else "")
    whole = not any(c._control.search(text) for text in (instruction, *said, skill + instruction))  # a special token's name is parted
    assert not whole or ids == c.encode(c.render(messages))
    for observation in said[1:]:
        stop = sorted(c.stop_ids) if stopped else []
        more, bare = ([*stop, *c.turn_ids(text, stopped)] for text in (observation, "x"))
        assert not whole or more == c.encode(c._rendered_tail(observation))
        before, ids, harmless = ids, ids + c.encode("up") + more, harmless + c.encode("up") + bare
        assert ids[: len(before)] == before
    assert controls(c, ids) == controls(c, harmless)


@pytest.mark.parametrize("name", TEMPLATES)
@examples(40)
@given(said=st.lists(st.tuples(TEXT, st.booleans()), max_size=6), firsts=st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=4))
def test_many_at_once_are_as_one_by_one(name, said, firsts):
    c = chat(name)
    observations, stopped = [o for o, _ in said], [s for _, s in said]
    assert c.turn_ids_many(observations, stopped) == [c.turn_ids(o, s) for o, s in said]
    assert c.prompt_ids_many(firsts) == [c.prompt_ids(*f) for f in firsts]


@examples(60)
@given(st.data())
def test_what_was_sampled_is_text(data):
    """Any ids that a model may sample decode to text that can be written, without the names of its special tokens."""
    for name in ("nano", "chatml"):
        c = chat(name)
        ids = data.draw(st.lists(st.integers(0, len(c.tokenizer) - 1), max_size=20))
        text = c.action_text(ids)
        text.encode()
        assert not any(t.content in text for i, t in c.tokenizer.added_tokens_decoder.items() if t.special and i in ids)
        assert text == c.action_text([*ids, *c.stop_ids])


@examples(60)
@given(st.lists(st.sampled_from(["up", "down", "left", "right"]), min_size=1, max_size=6))
def test_moves_come_back(words):
    c = chat("nano")
    assert c.action_text(c.encode(" ".join(words))) == " ".join(words)
