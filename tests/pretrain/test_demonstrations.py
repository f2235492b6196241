"""Demonstrations: reproducible, optimal labels, and what is learnt where the executed answer leaves them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tests import sokoban
from tests.sokoban import ENV, TEMPLATE, rules

from skillsd.demonstration import demonstrate
from skillsd.environment import make_env
from skillsd.errors import ConfigError
from skillsd.policy.nano import build_tokenizer
from skillsd.pretrain import DemonstrationSettings
from skillsd.pretrain.demonstrations import Demonstrations, collate
from skillsd.rollout import Chat
from skillsd.trajectory import Turn

KWARGS = sokoban.KWARGS | {
    "difficulties": {"short": {"lengths": [3, 8]}}, "splits": {"pretrain": {"short": 1}, "test": {"short": 2}}, "max_turns": 12,
}  # fmt: skip
RULES = rules()
TOKENIZER = build_tokenizer()
END = TOKENIZER.eos_token_id


def make(seed: int = 0, env: dict[str, Any] | None = None, **settings: Any) -> Demonstrations:
    chat = Chat(TOKENIZER, [END])
    return Demonstrations(ENV, KWARGS | (env or {}), chat, RULES, TEMPLATE, DemonstrationSettings(**settings), seed)


def word(text: str) -> int:
    return TOKENIZER.convert_tokens_to_ids(text)


def learnt(ids: list[int], labels: list[int]) -> list[tuple[str, str]]:
    """(token, label) wherever something is learnt."""
    pairs = [(i, y) for i, y in zip(ids, labels, strict=True) if y != -100]
    return [(TOKENIZER.convert_ids_to_tokens(i), TOKENIZER.convert_ids_to_tokens(y)) for i, y in pairs]


def test_an_item_is_a_function_of_seed_and_index():
    here = make()
    items = [here[i] for i in range(8)]
    there = make()
    assert [there[i] for i in (5, 0, 7)] == [items[5], items[0], items[7]]  # in any order, from any worker
    assert [make(seed=1)[i] for i in range(8)] != items and [make(noise=0.9)[i] for i in range(8)] != items
    assert len({tuple(ids) for ids, _ in items}) > 5 and len(here) == 100_000


def test_half_carry_a_skill():
    items = [make()[i] for i in range(200)]
    front = word("skill")
    share = sum(ids[0] == front for ids, _ in items) / 200
    assert 0.4 < share < 0.6
    assert all(ids[0] != front for ids, _ in [make(skill_share=0.0)[i] for i in range(10)])
    always = [make(skill_share=1.0, noisy_skill_share=0.0)[i][0] for i in range(10)]
    assert all(ids[:4] == [front, word("solved"), word("none"), word(":")] for ids in always)


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_labels_are_optimal(noise):
    env, checker, off = make_env(ENV, KWARGS), make_env(ENV, KWARGS), 0
    for index in range(12):
        task = env.stream("pretrain", index)
        played, labels = demonstrate(env, task, noise, random.Random(index))
        checker.reset(task)
        optimal = checker.info["optimal_length"]
        assert played.instruction == "" and len(played.turns) == len(labels)
        for turn, label in zip(played.turns, labels, strict=True):
            assert checker.unwrapped.render() == turn.observation
            assert label == checker.solution()[0] and label in checker.unwrapped.actions
            off += turn.action != label
            assert checker.step(turn.action).reward == turn.reward
        if not noise:
            assert played.success and len(played.turns) == optimal and played.turns[-1].reward == 1.0
    assert (off > 0) == (noise > 0)


def test_only_answers_are_learnt():
    """Single-token actions: executed or not, the label of the move is the solver's; the end mark is learnt behind a label alone."""
    data, moves = make(noise=0.3), {"up", "down", "left", "right"}
    followed = left = 0
    for index in range(20):
        ids, labels = data[index]
        assert len(ids) == len(labels) and ids[-1] == END
        answers = [i for i, t in enumerate(ids) if i and ids[i - 1] == word("<|assistant|>")]
        for at in answers:
            executed, label = (TOKENIZER.convert_ids_to_tokens(x[at]) for x in (ids, labels))
            assert {executed, label} <= moves and ids[at + 1] == END
            assert labels[at + 1] == (END if executed == label else -100)
            followed, left = followed + (executed == label), left + (executed != label)
        rest = set(range(len(ids))) - {a + k for a in answers for k in (0, 1)}
        assert all(labels[i] == -100 for i in rest)
    assert followed > 40 and left > 8


@pytest.mark.parametrize(
    ("executed", "label", "want"),
    [
        ("up left", "up left", ["up up", "left left", "<|end|> <|end|>"]),
        ("up down", "up left", ["up up", "down left"]),
        ("down left", "up left", ["down up"]),
        ("up", "up left", ["up up", "<|end|> left"]),  # it stopped too early
        ("up left", "up", ["up up", "left <|end|>"]),  # and too late
        ("up", "up", ["up up", "<|end|> <|end|>"]),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_labels_where_the_executed_action_is_another_than_the_label(executed, label, want, last):
    turns = [Turn("#####\n#P__#\n#_XO#\n#___#\n#####", executed, 0.0)] + [Turn("#####\n#_P_#\n#_XO#\n#___#\n#####", "down", 0.0)] * (
        not last
    )
    ids, labels = make().encode(turns, [label, "down"], "", "")
    tail = [] if last else [("down", "down"), ("<|end|>", "<|end|>")]
    assert learnt(ids, labels) == [tuple(x.split()) for x in want] + tail
    # The ids are what a conversation in which that was executed renders to, whatever the label.
    messages = [m for t in turns for m in ({"role": "user", "content": t.observation}, {"role": "assistant", "content": t.action})]
    assert ids == make().chat.encode(make().chat.render(messages, generation=False))


def test_several_actions_a_turn():
    data = make(env={"actions_per_turn": 3}, noise=0.4, skill_share=0.0)
    pairs = [p for index in range(15) for p in learnt(*data[index])]
    assert any(a != b for a, b in pairs) and any(a == b for a, b in pairs)
    assert any(a == "<|end|>" != b for a, b in pairs)


def test_long_episodes_are_cut():
    ids, _ = make(max_turns=2, noise=0.0, skill_share=0.0)[0]
    assert ids.count(word("<|assistant|>")) == 2


def test_an_environment_without_a_solver():
    with pytest.raises(ConfigError, match=r"data\.env: CartPole-v1 .*solution\(\)"):
        Demonstrations("CartPole-v1", {}, Chat(TOKENIZER, [END]), RULES, TEMPLATE)[0]


def test_collate_pads_on_the_right():
    ids, labels = collate([([1, 2, 3], [-100, 2, 3]), ([4], [-100])])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]] and labels.tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert ids.dtype == torch.int64
