"""The collector on an environment and an engine that do whatever they like: the record is what the engine was fed and what it gave."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.profile import examples
from tests.rollout.scripted import Scripted

from skillsd.engines.engine import Completion, Request
from skillsd.policy.nano import build_tokenizer
from skillsd.rollout import Chat, Collector, Episode, RolloutSettings
from skillsd.trajectory import Task

SAID = st.lists(st.sampled_from(["up", "wall", "<|end|>", "<|assistant|>", "#", "\x00", "é"]) | st.text(max_size=4), max_size=8).map(
    " ".join
)
STEPS = st.lists(st.tuples(SAID, st.sampled_from(["go", "done", "horizon", "failed"])), min_size=1, max_size=5)


class Whatever(gymnasium.Env):
    """Says what its task's options list; after the last it ends."""

    observation_space = action_space = gymnasium.spaces.Text(1)

    def reset(self, *, seed=None, options=None):
        self.steps, self.actions = list(options["steps"]), options["actions"]
        self.actions.clear()
        return options["first"], {"task_id": options["task_id"], "instruction": options["instruction"]}

    def step(self, action):
        said, end = self.steps.pop(0)
        self.actions.append(action)
        end = end if self.steps else "done"
        info = {"completion": 0.5, "success": end == "done"} | ({"failed": "gone"} if end == "failed" else {})
        return said, 0.5 if end == "done" else 0.0, end in ("done", "failed"), end == "horizon", info


class Fed(Scripted):
    """Answers as drawn, cut at the limit; keeps all that each row was fed and gave, in order."""

    continuous = False

    def __init__(self, answers: Sequence[Sequence[int]], stop: int) -> None:
        super().__init__([], stop)
        self.answers, self.n = answers, 0
        self.context: dict[int, list[int]] = {}
        self.first: dict[int, int] = {}
        self.sampled: dict[int, list[bool]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.limits: list[tuple[int, int]] = []

    def submit(self, requests: Sequence[Request]) -> None:
        for r in requests:
            context = self.context.setdefault(r.row, [])
            if context:
                assert r.position == len(context) + len(r.new_ids) - self.first[r.row]
            else:
                self.first[r.row] = len(r.new_ids)
                assert r.position == 0
            context += r.new_ids
            self.sampled.setdefault(r.row, []).extend([False] * len(r.new_ids))
            self.logprobs.setdefault(r.row, []).extend([0.0] * len(r.new_ids))
        self.given += requests

    def step(self) -> list[tuple[int, Completion]]:
        given, self.given = self.given, []
        out = []
        for r in given:
            self.n += 1
            ids = list(self.answers[self.n % len(self.answers)])[: r.limit]
            assert r.limit >= 1
            self.limits.append((r.limit, len(ids)))
            logprobs = [-0.25 * self.n] * len(ids)
            self.context[r.row] += ids
            self.sampled[r.row] += [True] * len(ids)
            self.logprobs[r.row] += logprobs
            out.append((r.row, Completion(ids, logprobs, ids[-1] == self.stop)))
        return out

    def forget(self, rows: Iterable[int]) -> None:
        pass


@functools.cache
def nano() -> Chat:
    t = build_tokenizer()
    return Chat(t, [t.eos_token_id])


@examples(150)
@given(
    episodes=st.lists(st.tuples(SAID, SAID, STEPS, SAID), min_size=1, max_size=4),
    answers=st.lists(st.tuples(st.lists(st.integers(5, 60), min_size=1, max_size=5), st.booleans()), min_size=1, max_size=4),
    limits=st.fixed_dictionaries({
        "max_turn_tokens": st.integers(1, 6), "max_trajectory_tokens": st.integers(1, 60), "max_prompt_tokens": st.integers(1, 40),
        "max_rows": st.integers(1, 4), "env_workers": st.sampled_from([0, 0, 2]),
    }),
    context=st.integers(1, 80),
)  # fmt: skip
def test_the_record_is_what_the_engine_saw(episodes, answers, limits, context):
    gymnasium.register("test/Whatever-v0", Whatever, disable_env_checker=True, order_enforce=False)
    chat = nano()
    (stop,) = chat.stop_ids
    engine = Fed([[*ids, stop] if stopped else ids for ids, stopped in answers], stop)
    actions: list[list[str]] = [[] for _ in episodes]
    rows = [
        Episode(Task(str(i), options={"first": first, "instruction": instruction, "steps": steps, "actions": actions[i]}), i, skill)
        for i, (first, instruction, steps, skill) in enumerate(episodes)
    ]
    collector = Collector("test/Whatever-v0", {}, chat, engine, RolloutSettings(**limits), context)
    try:
        played: list[Any] = collector.collect(rows, seed=3, iteration=2)
    finally:
        collector.close()
        del gymnasium.registry["test/Whatever-v0"]
    assert [(t.task_id, t.member, t.seed, t.iteration) for t in played] == [(str(i), i, 3, 2) for i in range(len(rows))]
    for i, (t, (first, instruction, steps, skill)) in enumerate(zip(played, episodes, strict=True)):
        assert list(t.prompt_ids) == chat.prompt_ids(instruction, first, skill)
        n = len(t.token_ids)
        assert len(t.action_mask) == len(t.logprobs) == n
        fed = engine.context.get(i, list(t.prompt_ids))  # a row whose prompt is too long is never fed
        assert [*t.prompt_ids, *t.token_ids] == fed
        p = len(t.prompt_ids)
        assert list(t.action_mask) == engine.sampled.get(i, [False] * p)[p:]
        assert list(t.logprobs) == engine.logprobs.get(i, [0.0] * p)[p:]
        assert all(x == 0.0 for x, sampled in zip(t.logprobs, t.action_mask, strict=True) if not sampled)
        if t.turns:
            assert p <= limits["max_prompt_tokens"] and p + n <= context and n <= limits["max_trajectory_tokens"]
            assert t.action_mask[0] and t.action_mask[-1]  # nothing of the environment's behind the last answer
        assert [turn.action for turn in t.turns] == actions[i] if t.turns else t.finish_reason == "length"
        assert [turn.observation for turn in t.turns] == [first, *(said for said, _ in steps)][: len(t.turns)]
        ended = steps[len(t.turns) - 1][1] if 0 < len(t.turns) < len(steps) else "done"
        if t.finish_reason != "length":
            assert t.finish_reason == ended and t.success == (ended == "done")
            assert (t.reward, t.failure) == (0.5 if ended == "done" else 0.0, "environment: gone" if ended == "failed" else "")
    assert all(1 <= used <= limit <= limits["max_turn_tokens"] for limit, used in engine.limits)
