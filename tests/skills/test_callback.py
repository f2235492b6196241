"""The SkillBank callback by itself: what a context that chooses after the rollout gets, and what enters the bank when."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skillsd.errors import ConfigError
from skillsd.skills import BankContext, HindsightContext, NoContext, RulesSummariser, SiblingContext, Skill, SkillBank
from skillsd.skills.callback import TRANSCRIPT_TEMPLATE, SkillBankCallback
from skillsd.skills.summarisers.transcript import conversation
from skillsd.trajectory import Task, TrajectoryGroup

TEXT = "{golden_workflow}"


class Queue(RulesSummariser):
    """What was submitted is ready when it is waited for, or `ready` says so; each submission is noted."""

    asynchronous = True

    def __init__(self) -> None:
        super().__init__(solved_workflow="{workflow}", unsolved_workflow="{workflow}")
        self.ready, self.submitted = 0, []

    def submit(self, iteration: int, trajectories: Any) -> None:
        self.submitted.append((iteration, [(t.task_id, t.member) for t in trajectories]))
        super().submit(iteration, trajectories)

    def collect(self) -> list[Any]:
        done, self._ready, self.ready = self._ready[: self.ready], self._ready[self.ready :], 0
        return done

    def drain(self) -> None:
        self.ready = len(self._ready)


def make(context: Any, **settings: Any) -> SkillBankCallback:
    callback = SkillBankCallback(Queue(), context, template=TEXT, **settings)
    callback.bank = SkillBank()
    return callback


def end(callback: SkillBankCallback, groups: list[list[Any]], last: bool = False) -> dict[str, float]:
    """An iteration's end; the metrics."""
    prompts = ((1,),) * len(groups[0])
    batch = [TrajectoryGroup(Task(g[0].task_id), tuple(g), prompts, prompts) for g in groups]
    module = SimpleNamespace(metrics={}, log_dict=lambda metrics, batch_size: None)
    trainer: Any = SimpleNamespace(global_step=groups[0][0].iteration + 1, estimated_stepping_batches=99, should_stop=False)
    if last:
        trainer.estimated_stepping_batches = trainer.global_step
    callback.on_train_batch_end(trainer, module, {"group_gap": torch.zeros(len(batch))}, batch, 0)  # type: ignore[arg-type]
    return module.metrics


def workflows(callback: SkillBankCallback, task_id: str) -> list[str]:
    assert callback.bank is not None
    return [s.golden_workflow for s in callback.bank.skills(task_id)]


@pytest.fixture
def groups(make_trajectory):
    """Of an iteration: two tasks, two members each, whose answers say who they are."""

    def made(iteration: int) -> list[list[Any]]:
        return [
            [make_trajectory(task, m, pairs=[("s", f"{task}.{m}.{iteration}")], iteration=iteration) for m in (0, 1)]
            for task in ("t1", "t2")
        ]

    return made


def test_hindsight_waits_for_this_iteration_s_summaries(groups):
    """What was ready from before goes to the bank, and to nobody's teacher; this iteration's go there at its end, once."""
    callback = make(HindsightContext())
    queue: Any = callback.summariser
    callback.checked.submit(0, [t for g in groups(0) for t in g])  # from before a change of the context, say
    queue.ready = 1
    assert callback.texts(groups(1)) == [["t1.0.1", "t1.1.1"], ["t2.0.1", "t2.1.1"]]
    assert workflows(callback, "t1") == ["t1.0.0", "t1.1.0"]
    metrics = end(callback, groups(1))
    assert workflows(callback, "t1") == ["t1.0.0", "t1.1.0", "t1.0.1", "t1.1.1"] and metrics["skills/bank"] == 8
    everybody = [("t1", 0), ("t1", 1), ("t2", 0), ("t2", 1)]
    assert queue.submitted == [(0, everybody), (1, everybody)] and queue.collect() == []
    assert metrics["time/summary_s"] > 0
    assert callback.texts(groups(2)) == [["t1.0.2", "t1.1.2"], ["t2.0.2", "t2.1.2"]]


def test_hindsight_that_fails_says_nothing(groups):
    """A blank summary is counted; an attempt without turns, or one that the environment gave up, is not summarised."""
    (a, b), (c, d) = groups(0)
    blank = replace(a, turns=tuple(replace(t, action=" ") for t in a.turns))
    rows = [[blank, b], [replace(c, turns=()), replace(d, failure="killed", finish_reason="failed")]]
    callback = make(HindsightContext())
    assert callback.texts(rows) == [["", "t1.1.0"], ["", ""]]
    metrics = end(callback, rows)
    assert (metrics["skills/bank"], metrics["skills/failed"]) == (1, 1)
    none = [[replace(a, turns=()), replace(b, turns=())]]
    assert callback.texts(none) == [["", ""]] and end(callback, none)["skills/bank"] == 1


def test_the_bank_is_filled_whatever_is_shown(groups):
    """A sibling's attempt is read, the bank is not; without a context nothing is summarised."""
    callback = make(SiblingContext(), transcript_template="{actions}|")
    queue: Any = callback.summariser
    assert callback.texts(groups(0)) == [["t1.1.0|", "t1.0.0|"], ["t2.1.0|", "t2.0.0|"]] and queue.submitted == []
    end(callback, groups(0))
    assert len(queue.submitted) == 1 and workflows(callback, "t1") == []  # not ready
    end(callback, groups(1), last=True)
    assert workflows(callback, "t1") == ["t1.0.0", "t1.1.0", "t1.0.1", "t1.1.1"]
    assert callback.skill_for("t1") == (None, "")
    callback = make(NoContext())
    assert callback.texts(groups(0)) is None
    assert end(callback, groups(0))["skills/bank"] == 0 and callback.summariser.submitted == []  # type: ignore[attr-defined]


def test_failures_stay_out_of_the_bank(groups):
    """`min_reward` bounds what enters, itself included; a task all of whose skills stay out has none, which is no error."""
    (a, b), (c, d) = groups(0)
    rows = [[replace(a, reward=1.0), replace(b, reward=0.5)], [replace(c, reward=0.5), replace(d, reward=-2.0)]]
    for least, expected in ((None, (2, 2)), (-2.0, (2, 2)), (0.5, (2, 1)), (0.6, (1, 0)), (1.0, (1, 0))):
        callback = make(BankContext(), min_reward=least)
        end(callback, rows, last=True)
        assert tuple(len(workflows(callback, t)) for t in ("t1", "t2")) == expected
        assert [len(rows) for _, rows in callback.summariser.submitted] == [sum(expected)]  # type: ignore[attr-defined]
        callback.refresh(["t1", "t2"], 0, 1, True)
        assert callback.skill_for("t1")[1] == "t1.0.0" and bool(callback.skill_for("t2")[1]) == (expected[1] > 0)


def test_a_transcript_is_the_conversation(make_trajectory):
    long = make_trajectory(member=1, pairs=[(f"see {i} " + "x" * 900, f"do {i}") for i in range(60)])
    callback = make(SiblingContext())
    ((text, other),) = callback.texts([[make_trajectory(completion=0.0), long]])  # type: ignore[misc]
    assert (text, other) == (TRANSCRIPT_TEMPLATE.format(transcript=conversation(long)), "")
    assert text.startswith("# An earlier attempt at this task, which succeeded\n") and text.endswith("\n\n# Your attempt\n")
    assert len(text) < 24_200 and "do 0" in text and "do 59" in text and "left out" in text


def test_templates_are_checked():
    for key, fields in (
        ("template", "success_analysis, mistake_analysis, golden_workflow"),
        ("transcript_template", "transcript, actions"),
    ):
        for bad in ("{nosuch}", "{", "{0}", "{} "):
            with pytest.raises(ConfigError, match=rf"skills\.{key}: use only {fields} in braces"):
                SkillBankCallback(**{key: bad})
    default = SkillBankCallback()
    for nothing in (SkillBankCallback(template=None, transcript_template=None), SkillBankCallback(template="")):
        assert (nothing.template, nothing.transcript_template) == (default.template, default.transcript_template)
    assert Skill("a", "b", "c").render(default.template).startswith("# Notes") and default.transcript_template == TRANSCRIPT_TEMPLATE
