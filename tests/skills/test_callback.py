"""The SkillBank callback by itself: what a teacher sees, what enters the bank when, and what a checkpoint brings back."""

from __future__ import annotations

import inspect
import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skillsd.errors import ConfigError
from skillsd.metrics import Metrics
from skillsd.skills import BankContext, BaseSummariser, HindsightContext, NoContext, RulesSummariser, SiblingContext, Skill, SkillBank
from skillsd.skills.callback import SkillBankCallback
from skillsd.skills.selection import TRANSCRIPT_TEMPLATE
from skillsd.skills.summarisers.transcript import conversation
from skillsd.trajectory import Task, TrajectoryGroup

TEXT = "{golden_workflow}"


class Queue(RulesSummariser):
    """What was submitted is ready when it is waited for, or `ready` says so; each submission is noted, and takes a second of `clock`."""

    asynchronous = True
    clock, closed = 0.0, False

    def __init__(self) -> None:
        super().__init__(solved_workflow="{workflow}", unsolved_workflow="{workflow}")
        self.ready, self.submitted = 0, []

    def submit(self, iteration: int, trajectories: Any) -> None:
        self.submitted.append((iteration, [(t.task_id, t.member) for t in trajectories]))
        self.clock += 1.0
        super().submit(iteration, trajectories)

    def collect(self) -> list[Any]:
        ready, self._ready, self.ready = self._ready[: self.ready], self._ready[self.ready :], 0
        return ready

    def drain(self) -> None:
        self.ready = len(self._ready)

    def close(self) -> None:
        self.closed = True


def make(context: Any, **settings: Any) -> SkillBankCallback:
    callback = SkillBankCallback(Queue(), context, template=TEXT, **settings)
    callback.selection.bank = SkillBank()
    return callback


def at(iteration: int, folder: Path | None = None, last: bool = False) -> Any:
    """The trainer after that many iterations."""
    return SimpleNamespace(
        global_step=iteration, estimated_stepping_batches=iteration if last else 99, should_stop=False, default_root_dir=str(folder)
    )


def started(folder: Path, context: Any = None, **settings: Any) -> SkillBankCallback:
    """One whose bank is in the run's folder."""
    callback = SkillBankCallback(Queue(), context, template=TEXT, **settings)
    callback.on_fit_start(at(0, folder), None)  # type: ignore[arg-type]
    return callback


def end(callback: SkillBankCallback, groups: list[list[Any]], last: bool = False, skills: Any = None, gaps: Any = None) -> dict[str, float]:
    """An iteration's end; the metrics, which are logged."""
    used = skills or [None] * len(groups)
    prompts = ((1,),) * len(groups[0])
    batch = [TrajectoryGroup(Task(g[0].task_id), tuple(g), prompts, prompts, skill) for g, skill in zip(groups, used, strict=True)]
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(log_dict=lambda metrics, **how: logged.update(metrics))
    outputs = {"group_gap": torch.tensor([0.0] * len(batch) if gaps is None else gaps), "metrics": Metrics()}
    callback.on_train_batch_end(at(groups[0][0].iteration + 1, last=last), module, outputs, batch, 0)
    assert logged == outputs["metrics"].measured
    return logged


def chosen(callback: SkillBankCallback, epoch: int = 0, anew: bool = True) -> list[tuple[int | None, str]]:
    """The skills of t1 and t2."""
    return callback.selection.choose(["t1", "t2"], ["t1", "t2"], 0, epoch, anew)


def workflows(callback: SkillBankCallback, task_id: str) -> list[str]:
    assert callback.selection.bank is not None
    return [s.golden_workflow for s in callback.selection.bank.skills(task_id)]


@pytest.fixture
def groups(make_trajectory):
    """An iteration's groups: two tasks, two members each, whose answers say who they are."""

    def made(iteration: int) -> list[list[Any]]:
        return [
            [make_trajectory(task, m, pairs=[("s", f"{task}.{m}.{iteration}")], iteration=iteration) for m in (0, 1)]
            for task in ("t1", "t2")
        ]

    return made


def test_hindsight_waits_for_this_iteration_s_summaries(groups):
    """What was ready from before goes to the bank, and to nobody's teacher; this iteration's go there at its end, once."""
    callback = make(HindsightContext())
    queue: Any = callback.selection.summariser
    callback.selection.checked.submit(0, [t for g in groups(0) for t in g])  # from before a change of the context, say
    queue.ready = 1
    assert callback.selection.texts(groups(1), 1) == [["t1.0.1", "t1.1.1"], ["t2.0.1", "t2.1.1"]]
    assert workflows(callback, "t1") == ["t1.0.0", "t1.1.0"]
    metrics = end(callback, groups(1))
    assert workflows(callback, "t1") == ["t1.0.0", "t1.1.0", "t1.0.1", "t1.1.1"] and metrics["skills/bank"] == 8
    everybody = [("t1", 0), ("t1", 1), ("t2", 0), ("t2", 1)]
    assert queue.submitted == [(0, everybody), (1, everybody)] and queue.collect() == []
    assert metrics["time/summary_s"] > 0
    assert callback.selection.texts(groups(2), 2) == [["t1.0.2", "t1.1.2"], ["t2.0.2", "t2.1.2"]]


def test_a_failed_hindsight_summary_leaves_the_context_empty(groups):
    """A blank summary is counted; an attempt without turns, or one that the environment gave up, is not summarised."""
    (a, b), (c, d) = groups(0)
    blank = replace(a, turns=tuple(replace(t, action=" ") for t in a.turns))
    rows = [[blank, b], [replace(c, turns=()), replace(d, failure="killed", finish_reason="failed")]]
    callback = make(HindsightContext())
    assert callback.selection.texts(rows, 0) == [["", "t1.1.0"], ["", ""]]
    metrics = end(callback, rows)
    assert (metrics["skills/bank"], metrics["skills/failed"]) == (1, 1)
    none = [[replace(a, turns=()), replace(b, turns=())]]
    assert callback.selection.texts(none, 0) == [["", ""]] and end(callback, none)["skills/bank"] == 1


def test_the_bank_is_filled_whatever_is_shown(groups):
    """A sibling's attempt is read, the bank is not; without a context nothing is summarised."""
    callback = make(SiblingContext(), transcript_template="{actions}|")
    queue: Any = callback.selection.summariser
    assert callback.selection.texts(groups(0), 0) == [["t1.1.0|", "t1.0.0|"], ["t2.1.0|", "t2.0.0|"]] and queue.submitted == []
    end(callback, groups(0))
    assert len(queue.submitted) == 1 and workflows(callback, "t1") == []  # not ready
    end(callback, groups(1), last=True)
    assert workflows(callback, "t1") == ["t1.0.0", "t1.1.0", "t1.0.1", "t1.1.1"]
    assert chosen(callback) == [(None, "")] * 2
    callback = make(NoContext())
    assert callback.selection.texts(groups(0), 0) is None
    assert end(callback, groups(0))["skills/bank"] == 0 and callback.selection.summariser.submitted == []  # type: ignore[attr-defined]


def test_failures_stay_out_of_the_bank(groups):
    """`min_reward` bounds what enters, itself included; a task all of whose skills stay out has none, which is no error."""
    (a, b), (c, d) = groups(0)
    rows = [[replace(a, reward=1.0), replace(b, reward=0.5)], [replace(c, reward=0.5), replace(d, reward=-2.0)]]
    for least, expected in ((None, (2, 2)), (-2.0, (2, 2)), (0.5, (2, 1)), (0.6, (1, 0)), (1.0, (1, 0))):
        callback = make(BankContext(), min_reward=least)
        end(callback, rows, last=True)
        assert tuple(len(workflows(callback, t)) for t in ("t1", "t2")) == expected
        assert [len(rows) for _, rows in callback.selection.summariser.submitted] == [sum(expected)]  # type: ignore[attr-defined]
        (_, first), (_, second) = chosen(callback, 1)
        assert first == "t1.0.0" and bool(second) == (expected[1] > 0)


def test_a_transcript_is_the_conversation(make_trajectory):
    long = make_trajectory(member=1, pairs=[(f"see {i} " + "x" * 900, f"do {i}") for i in range(60)])
    callback = make(SiblingContext())
    ((text, other),) = callback.selection.texts([[make_trajectory(completion=0.0), long]], 0)  # type: ignore[misc]
    assert (text, other) == (TRANSCRIPT_TEMPLATE.format(transcript=conversation(long)), "")
    assert text.startswith("# An earlier attempt at this task, which succeeded\n") and text.endswith("\n\n# Your attempt\n")
    assert len(text) < 24_200 and "do 0" in text and "do 59" in text and "left out" in text


def test_a_template_with_other_fields_is_refused():
    for key, fields in (
        ("template", "success_analysis, mistake_analysis, golden_workflow"),
        ("transcript_template", "transcript, actions"),
    ):
        for bad in ("{nosuch}", "{", "{0}", "{} ", f"{{{fields.partition(',')[0]}[0]}}"):
            with pytest.raises(ConfigError, match=rf"skills\.{key}: use only {fields} in braces"):
                SkillBankCallback(**{key: bad})
    default = SkillBankCallback().selection
    for nothing in (SkillBankCallback(template=None, transcript_template=None), SkillBankCallback(template="")):
        given = nothing.selection
        assert (given.template, given.transcript_template) == (default.template, default.transcript_template)
    assert Skill("a", "b", "c").render(default.template).startswith("# Notes") and default.transcript_template == TRANSCRIPT_TEMPLATE


def test_the_defaults_of_the_bank_are_these():
    """What a configuration gets that names none of them."""
    given = {name: p.default for name, p in inspect.signature(SkillBankCallback).parameters.items() if p.default is not None}
    assert given == {"capacity": 8, "eviction": "worst", "value_estimate": "source", "refresh": "epoch"}


def test_the_bank_is_the_run_s(groups, tmp_path):
    """It is opened in the run's folder, which may be missing, when training begins, and closed with the summariser; then again."""
    folder = tmp_path / "runs" / "new"
    callback = SkillBankCallback(Queue(), template=TEXT)
    callback.teardown(at(0, folder), None, "validate")  # type: ignore[arg-type]
    assert not folder.exists()
    for held in (4, 8):
        callback.on_fit_start(at(0, folder), None)  # type: ignore[arg-type]
        bank = callback.selection.bank
        assert bank is not None and end(callback, groups(held), last=True)["skills/bank"] == held
        callback.teardown(at(1, folder), None, "fit")  # type: ignore[arg-type]
        assert callback.selection.summariser.closed  # type: ignore[attr-defined]
        assert [p.name for p in folder.iterdir()] == ["bank.sqlite"]  # no log beside it
    with SkillBank(folder / "bank.sqlite", read_only=True) as stored:
        assert len(stored) == 8


def test_another_value_estimate_is_refused(tmp_path):
    started(tmp_path).teardown(at(0), None, "fit")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^skills: .*bank\.sqlite: .*value_estimate"):
        started(tmp_path, value_estimate="gap")


@pytest.mark.parametrize("when", ["epoch", "iteration"])
def test_a_first_skill_is_shown_at_once_and_another_when_prompts_are_chosen_anew(make_skill, when):
    """A first skill that comes late is shown at once; another one for a task that has one, when the prompts are chosen anew."""
    callback = make(None, refresh=when)
    bank: Any = callback.selection.bank

    def shown(epoch_start: bool) -> list[str]:
        return [text for _, text in chosen(callback, anew=epoch_start)]

    bank.insert([make_skill("a", reward=1.0), make_skill("b")], 0)
    assert shown(True) == ["a.", ""]
    bank.record_use(1, 0)
    bank.insert([make_skill("c", "t2")], 0)
    assert shown(False) == (["a.", "c."] if when == "epoch" else ["b.", "c."])
    assert shown(True) == ["b.", "c."]


def test_a_skill_is_read_once(make_skill, monkeypatch):
    """When it is chosen; the iterations of its epoch take it from there."""
    callback = make(None)
    bank: Any = callback.selection.bank
    bank.insert([make_skill("a"), make_skill("b")], 0)
    read, skill = [], bank._ledger.skill
    monkeypatch.setattr(bank._ledger, "skill", lambda *args: read.append(args[0]) or skill(*args))
    assert chosen(callback) == chosen(callback, anew=False) == [(1, "a."), (None, "")]
    assert read == [1]


@pytest.mark.parametrize(("value_estimate", "means"), [("source", [1.0, 1.0]), ("next_visit", [0.75, 0.5]), ("gap", [3.0, -1.0])])
def test_a_use_is_recorded_once_a_group_with_its_reward_or_gap(groups, tmp_path, value_estimate, means):
    """Once a group, with the mean reward of those that count and the group's own gap."""
    callback = started(tmp_path, value_estimate=value_estimate)
    bank: Any = callback.selection.bank
    end(callback, groups(0), last=True)
    (a, b), (c, d) = groups(1)
    rows = [[replace(a, reward=0.5), b], [replace(c, reward=0.5), replace(d, failure="killed", finish_reason="failed")]]
    end(callback, rows, skills=[1, 3], gaps=[3.0, -1.0])
    assert [(bank.get(i).uses, bank.get(i).mean_reward) for i in (1, 3)] == [(1, mean) for mean in means]
    assert bank.get(2).uses == bank.get(4).uses == 0
    with pytest.raises(ValueError, match="zip"):  # a gap too few
        end(callback, rows, skills=[1, 3], gaps=[3.0])


def test_hindsight_works_for_a_group_of_one(groups):
    (a, _), _ = groups(0)
    callback = make(HindsightContext())
    assert callback.selection.texts([[a]], 0) == [["t1.0.0"]] and end(callback, [[a]], 0)["skills/bank"] == 1


@pytest.mark.parametrize("context", [BankContext, HindsightContext])
def test_the_seconds_logged_are_those_that_training_waited(groups, context, monkeypatch):
    """What training waited for in each iteration by itself, before the update or after it."""
    callback = make(context())
    queue: Any = callback.selection.summariser
    monkeypatch.setattr("skillsd.skills.selection.time", SimpleNamespace(perf_counter=lambda: queue.clock))
    for i in (0, 1):
        callback.selection.texts(groups(i), i)
        assert end(callback, groups(i))["time/summary_s"] == 1.0
    assert len(queue.submitted) == 2


def test_actions_of_a_transcript_have_spaces_between_them(make_trajectory):
    callback = make(SiblingContext(), transcript_template="{actions}|")
    assert callback.selection.texts([[make_trajectory(), make_trajectory(member=1)]], 0) == [["up left|", "up left|"]]


def test_a_summariser_is_bound_to_the_model(groups):
    callback = make(None)
    callback.selection.summariser = callback.selection.checked.inner = BaseSummariser()
    texts = {"success_analysis": "a", "mistake_analysis": "b", "golden_workflow": "go"}
    callback.selection.bind(lambda messages, *_: [json.dumps(texts)] * len(messages), lambda *_, **__: None, nullcontext)
    assert end(callback, groups(0)) | {"time/summary_s": 0} == {"skills/bank": 2, "skills/failed": 0, "time/summary_s": 0}
    assert workflows(callback, "t1") == ["go"]


def test_a_checkpoint_brings_the_bank_back(groups, tmp_path, monkeypatch):
    """What came after it did not happen; prompts and the count of failures are its own. It says what is on the disk."""
    callback = started(tmp_path / "run")
    (a, b), second = groups(0)
    blank = replace(a, turns=tuple(replace(t, action=" ") for t in a.turns))
    end(callback, [[blank, b], second], last=True)
    prompts, flushed = chosen(callback, 1), set()
    assert prompts == [(1, "t1.1.0"), (2, "t2.0.0")]
    saved: dict[str, Any] = {}
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", lambda fd: flushed.add(os.fstat(fd).st_ino))
        callback.on_save_checkpoint(at(1), None, saved)  # type: ignore[arg-type]
    assert {(tmp_path / "run" / f"bank.sqlite{x}").stat().st_ino for x in ("", "-wal")} <= flushed
    end(callback, groups(1), last=True, skills=[1, 2])
    assert [text for _, text in chosen(callback, 2)] == ["t1.0.1", "t2.0.1"]
    callback.teardown(at(2), None, "fit")  # type: ignore[arg-type]

    def resumed(folder: str, state: dict[str, Any]) -> SkillBankCallback:
        again = SkillBankCallback(Queue(), template=TEXT)
        again.on_load_checkpoint(at(0), None, state)  # type: ignore[arg-type]
        again.on_fit_start(at(1, tmp_path / folder), None)  # type: ignore[arg-type]
        return again

    again = resumed("run", saved)
    assert chosen(again, 1, anew=False) == prompts
    assert workflows(again, "t1") == ["t1.1.0"] and workflows(again, "t2") == ["t2.0.0", "t2.1.0"]
    assert end(again, groups(1)) | {"time/summary_s": 0} == {"skills/bank": 3, "skills/failed": 1, "time/summary_s": 0}
    with pytest.raises(ConfigError, match=r"^skills: .*bank\.sqlite is not there, and the checkpoint saw 3 events"):
        resumed("another", saved)
    assert len(resumed("third", {}).selection.bank or ()) == 0  # of a run without skills


def test_a_context_is_asked_in_step_with_other_ranks(groups):
    """It may use the model, each rank as often as it has groups: see Policy.together."""
    inside: list[bool] = []

    class Asks(SiblingContext):
        def choose(self, group: Any, skills: Any) -> Any:
            inside.append(entered == [True])
            return super().choose(group, skills)

    class Together:
        def __enter__(self) -> None:
            entered.append(True)

        def __exit__(self, *args: Any) -> None:
            entered.clear()

    entered: list[bool] = []
    callback = make(Asks())
    callback.selection.bind(lambda *_: [], lambda *_, **__: None, Together)
    assert callback.selection.texts(groups(0), 0) is not None and inside == [True, True]


def test_a_summariser_is_closed_by_a_fit_alone(groups, tmp_path):
    """Not by `trainer.validate` with the same callbacks before one."""
    callback = make(BankContext())
    callback.teardown(at(0), None, "validate")  # type: ignore[arg-type]
    queue: Any = callback.selection.summariser
    assert not queue.closed
    callback.on_fit_start(at(0, tmp_path), None)  # type: ignore[arg-type]
    callback.teardown(at(0), None, "fit")  # type: ignore[arg-type]
    assert queue.closed


def test_a_summariser_is_tried_before_a_run_that_uses_it():
    class Tried(Queue):
        tries = 0

        def check_ready(self) -> None:
            self.tries += 1
            raise RuntimeError("nobody is there")

    for context, tries in ((BankContext(), 1), (NoContext(), 0)):
        summariser = Tried()
        callback = SkillBankCallback(summariser, context)
        with pytest.raises(ConfigError, match=r"skills\.summariser: .*nobody is there") if tries else nullcontext():
            callback.setup(at(0), None, "fit")  # type: ignore[arg-type]
        callback.setup(at(0), None, "validate")  # type: ignore[arg-type]
        assert summariser.tries == tries
    SkillBankCallback(Queue()).selection.check_summariser()  # one that has no such method


@pytest.mark.parametrize("fails", [True, False])
def test_the_end_of_training_warns_if_nothing_was_ever_summarised(groups, caplog, fails):
    class Failing(Queue):
        def summarise(self, trajectories: Any) -> Any:
            if fails:
                raise RuntimeError("the reason")
            return super().summarise(trajectories)

    callback = SkillBankCallback(Failing(), BankContext())
    callback.selection.bank = SkillBank()
    end(callback, groups(1), last=True)
    caplog.clear()
    callback.on_train_end(at(1), None)  # type: ignore[arg-type]
    assert [("the reason" in m, str(callback.selection.failed) in m) for m in caplog.messages] == [(True, True)] * fails


def test_a_bank_that_is_not_the_checkpoint_s_is_refused(tmp_path, make_skill):
    with SkillBank(tmp_path / "bank.sqlite") as bank:
        bank.insert([make_skill("a")], 0)
    callback = SkillBankCallback(Queue())
    callback.on_load_checkpoint(at(0), None, {"skill_bank": {"iteration": 1, "position": 2, "prompts": {}, "failed": 0}})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^skills: .*checkpoint"):
        callback.on_fit_start(at(1, tmp_path), None)  # type: ignore[arg-type]
