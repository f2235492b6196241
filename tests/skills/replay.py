"""The bank as plain dictionaries, replayed from the start at each cut: what a SkillBank is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from skillsd.skills import Skill, select


class ReplayedBank:
    """The reading and writing methods of SkillBank, without a file and without checks."""

    def __init__(self, capacity: int | None, drop: str, booking: str) -> None:
        self.capacity, self.drop, self.booking = capacity, drop, booking
        self.calls: list[tuple[int, str, tuple[Any, ...]]] = []
        self._reset()

    def _reset(self) -> None:
        self.skills_: dict[int, Skill] = {}
        self.live: dict[str, list[int]] = {}
        self.booked: dict[int, float] = {}
        self.position = self.merged = self.dropped = self.iteration = 0

    def insert(self, skills: Sequence[Skill], iteration: int) -> list[int]:
        self.calls.append((iteration, "insert", (skills,)))
        return self._insert(skills, iteration)

    def record_use(self, skill_id: int, iteration: int, *, reward: float, gap: float) -> None:
        self.calls.append((iteration, "use", (skill_id, reward, gap)))
        self._use(iteration, skill_id, reward, gap)

    def cut(self, iteration: int) -> None:
        calls, self.calls = [call for call in self.calls if call[0] < iteration], []
        self._reset()
        for at, kind, arguments in calls:
            if kind == "insert":
                self.insert(*arguments, at)
            else:
                self.record_use(arguments[0], at, reward=arguments[1], gap=arguments[2])

    def _insert(self, skills: Sequence[Skill], iteration: int) -> list[int]:
        ids = []
        for skill in skills:
            self.iteration = iteration
            live = self.live.setdefault(skill.task_id, [])
            known = [i for i in live if self.skills_[i].texts == skill.texts]
            if known:
                self.skills_[known[0]] = replace(self.skills_[known[0]], sources=self.skills_[known[0]].sources + 1)
                self.merged += 1
            else:
                known = [len(self.skills_) + 1]
                reward, completion = skill.source_reward + 0.0, skill.source_completion + 0.0  # never -0.0
                source = {"source_reward": reward, "source_completion": completion}
                self.skills_[known[0]] = replace(skill, skill_id=known[0], mean_reward=0.0 if self.booking == "gap" else reward, **source)
                self.booked[known[0]] = 0.0
                live.append(known[0])
            ids.append(known[0])
            self.position += 1
            if self.capacity is not None and len(live) > self.capacity:
                live.remove(min(live) if self.drop == "oldest" else min(live, key=lambda i: (self.skills_[i].mean_reward, i)))
                self.dropped += 1
                self.position += 1
        return ids

    def _use(self, iteration: int, skill_id: int, reward: float, gap: float) -> None:
        self.iteration, self.position = iteration, self.position + 1
        skill, mean = self.skills_[skill_id], self.skills_[skill_id].mean_reward
        if self.booking != "source":
            self.booked[skill_id] += reward if self.booking == "next_visit" else gap
            mean = self.booked[skill_id] / (skill.uses + 1)
        self.skills_[skill_id] = replace(skill, uses=skill.uses + 1, mean_reward=mean)

    def __len__(self) -> int:
        return sum(map(len, self.live.values()))

    def tasks(self) -> list[str]:
        return sorted(task_id for task_id, ids in self.live.items() if ids)

    def skills(self, task_id: str) -> list[Skill]:
        return [self.skills_[i] for i in self.live.get(task_id, [])]

    def get(self, skill_id: int) -> Skill:
        return self.skills_[skill_id]

    def retrieve(self, task_id: str) -> Skill | None:
        return select(self.skills(task_id))

    def stats(self) -> dict[str, float]:
        live = [self.skills_[i] for ids in self.live.values() for i in ids]
        return {
            "size": len(live), "tasks": len(self.tasks()), "mean_uses": sum(s.uses for s in live) / len(live) if live else 0,
            "merged": self.merged, "dropped": self.dropped,
        }  # fmt: skip
