"""The bank against a model of a few lines, under any sequence of its public calls."""

from __future__ import annotations

import tempfile
from functools import reduce
from operator import add
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from tests.properties.profile import examples

from skillsd.skills import Skill, SkillBank, select
from skillsd.skills.tables import BEFORE

TASKS = st.sampled_from(["a", "b", "é 漢"])
REWARDS = st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0])
TEXTS = st.sampled_from(["x", "y", "z", "w"])


class Model:
    """What the documentation says: every event by iteration, and the state that follows from them, computed anew."""

    def __init__(self, capacity: int | None, eviction: str, value_estimate: str) -> None:
        self.capacity, self.eviction, self.value_estimate = capacity, eviction, value_estimate
        self.calls: list[tuple] = []
        """(iteration, "insert", skill) or (iteration, "use", id, reward, gap)"""

    def state(self) -> tuple[list[dict], int, int]:
        """Every skill ever inserted, what was merged, and the number of events."""
        all_skills: list[dict] = []
        merged = events = 0
        for call in self.calls:
            if call[1] == "use":
                s = all_skills[call[2] - 1]
                s["uses"].append(call[3] if self.value_estimate == "next_visit" else call[4])
                events += 1
                continue
            skill: Skill = call[2]
            twin = [s for s in all_skills if s["live"] and (s["task"], s["texts"]) == (skill.task_id, skill.texts)]
            events += 1
            if twin:
                twin[0]["sources"] += 1
                merged += 1
                continue
            all_skills.append({
                "id": len(all_skills) + 1, "task": skill.task_id, "texts": skill.texts, "sources": 1, "uses": [], "live": True,
                "source": skill.source_reward,
            })  # fmt: skip
            here = [s for s in all_skills if s["live"] and s["task"] == skill.task_id]
            if self.capacity is not None and len(here) > self.capacity:
                worst = here[0] if self.eviction == "oldest" else min(here, key=lambda s: (self.mean(s), s["id"]))
                worst["live"] = False
                events += 1
        return all_skills, merged, events

    def mean(self, s: dict) -> float:
        if self.value_estimate == "source" or not (s["uses"] or self.value_estimate == "gap"):
            return s["source"]
        return reduce(add, s["uses"]) / len(s["uses"]) if s["uses"] else 0.0  # `sum` of later Pythons rounds less


class Banks(RuleBasedStateMachine):
    """A bank in a file, now and then closed and opened again."""

    @initialize(
        capacity=st.sampled_from([None, 1, 2, 3]), eviction=st.sampled_from(["worst", "oldest"]),
        value_estimate=st.sampled_from(["source", "next_visit", "gap"]),
    )  # fmt: skip
    def open(self, capacity, eviction, value_estimate):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "bank.sqlite"
        self.settings = {"capacity": capacity, "eviction": eviction, "value_estimate": value_estimate}
        self.model, self.iteration = Model(**self.settings), BEFORE
        self.bank = SkillBank(self.path, **self.settings)

    def teardown(self):
        if hasattr(self, "bank"):
            self.bank.close()
            self.folder.cleanup()

    @rule(new=st.lists(st.tuples(TASKS, TEXTS, REWARDS), max_size=4), later=st.booleans())
    def insert(self, new, later):
        self.iteration += later
        skills = [Skill(text, f"{text}?", "w", task, source_reward=reward, source_iteration=self.iteration) for task, text, reward in new]
        ids = self.bank.insert(skills, self.iteration)
        for skill, skill_id in zip(skills, ids, strict=True):
            self.model.calls.append((self.iteration, "insert", skill))
            named = self.model.state()[0][skill_id - 1]
            assert (named["task"], named["texts"]) == (skill.task_id, skill.texts)

    @rule(data=st.data())
    def fail(self, data):
        """In the middle of a call: nothing of it stays."""
        new = data.draw(st.lists(st.tuples(TASKS, TEXTS), max_size=4))
        with pytest.raises(UnicodeEncodeError):
            self.bank.insert([*(Skill(text, "?", "w", task) for task, text in new), Skill("x", "y", "z", "\ud800")], self.iteration)

    @precondition(lambda self: self.model.calls)
    @rule(data=st.data(), reward=REWARDS, gap=st.sampled_from([-1.1, 0.0, 0.3]), later=st.booleans())
    def use(self, data, reward, gap, later):
        self.iteration += later
        skill_id = data.draw(st.integers(1, len(self.model.state()[0])))
        self.bank.record_use(skill_id, self.iteration, reward=reward, gap=gap)
        self.model.calls.append((self.iteration, "use", skill_id, reward, gap))

    @rule(back=st.integers(0, 3), wrong=st.booleans())
    def cut(self, back, wrong):
        iteration = max(BEFORE, self.iteration - back)
        events = self.model.state()[2]
        kept = Model(**self.settings)
        kept.calls = [call for call in self.model.calls if call[0] < iteration]
        rest = kept.state()[2]
        if wrong:
            with pytest.raises(ValueError, match="does not belong"):
                self.bank.cut(iteration, expect=rest + 1)
            return
        assert self.bank.cut(iteration, expect=rest) == events - rest
        self.model, self.iteration = kept, iteration

    @rule(read_only=st.booleans())
    def open_again(self, read_only):
        if not read_only:
            self.bank.close()
            self.bank = SkillBank(self.path, **self.settings)
            return
        with SkillBank(self.path, read_only=True) as other:  # while the run goes on
            assert (other.position, other.value_estimate, other.stats()) == (
                self.bank.position,
                self.bank.value_estimate,
                self.bank.stats(),
            )
            with pytest.raises(OSError):
                other.insert([Skill("x", "y", "z", "new")], self.iteration)
            assert "new" not in other.tasks()

    @rule()
    def refuse(self):
        """What is refused changes nothing."""
        self.bank.insert([], self.iteration)
        for bad in (Skill("x", "y", "z"), Skill("x", "y", "z", "a", source_reward=float("nan"))):
            with pytest.raises(ValueError):
                self.bank.insert([Skill("new", "y", "z", "a"), bad], self.iteration)
        with pytest.raises(KeyError):
            self.bank.record_use(len(self.model.state()[0]) + 1, self.iteration, reward=0.0, gap=0.0)
        if self.bank.position:
            with pytest.raises(ValueError, match="lies before"):
                self.bank.insert([Skill("new", "y", "z", "a")], self.last - 1)

    @property
    def last(self) -> int:
        return self.model.calls[-1][0]

    @invariant()
    def equal_to_the_model(self):
        if not hasattr(self, "bank"):
            return
        all_skills, merged, events = self.model.state()
        live = [s for s in all_skills if s["live"]]
        assert self.bank.position == events and len(self.bank) == len(live)
        imported = Model(**self.settings)
        imported.calls = [call for call in self.model.calls if call[0] == BEFORE]
        assert self.bank.imported == imported.state()[2]
        assert self.bank.tasks() == sorted({s["task"] for s in live})
        for s in all_skills:
            got = self.bank.get(s["id"])
            assert (got.skill_id, got.task_id, got.texts, got.sources, got.uses) == (
                s["id"], s["task"], s["texts"], s["sources"], len(s["uses"]),
            )  # fmt: skip
            assert got.mean_reward == self.model.mean(s)  # to the bit, also after a cut
        for task in self.bank.tasks():
            here = self.bank.skills(task)
            assert [s.skill_id for s in here] == [s["id"] for s in live if s["task"] == task]
            assert self.settings["capacity"] is None or len(here) <= self.settings["capacity"]
            assert self.bank.retrieve(task) == select(here) and self.bank.retrieve(task, 0.5, False) == select(here, 0.5, False)
        assert self.bank.retrieve("nothing here") is None and self.bank.skills("nothing here") == []
        stats = self.bank.stats()
        assert (stats["size"], stats["merged"], stats["evicted"]) == (len(live), merged, len(all_skills) - len(live))


def test_a_bank_is_its_events():
    run_state_machine_as_test(Banks, settings=examples(15))
