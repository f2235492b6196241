"""The stream of groups, the panel, and tasks from a file."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from skillsd.callbacks import RunLog, TeacherSync
from skillsd.data import RolloutData
from skillsd.environment import TextEnv, make_env
from skillsd.errors import ConfigError
from skillsd.module import SkillSD
from skillsd.objective import Objective
from skillsd.optimizer import OptimizerSettings
from skillsd.policy import TokenSequence
from skillsd.policy.nano import build_tokenizer
from skillsd.rollout import Chat, Episode, RolloutSettings
from skillsd.skills import (
    BankContext,
    GroundTruthContext,
    HindsightContext,
    NoContext,
    RulesSummariser,
    ShuffledContext,
    SiblingContext,
    Skill,
    SkillBank,
)
from skillsd.skills.callback import SkillBankCallback
from skillsd.skills.selection import TRANSCRIPT_TEMPLATE
from skillsd.skills.summarisers.transcript import conversation
from skillsd.trajectory import Task, Trajectory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*Trying to infer the `batch_size`"),
]
ENV = "skillsd_sokoban:skillsd/Sokoban-v0"
KWARGS: dict[str, Any] = {
    "size": 5, "boxes": 1, "difficulties": {"short": {"lengths": [2, 5]}}, "splits": {"train": {"short": 5}, "test": {"short": 3}},
    "max_turns": 3, "action_format": "bare", "prompts": {"instruction": ""},
}  # fmt: skip
BOARD = "#####\n#P__#\n#_XO#\n#___#\n#####"
TEMPLATE = "skill {success_analysis} {mistake_analysis} : {golden_workflow}\n"


def rules() -> RulesSummariser:
    texts = {"solved_success": "solved", "solved_mistakes": "none", "unsolved_success": "unsolved", "unsolved_mistakes": "avoid"}
    return RulesSummariser(joiner=" ", solved_workflow="{workflow}", unsolved_workflow="{workflow}", **texts)


def make_data(**settings: Any) -> RolloutData:
    settings = {"batch_tasks": 2, "group_size": 2, "rollout": RolloutSettings(max_turn_tokens=1)} | settings
    return RolloutData(ENV, settings.pop("env_kwargs", KWARGS), **settings)


@pytest.fixture
def join(make_policy: Callable[..., Any]) -> Callable[..., RolloutData]:
    """A data module as Lightning leaves it after `setup`, on a tiny policy."""

    def make(*callbacks: Any, stage: str = "fit", objective: Objective | None = None, **settings: Any) -> RolloutData:
        policy = make_policy()
        module = SimpleNamespace(policy=policy, settings=policy.settings, objective=objective or Objective())
        data = make_data(**settings)
        data.trainer = SimpleNamespace(default_root_dir="run", lightning_module=module, callbacks=list(callbacks))  # type: ignore[assignment]
        data.setup(stage)
        for callback in callbacks:
            callback.setup(SimpleNamespace(datamodule=data), module, stage)
        return data

    return make


# -- the order ----------------------------------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation(join):
    data = join()
    stream = data.train_dataloader()
    names = [t.task_id for t in data.train_tasks]
    assert names == [f"train-{i:04d}" for i in range(5)]
    orders = [tuple(t.task_id for t in stream.order(epoch)) for epoch in range(6)]
    assert all(sorted(o) == names for o in orders) and len(set(orders)) > 4
    data.seed = 1
    assert tuple(t.task_id for t in stream.order(0)) != orders[0]
    # Golden: another order is another run. It hangs on no generator and no version.
    assert [o[0][-1] + o[1][-1] + o[2][-1] + o[3][-1] + o[4][-1] for o in orders[:3]] == GOLDEN


GOLDEN = ["14302", "14230", "40312"]


def test_the_last_partial_batch_is_kept(join):
    stream = join(batch_tasks=2).train_dataloader()
    assert len(stream) == 3
    batches = list(stream)
    assert [len(b) for b in batches] == [2, 2, 1]
    assert [g.task.task_id for b in batches for g in b] == [t.task_id for t in stream.order(0)]
    for i, batch in enumerate(batches):
        for g in batch:
            assert [(t.member, t.task_id, t.iteration, t.skill_id) for t in g.trajectories] == [
                (m, g.task.task_id, i, None) for m in (0, 1)
            ]
            prompt = g.trajectories[0].prompt_ids
            assert g.teacher_prompts == g.student_prompts == (prompt, prompt) and g.trajectories[1].prompt_ids == prompt
            assert g.skill_id is None and g.temperature == 1.0 and not g.sampled_by_teacher and not g.has_teacher_context(0)
    assert stream.state_dict() == {"position": 3}
    assert [g.task.task_id for b in stream for g in b] == [t.task_id for t in stream.order(1)]


def test_a_stream_goes_on_where_it_stood(join):
    """Trajectories are a function of (seed, iteration) alone."""
    whole = [b for stream in [join().train_dataloader()] for _ in range(2) for b in stream]
    data, other = join(), join()
    other.train_dataloader()
    data.load_state_dict(other.state_dict() | {"position": 4})
    assert list(data.train_dataloader()) == whole[4:]
    assert data.state_dict()["position"] == 6
    with pytest.raises(ConfigError, match=r"data\.seed was 0 and is 1"):
        join(seed=1).load_state_dict(other.state_dict())
    with pytest.raises(ConfigError, match="ckpt_path"):
        join().load_state_dict({"position": 4})
    assert list(join(seed=1).train_dataloader()) != whole[:3]


def test_seconds_of_a_rollout(join):
    """Of each iteration by itself: what is done between two of them is not counted."""
    data = join(batch_tasks=2)
    collect, seconds = data.collector.collect, []

    def slowly(rows: list[Episode], **settings: Any) -> list[Trajectory]:
        time.sleep(0.1)
        return collect(rows, **settings)

    data.collector.collect = slowly
    started = time.perf_counter()
    for groups in data.train_dataloader():
        seconds.append(max(g.rollout_s for g in groups))
        time.sleep(0.1)
    assert len(seconds) == 3 and all(s >= 0.1 for s in seconds) and sum(seconds) < time.perf_counter() - started - 0.3


def test_failed_episodes_are_told_once_an_iteration(join, caplog):
    stream = join(batch_tasks=2, group_size=3).train_dataloader()
    collector = stream.data.collector
    collect, lost = collector.collect, {(0, 1): "out of memory", (0, 4): "killed", (2, 0): "killed"}

    def fail(rows: list[Episode], iteration: int, **settings: Any) -> list[Trajectory]:
        played = collect(rows, iteration=iteration, **settings)
        return [
            replace(t, finish_reason="failed", failure=lost[iteration, i], reward=0.0) if (iteration, i) in lost else t
            for i, t in enumerate(played)
        ]

    collector.collect = fail
    batches = list(stream)
    assert [r.getMessage() for r in caplog.records if r.name == "skillsd.rollout.failures"] == [
        "iteration 0: 2 of 6 episodes failed: out of memory", "iteration 2: 1 of 3 episodes failed: killed",
    ]  # fmt: skip
    assert [t.failure for g in batches[0] for t in g.trajectories] == ["", "out of memory", "", "", "killed", ""]  # they stay there


def test_prompts_come_from_a_member_that_was_played(join):
    """The first one may have failed in its reset, where there is neither a prompt nor an observation."""
    stream = join(batch_tasks=1, group_size=3).train_dataloader()
    (want,) = next(iter(stream))
    stream.position = 0
    collect = stream.data.collector.collect
    empty: dict[str, Any] = {"instruction": "", "prompt_ids": (), "token_ids": (), "action_mask": (), "logprobs": (), "turns": ()}

    def lose(n: int) -> Callable[..., list[Trajectory]]:
        def play(rows: list[Episode], **settings: Any) -> list[Trajectory]:
            played = collect(rows, **settings)
            return [replace(t, **empty, finish_reason="failed", failure="raised: x") if t.member < n else t for t in played]

        return play

    stream.data.rollout.max_failed = 1.0
    for n in (1, 2, 3):
        stream.position, stream.data.collector.collect = 0, lose(n)
        (group,) = next(iter(stream))
        assert group.trajectories[n:] == want.trajectories[n:] == group.counted
        assert n == 3 or (group.student_prompts, group.teacher_prompts) == (want.student_prompts, want.teacher_prompts)


def test_too_many_failed_episodes(join):
    """The share is of one iteration's episodes; the message counts by kind."""
    stream = join(batch_tasks=2, group_size=2).train_dataloader()
    data = stream.data
    data.trainer.checkpoint_callback, data.trainer.default_root_dir = None, "/nowhere"
    collect, kinds = data.collector.collect, ["hung: no answer", "raised: OSError: gone", "raised: again"]

    def fail(rows: list[Episode], **settings: Any) -> list[Trajectory]:
        played = collect(rows, **settings)
        return [replace(t, finish_reason="failed", failure=k) for t, k in zip(played, kinds, strict=False)] + played[len(kinds) :]

    data.collector.collect = fail
    data.rollout.max_failed = 0.75
    next(iter(stream))
    data.rollout.max_failed, stream.position = 0.5, 0
    with pytest.raises(ConfigError) as told:
        next(iter(stream))
    first = stream.order(0)[0].task_id
    assert str(told.value) == (
        f"data.rollout.max_failed is 0.5, and in iteration 0 3 of 4 episodes failed (1 hung, first on task {first}: hung: no answer; "
        f"2 raised, first on task {first}: raised: OSError: gone). There is no checkpoint yet: mend the environment and resume, "
        "or set a larger share."
    )
    kinds[:] = ["model: a sampled token's log-prob is not finite"] * 3  # no environment's fault
    stream.position = 0
    with pytest.raises(ConfigError, match=r"rollout\.max_failed.*policy\.model") as told:
        next(iter(stream))
    assert "environment" not in str(told.value)


def test_the_panel_is_the_same_each_time(join):
    data = join(panel_attempts=2, panel_seeds=[0, 7], panel_temperature=1.0, stage="validate")
    first, second = ([t for b in data.val_dataloader() for t in b] for _ in range(2))
    assert first == second
    assert [(t.seed, t.task_id, t.member) for t in first] == [(s, f"test-{i:04d}", m) for s in (0, 7) for i in range(3) for m in (0, 1)]
    sampled = {m: [t.token_ids for t in first if t.member == m and t.seed == 0] for m in (0, 1)}
    assert sampled[0] != sampled[1]
    data.rollout.max_rows = 1  # in other pieces, the same
    assert [len(b) for b in data.val_dataloader()] == [4, 4, 4]
    assert [t.token_ids for b in data.val_dataloader() for t in b] == [t.token_ids for t in first]

    greedy = [t for b in join(stage="validate", seed=3).val_dataloader() for t in b]
    assert greedy == [t for b in join(stage="validate").val_dataloader() for t in b]  # the run seed has no say in it


# -- tasks from a file ----------------------------------------------------------------------------------------------------------


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)) + "\n" for x in lines), encoding="utf-8")
    return str(path)


def test_tasks_bring_their_own_boards(join, tmp_path):
    boards = [BOARD, BOARD.replace("O", "_").replace("#___#", "#__O#")]
    lines = [{"task_id": f"own-{i}", "split": "train", "difficulty": "x", "board": b} for i, b in enumerate(boards)]
    held_out = {"task_id": "held\u2028out", "split": "test", "board": boards[0], "instruction": "move the box ."}
    data = join(tasks_file=write(tmp_path / "tasks.jsonl", *lines, "", held_out))
    assert [(t.task_id, t.difficulty, dict(t.options)) for t in data.train_tasks] == [
        (f"own-{i}", "x", {"board": b}) for i, b in enumerate(boards)
    ]
    (batch,) = data.train_dataloader()
    assert {g.task.task_id: g.trajectories[0].turns[0].observation for g in batch} == {f"own-{i}": b for i, b in enumerate(boards)}
    ((t,),) = data.val_dataloader()
    assert t.instruction == "move the box ." and t.task_id == "held\u2028out"


def test_scenarios(join, tmp_path, monkeypatch):
    """From the environment's tasks, or a file's; most have none."""
    assert {t.scenario for t in join().panel_tasks} == {""}
    lines = [{"task_id": f"own-{i}", "split": s, "board": BOARD, **more} for i, (s, more) in enumerate(
        [("train", {"scenario": "a"}), ("test", {"scenario": "b"}), ("test", {"scenario": None}), ("test", {})]
    )]  # fmt: skip
    data = join(tasks_file=write(tmp_path / "tasks.jsonl", *lines))
    tasks = data.train_tasks + data.panel_tasks
    assert [t.scenario for t in tasks] == ["a", "b", "", ""] and all(dict(t.options) == {"board": BOARD} for t in tasks)
    listed = type(make_env(ENV, KWARGS).unwrapped).tasks
    monkeypatch.setattr(
        "skillsd_sokoban.env.SokobanEnv.tasks", lambda env, split: [t | {"scenario": t["task_id"][:6]} for t in listed(env, split)]
    )
    assert [t.scenario for t in join().panel_tasks] == ["test-0"] * 3


GOOD = [{"task_id": "a", "split": "train"}, {"task_id": "b", "split": "test"}]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{not json", "JSON object"),
        ('{"task_id": "c"', "JSON object"),
        ("[1, 2]", "JSON object"),
        ("3", "JSON object"),
        ('"text"', "JSON object"),
        ('{"split": "train"}', "task_id"),
        ('{"task_id": "c"}', "split"),
        ('{"task_id": null, "split": "train"}', "task_id"),
        ('{"task_id": ["c"], "split": "train"}', "task_id"),
        ('{"task_id": "a", "split": "train"}', "repeats the task_id a"),
    ],
)
def test_a_bad_line_is_named(join, tmp_path, line, why):
    path = write(tmp_path / "tasks.jsonl", *GOOD, line)
    with pytest.raises(ConfigError, match=rf"data\.tasks_file: .*tasks\.jsonl:3 .*{why}"):
        join(tasks_file=path)


def test_bad_files(join, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tasks_file: no file"):
        join(tasks_file=str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match=r"data\.panel_split: .* no task of split test"):
        join(tasks_file=write(tmp_path / "a.jsonl", GOOD[0]))
    both = write(tmp_path / "b.jsonl", *GOOD, {"task_id": "a", "split": "test"})
    with pytest.raises(ConfigError, match=r"train_split and panel_split share 1 tasks \(a"):
        join(tasks_file=both)
    (tmp_path / "c.jsonl").write_bytes(b'{"task_id": "\xff", "split": "test"}\n')
    with pytest.raises(ConfigError, match=r"data\.tasks_file: .*c\.jsonl"):
        join(tasks_file=str(tmp_path / "c.jsonl"))


# -- bad settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actor", ["student_with_skill", "half_with_skill", "teacher"])
def test_an_actor_with_a_skill_needs_one_before_the_rollout(join, actor):
    told = rf"data\.actor is {actor}, which needs a skill before the rollout: .*BankContext"
    with pytest.raises(ConfigError, match=told):
        join(actor=actor).train_dataloader()
    for context in (NoContext(), HindsightContext(), SiblingContext(), GroundTruthContext()):
        with pytest.raises(ConfigError, match=told):
            join(SkillBankCallback(rules(), context), actor=actor)
        assert join(SkillBankCallback(rules(), context)).train_tasks
        assert join(SkillBankCallback(rules(), context), actor=actor, stage="validate").panel_tasks  # nobody acts with a skill there
    for context in (BankContext(), ShuffledContext()):
        assert join(SkillBankCallback(rules(), context), actor=actor).train_tasks


class NoTasks:
    """An environment whose splits are empty."""

    unwrapped = property(lambda self: self)

    def close(self) -> None:
        pass

    def tasks(self, split: str) -> list[dict[str, str]]:
        return []


def test_splits_are_checked(join, monkeypatch):
    with pytest.raises(ConfigError, match=r"data\.train_split: .*nosuch"):
        join(train_split="nosuch")
    with pytest.raises(ConfigError, match=r"data\.panel_split: .*nosuch"):
        join(panel_split="nosuch")
    with pytest.raises(ConfigError, match="train_split and panel_split share 5 tasks"):
        join(panel_split="train")
    with pytest.raises(ConfigError, match="nosuch"):
        join(env_kwargs={"nosuch": 1})
    monkeypatch.setattr("skillsd.data.make_env", lambda *_: TextEnv(NoTasks()))
    with pytest.raises(ConfigError, match=r"data\.panel_split: the split test has no tasks"):
        join()


def test_overrides_are_by_environment(join):
    assert join(env_overrides={ENV: {"max_turns": 7}}).env_kwargs == KWARGS | {"max_turns": 7}
    others = {"another:x/Y-v0": {"nosuch": 1}, "skillsd_sokoban:skillsd/Sokoban-v1": {"max_turns": 9}}
    assert join(env_overrides=others).env_kwargs == make_data(env_overrides=others | {ENV: {}}).env_kwargs == KWARGS
    with pytest.raises(ConfigError, match=rf"data\.env_overrides\.max_turns: .* {{{ENV}: {{max_turns: \.\.\.}}}}"):
        make_data(env_overrides={ENV: {"boxes": 2}, "max_turns": 14})  # as it was written before
    with pytest.raises(ConfigError, match=r"data\.env_overrides\.skillsd_sokoban:.* is 14: give a dictionary"):
        make_data(env_overrides={ENV: 14})


def test_group_size(join):
    with pytest.raises(ConfigError, match=r"data\.group_size is 1: GRPO needs at least 2"):
        join(group_size=1)
    data = join(group_size=1, objective=Objective(policy_weight=0.0, distillation_weight=1.0))
    assert [len(g.trajectories) for g in next(iter(data.train_dataloader()))] == [1, 1]
    assert join(group_size=1, stage="validate").panel_tasks
    for key in ("group_size", "batch_tasks", "panel_attempts"):
        with pytest.raises(ConfigError, match=rf"data\.{key} is 0"):
            make_data(**{key: 0})
    with pytest.raises(ConfigError, match=r"data\.panel_temperature"):
        make_data(panel_temperature=-1.0)


# -- environments are closed ----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch) -> list[Any]:
    """Every environment made, with the number of times it was closed."""
    made: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> TextEnv:
        env = make_env(*args, **kwargs)
        env.unwrapped.closed, close = 0, env.close

        def count() -> None:
            env.unwrapped.closed += 1
            close()

        env.close = count  # type: ignore[method-assign]
        made.append(env)
        return env

    monkeypatch.setattr("skillsd.data.make_env", make)
    monkeypatch.setattr("skillsd.rollout.collector.make_env", make)
    return made


def closed(envs: list[Any]) -> list[int]:
    return [env.unwrapped.closed for env in envs]


def test_environments_made_to_look_are_closed(join, tmp_path, opened):
    """Those that list tasks and those that check boards, also where they refuse."""
    join()
    assert closed(opened) == [1, 1, 1]  # two that list the tasks, one that is tried
    with pytest.raises(ConfigError, match="nosuch"):
        join(panel_split="nosuch")
    assert closed(opened) == [1] * 4
    lines = [g | {"board": BOARD} for g in GOOD]
    join(tasks_file=write(tmp_path / "a.jsonl", *lines))
    with pytest.raises(ConfigError, match="task b"):
        join(tasks_file=write(tmp_path / "b.jsonl", lines[0], lines[1] | {"board": "#"}))
    assert closed(opened) == [1] * 6


class Stop(L.Callback):
    """Ends training with an error."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def on_train_batch_end(self, *_: Any) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("out of luck")])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_closes_its_environments(make_policy, tmp_path, opened, error, workers):
    policy = make_policy()
    module = SkillSD(policy.settings)
    module.policy = policy
    data, others = make_data(rollout=RolloutSettings(max_turn_tokens=1, env_workers=workers)), set(threading.enumerate())

    def trainer(*callbacks: Any) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0, callbacks=list(callbacks),
        )  # fmt: skip

    if error is None:
        trainer().fit(module, datamodule=data)
    else:
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer(Stop(error)).fit(module, datamodule=data)
    assert len(opened) == 3 + 4 and closed(opened) == [1] * 7  # two list the tasks, one is tried, four are played in
    assert not [t for t in set(threading.enumerate()) - others if t.name.startswith("environment")]
    val = trainer()
    val.limit_val_batches = 1.0
    val.validate(module, datamodule=data, verbose=False)  # the collector is made anew, and closed
    assert len(opened) == 7 + 2 + 3 and closed(opened) == [1] * 12
    data.teardown("validate")  # nothing is left to do
    assert closed(opened) == [1] * 12


# -- skills ---------------------------------------------------------------------------------------------------------------------


def bank_of(data_dir: Path, **skills: str) -> SkillBankCallback:
    callback = SkillBankCallback(rules(), template=TEMPLATE)
    callback.selection.bank = SkillBank(data_dir / "bank.sqlite")
    callback.selection.bank.insert([Skill("solved", "none", text, name.replace("_", "-")) for name, text in skills.items()], 0)
    return callback


@pytest.mark.parametrize("instruction", ["", "answer with one move ."])
def test_the_teacher_sees_the_skill_in_front(join, tmp_path, instruction):
    bank = bank_of(tmp_path, train_0003="up up left")
    data = join(bank, batch_tasks=5, env_kwargs=KWARGS | {"prompts": {"instruction": instruction}})
    (groups,) = data.train_dataloader()
    chat = data.collector.chat
    for g in groups:
        t = g.trajectories[0]
        if g.task.task_id != "train-0003":
            assert (g.skill_id, g.teacher_prompts) == (None, (t.prompt_ids,) * 2)
            continue
        assert g.skill_id == 1 and [t.skill_id for t in g.trajectories] == [1, 1]
        text = "skill solved none : up up left\n"
        first, second = map(list, g.teacher_prompts)
        assert first == second == chat.prompt_ids(instruction, t.turns[0].observation, text)
        skill, plain = chat.encode(text), list(t.prompt_ids)
        at = 1 if instruction else 0  # behind the mark of the system text
        assert first == plain[:at] + skill + plain[at:] and g.student_prompts == (t.prompt_ids,) * 2
        # The student has not seen it: the same tokens as without a bank.
        (same,) = data.collector.collect([Episode(g.task, 0)], seed=0, iteration=0)
        assert (same.prompt_ids, same.token_ids) == (t.prompt_ids, t.token_ids)


def test_a_teacher_without_its_skill_is_an_error(join, tmp_path, monkeypatch):
    bank = bank_of(tmp_path, **{f"train_000{i}": "up" for i in range(5)})
    data = join(bank)
    monkeypatch.setattr(BankContext, "__call__", lambda *_: None)
    with pytest.raises(RuntimeError, match="has 1 skills, and its teacher got none"):
        next(iter(data.train_dataloader()))


def test_two_epochs(make_policy, tmp_path, monkeypatch):
    """A real run: after the first epoch every teacher row carries a skill, and the record says which."""
    policy = make_policy(randomise=False)
    module = SkillSD(policy.settings, Objective(distillation_weight=0.5), OptimizerSettings(lr=1e-2))
    module.policy = policy
    bank, asked, rows = SkillBankCallback(rules(), template=TEMPLATE), [], []
    score = type(policy).score

    def spy(adapter: str, sequences: list[TokenSequence], temperature: float = 1.0) -> Any:
        (asked if adapter == "teacher" else rows).extend(sequences)
        return score(policy, adapter, sequences, temperature)

    monkeypatch.setattr(policy, "score", spy, raising=False)
    log: list[tuple[int, dict[str, float], list[Any]]] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            log.append((trainer.current_epoch, dict(outputs["metrics"]), batch))

    data = make_data()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, default_root_dir=tmp_path, callbacks=[TeacherSync(), bank, RunLog(), Keep()],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)

    assert [m["teacher/skill_share"] for _, m, _ in log] == [0, 0, 0, 1, 1, 1]
    assert [m["skills/bank"] > 0 for _, m, _ in log] == [True] * 6
    lines = [Trajectory.from_json(x) for x in (tmp_path / "trajectories.jsonl").read_text().splitlines()]
    assert lines == [t for _, _, batch in log for g in batch for t in g.trajectories] and len(lines) == 20
    assert all(t.skill_id is None for t in lines[:10])
    with SkillBank(tmp_path / "bank.sqlite", read_only=True) as stored:
        for t in lines[10:]:
            assert stored.get(t.skill_id).task_id == t.task_id and stored.get(t.skill_id).source_iteration < 3
        assert sum(s.uses for name in stored.tasks() for s in stored.skills(name)) <= 5
    # Student and teacher were asked for the same tokens, the teacher behind a longer prompt.
    conditioned = [
        (p, t.token_ids) for e, _, batch in log if e for g in batch for p, t in zip(g.teacher_prompts, g.trajectories, strict=True)
    ]
    assert sorted((tuple(s.prompt_ids), s.token_ids) for s in asked) == sorted(conditioned)
    plain = {(t.prompt_ids, t.token_ids) for t in lines}
    assert {(s.prompt_ids, s.token_ids) for s in rows} == plain
    assert all(len(prompt) > max(len(p) for p, _ in plain) for prompt, _ in conditioned)


# -- who acts -------------------------------------------------------------------------------------------------------------------

ACTORS: dict[str, tuple[str, Callable[[int, int], bool]]] = {
    "student": ("student", lambda member, size: False),
    "student_with_skill": ("student", lambda member, size: True),
    "half_with_skill": ("student", lambda member, size: member >= (size + 1) // 2),
    "teacher": ("teacher", lambda member, size: True),
}
"""Actor -> its adapter, and which members of a group act with the skill."""


def logprobs(data: RolloutData, adapter: str, prompt: Any, t: Trajectory) -> list[float]:
    """Of the trajectory's tokens, under an adapter behind a prompt."""
    with torch.no_grad():
        return list(data.policy.score(adapter, [TokenSequence(prompt, t.token_ids, t.action_mask)]).logp[0].tolist())


def furthest(a: Any, b: Any) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("actor", ACTORS)
def test_who_acts_and_what_everybody_sees(join, tmp_path, actor, size):
    adapter, acts_with_skill = ACTORS[actor]
    skills = {"train_0003": "up up left", "train_0001": "down"}
    data = join(bank_of(tmp_path, **skills), batch_tasks=5, group_size=size, actor=actor)
    (groups,) = data.train_dataloader()
    assert sum(g.skill_id is not None for g in groups) == 2
    for g in groups:
        first = g.trajectories[0].turns[0].observation
        workflow = skills.get(g.task.task_id.replace("-", "_"))
        plain, told = (
            tuple(data.collector.chat.prompt_ids("", first, x)) for x in ("", f"skill solved none : {workflow}\n" if workflow else "")
        )
        with_skill = [acts_with_skill(m, size) for m in range(size)]
        acted = tuple(told if x else plain for x in with_skill)
        assert [t.prompt_ids for t in g.trajectories] == list(acted) and g.sampled_by_teacher == (actor == "teacher")
        other = {
            "student": (plain,) * size,  # what the student is trained to say without, the teacher says with it
            "student_with_skill": (told,) * size,
            "half_with_skill": acted,
            "teacher": (plain,) * size,
        }
        assert g.student_prompts == other[actor]
        assert g.teacher_prompts == (tuple(plain if x else told for x in with_skill) if actor == "half_with_skill" else (told,) * size)
        untold = actor == "student_with_skill" or workflow is None
        assert [g.has_teacher_context(m) for m in range(size)] == [not untold] * size
        # On record is the log-prob of whoever sampled, behind the prompt that it saw: nobody else's.
        for t in g.trajectories:
            assert furthest(t.logprobs, logprobs(data, adapter, t.prompt_ids, t)) < 1e-4
            assert furthest(t.logprobs, logprobs(data, "teacher" if adapter == "student" else "student", t.prompt_ids, t)) > 1e-3
            if workflow is not None:
                assert furthest(t.logprobs, logprobs(data, adapter, plain if t.prompt_ids == told else told, t)) > 1e-3
            if actor == "teacher":
                assert t.logprobs == pytest.approx(logprobs(data, "teacher", g.teacher_prompts[t.member], t), abs=1e-4)
    again = join(bank_of(tmp_path / "again", **skills), batch_tasks=5, group_size=size, actor=actor)
    assert next(iter(again.train_dataloader())) == groups


@pytest.fixture
def train(make_policy: Callable[..., Any], tmp_path: Path) -> Callable[..., list[tuple[Any, dict[str, float], list[TokenSequence]]]]:
    """A real run; of each iteration the batch, its metrics, and what the teacher was asked."""

    def run(
        *callbacks: Any, policy: Any = None, epochs: int = 2, weight: float = 0.5, **settings: Any
    ) -> list[tuple[Any, dict[str, float], list[TokenSequence]]]:
        policy = policy or make_policy(randomise=False)
        module = SkillSD(policy.settings, Objective(distillation_weight=weight), OptimizerSettings(lr=1e-2))
        module.policy = policy
        score, log, asked = type(policy).score, [], []

        def spy(adapter: str, sequences: list[TokenSequence], temperature: float = 1.0) -> Any:
            asked.extend(sequences if adapter == "teacher" else ())
            return score(policy, adapter, sequences, temperature)

        class Keep(L.Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
                policy.__dict__["score"] = spy

            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                del policy.__dict__["score"]
                log.append((batch, dict(outputs["metrics"]), list(asked)))
                asked.clear()

        trainer = L.Trainer(
            accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path, callbacks=[*callbacks, Keep()],
        )  # fmt: skip
        trainer.fit(module, datamodule=make_data(**settings))
        return log

    return run


class AtStart(L.Callback):
    """Looks at each batch before it is trained on."""

    def __init__(self, look: Callable[[Any, Any, Any], Any]) -> None:
        self.look, self.seen = look, []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.look(trainer, module, batch))


@pytest.mark.parametrize("sync", [TeacherSync(), TeacherSync(every=2), TeacherSync("ema", rate=0.3), TeacherSync("frozen")])
def test_a_teacher_that_rolls_out_is_current(train, sync):
    """What it sampled is on record as it is scored in the same iteration: it was synced before the rollout, not after."""

    def look(trainer: Any, module: Any, batch: Any) -> tuple[float, float]:
        data, rows = trainer.datamodule, [(t, g.teacher_prompts[t.member]) for g in batch for t in g.trajectories]
        off = [max(furthest(t.logprobs, logprobs(data, who, p, t)) for t, p in rows) for who in ("teacher", "student")]
        return off[0], off[1]

    seen = AtStart(look)
    shaped = KWARGS | {"distance_reward": 0.1, "invalid_penalty": 0.1}  # rewards that differ within each group
    log = train(sync, SkillBankCallback(rules(), template=TEMPLATE), seen, actor="teacher", env_kwargs=shaped, group_size=4)
    teacher, student = zip(*seen.seen, strict=True)
    assert max(teacher) < 1e-4 and len(teacher) == 6
    lags = {"sync": [False, sync.every == 2] * 3, "ema": [False] + [True] * 5, "frozen": [False] + [True] * 5}
    assert [x > 1e-3 for x in student] == lags[sync.mode]
    for i, (batch, m, asked) in enumerate(log):
        rows = [(g.teacher_prompts[t.member], t.token_ids) for g in batch for t in g.trajectories]
        assert m["policy/clip_fraction"] == m["policy/logp_drift"] == 0  # GRPO is on-policy with today's student
        assert sorted((s.prompt_ids, s.token_ids) for s in asked) == (sorted(rows) if i >= 3 or lags[sync.mode][i] else [])
    assert [m["teacher/skill_share"] for _, m, _ in log] == [0, 0, 0, 1, 1, 1] and all(m["teacher/k3"] > 0 for _, m, _ in log[3:])


# -- contexts that choose after the rollout -------------------------------------------------------------------------------------


class Counted(RulesSummariser):
    """Notes what it summarises; some of it fails."""

    def __init__(self, fails: Callable[[Trajectory], bool]) -> None:
        super().__init__(joiner=" ", solved_workflow="{workflow} {turns}", unsolved_workflow="{workflow} {turns}")
        self.fails, self.seen = fails, []

    def summarise(self, trajectories: Any) -> list[Skill | None]:
        self.seen += [(t.iteration, t.task_id, t.member) for t in trajectories]
        return [None if self.fails(t) else self.plain(t) for t in trajectories]

    def plain(self, t: Trajectory) -> Skill:
        return self.summarise_one(t.turns, t.success, t.completion).of(t)


class Later(Counted):
    """Ready when it is waited for, or told to be."""

    asynchronous = True
    ready = 0

    def collect(self) -> list[Any]:
        done, self._ready, self.ready = self._ready[: self.ready], self._ready[self.ready :], 0
        return done

    def drain(self) -> None:
        self.ready = len(self._ready)


@pytest.mark.parametrize("kind", [Counted, Later])
def test_hindsight(train, tmp_path, kind):
    """Each member's teacher is told of this very attempt. Summarised once, before the update; in the bank once, after it."""
    summariser = kind(lambda t: (t.iteration + t.member) % 3 == 0)
    bank = SkillBankCallback(summariser, HindsightContext(), capacity=None, template=TEMPLATE)
    sizes = AtStart(lambda trainer, module, batch: (bank.selection.bank.position, len(summariser.seen)))
    log = train(TeacherSync(), bank, sizes, RunLog(), group_size=3)
    chat, failed, inserted = Chat(build_tokenizer(), ()), 0, 0
    for (batch, m, asked), (position, seen) in zip(log, sizes.seen, strict=True):
        rows, want = [t for g in batch for t in g.trajectories], []
        assert (seen, position) == (inserted + failed + len(rows), inserted)  # made before the update, stored after it
        for g in batch:
            assert g.skill_id is None and {t.skill_id for t in g.trajectories} == {None} and not g.sampled_by_teacher
            for t, student, teacher in zip(g.trajectories, g.student_prompts, g.teacher_prompts, strict=True):
                text = "" if summariser.fails(t) else summariser.plain(t).render(TEMPLATE)
                assert teacher == tuple(chat.prompt_ids("", t.turns[0].observation, text))
                assert student == t.prompt_ids == tuple(chat.prompt_ids("", t.turns[0].observation))
                want += [(teacher, t.token_ids)] if text else []
        assert 0 < len(want) < len(rows) and sorted((s.prompt_ids, s.token_ids) for s in asked) == sorted(want)
        assert m["teacher/skill_share"] == len(want) / len(rows)
        inserted, failed = inserted + len(want), failed + len(rows) - len(want)
        assert m["skills/failed"] == failed and m["time/summary_s"] > 0
    assert sorted(summariser.seen) == sorted((t.iteration, t.task_id, t.member) for b, *_ in log for g in b for t in g.trajectories)
    lines = [Trajectory.from_json(x) for x in (tmp_path / "trajectories.jsonl").read_text().splitlines()]
    good = [t for t in lines if not summariser.fails(t)]
    with SkillBank(tmp_path / "bank.sqlite", read_only=True) as stored:
        kept = [s for name in stored.tasks() for s in stored.skills(name)]
        assert sum(s.sources for s in kept) == len(good) == inserted and all(s.uses == 0 for s in kept)
        assert {(s.task_id, s.texts) for s in kept} == {(t.task_id, summariser.plain(t).texts) for t in good}


def test_hindsight_of_episodes_without_a_turn(train):
    """A prompt that does not fit leaves nothing to look back at."""
    summariser = Counted(lambda t: False)
    bank = SkillBankCallback(summariser, HindsightContext(), template=TEMPLATE)
    log = train(TeacherSync(), bank, epochs=1, rollout=RolloutSettings(max_turn_tokens=1, max_prompt_tokens=1))
    assert summariser.seen == [] and all(asked == [] and m["skills/bank"] == m["skills/failed"] == 0 for _, m, asked in log)
    assert all(g.teacher_prompts == g.student_prompts == tuple(t.prompt_ids for t in g.trajectories) for batch, *_ in log for g in batch)


def alter(data: RolloutData, change: Callable[[Trajectory], Trajectory]) -> None:
    """Let the episodes come out otherwise."""
    collect = data.collector.collect
    data.collector.collect = lambda rows, **settings: [change(t) for t in collect(rows, **settings)]  # type: ignore[method-assign]


@pytest.mark.parametrize("template", ["solved : {actions}\n", None])
def test_a_sibling_that_solved_it(join, template):
    """Its attempt, or its answers alone, are in front of the others' teacher prompts; where nobody else solved it there is nothing."""
    bank = SkillBankCallback(rules(), SiblingContext(), template=TEMPLATE, transcript_template=template)
    bank.selection.bank = SkillBank()
    data = join(bank, batch_tasks=5, group_size=4)
    data.train_dataloader()
    solved = {"train-0000": {}, "train-0001": {2: 3}, "train-0002": {0: 2, 3: 1}, "train-0003": {1: 2, 2: 2, 3: 2}, "train-0004": {0: 3}}

    def change(t: Trajectory) -> Trajectory:
        turns = tuple(replace(t.turns[0], action=f"move {t.member} {i}") for i in range(solved[t.task_id].get(t.member, 1)))
        return replace(t, turns=turns, success=t.member in solved[t.task_id])

    alter(data, change)
    (groups,) = data.train_dataloader()
    told = {"train-0000": "----", "train-0001": "22-2", "train-0002": "3330", "train-0003": "1211", "train-0004": "-000"}
    for g in groups:
        for t, teacher in zip(g.trajectories, g.teacher_prompts, strict=True):
            other = told[g.task.task_id][t.member]
            text = ""
            if other != "-":
                shown = g.trajectories[int(other)]
                actions = " ".join(f"move {other} {i}" for i in range(len(shown.turns)))
                text = f"solved : {actions}\n" if template else TRANSCRIPT_TEMPLATE.format(transcript=conversation(shown))
                assert all(x in text for x in actions.split())
            assert teacher == tuple(data.collector.chat.prompt_ids("", t.turns[0].observation, text))
            assert g.has_teacher_context(t.member) == bool(text) and g.student_prompts[t.member] == t.prompt_ids
    assert len(bank.selection.bank) == 0  # it is filled as ever, at the iteration's end


def test_the_environment_s_own_solution(train, monkeypatch):
    """One plan a task, whatever the members did, asked for once; the bank is filled with what they did, not with the plan."""
    asked: list[str] = []
    solve = RolloutData.solution

    def count(self: RolloutData, task_id: str, summariser: Any) -> Skill | None:
        asked.append(task_id)
        return solve(self, task_id, summariser)

    monkeypatch.setattr(RolloutData, "solution", count)
    env = make_env(ENV, KWARGS | {"max_turns": 9})
    plans = {}
    for name in (f"train-{i:04d}" for i in range(5)):
        env.reset(Task(name))
        plans[name] = env.solution()
    assert all(plans.values()) and len({tuple(x) for x in plans.values()}) > 2
    summariser = Counted(lambda t: False)
    bank = SkillBankCallback(summariser, GroundTruthContext(), template="{golden_workflow}|\n")
    log = train(TeacherSync(), bank, env_kwargs=KWARGS | {"max_turns": 9})
    chat = Chat(build_tokenizer(), ())
    for g in (g for batch, *_ in log for g in batch):
        text = f"{' '.join(plans[g.task.task_id])} {len(plans[g.task.task_id])}|\n"
        assert g.teacher_prompts == (tuple(chat.prompt_ids("", g.trajectories[0].turns[0].observation, text)),) * 2
        assert g.student_prompts == tuple(t.prompt_ids for t in g.trajectories) != g.teacher_prompts and g.skill_id is None
    assert sorted(asked) == sorted(plans)
    played = [(t.iteration, t.task_id, t.member) for batch, *_ in log for g in batch for t in g.trajectories]
    assert sorted(summariser.seen) == sorted([*played, *((0, name, 0) for name in plans)])
    assert log[-1][1]["skills/bank"] > 0 and all(len(a) == 2 * len(b) for b, _, a in log)


def test_a_task_whose_solution_is_not_known(join, tmp_path):
    """It teaches nothing."""
    boards = {"stuck": "#####\n#XP_#\n#__O#\n#___#\n#####", "open": BOARD}
    lines = [{"task_id": name, "split": "train", "board": b} for name, b in boards.items()]
    lines.append({"task_id": "held-out", "split": "test", "board": BOARD})
    bank = SkillBankCallback(rules(), GroundTruthContext(), template="{golden_workflow}|\n")
    bank.selection.bank = SkillBank()
    data = join(bank, tasks_file=write(tmp_path / "tasks.jsonl", *lines))
    (groups,) = data.train_dataloader()
    told = {g.task.task_id: {g.has_teacher_context(m) for m in (0, 1)} for g in groups}
    assert told == {"stuck": {False}, "open": {True}}


def test_an_environment_without_solutions(join, monkeypatch):
    bank = SkillBankCallback(rules(), GroundTruthContext())
    bank.selection.bank = SkillBank()
    data = join(bank)
    stream = data.train_dataloader()
    monkeypatch.delattr("skillsd_sokoban.env.SokobanEnv.solution")
    with pytest.raises(ConfigError, match=r"skills\.context: .*Sokoban-v0 offers no solution\(\): choose another context"):
        next(iter(stream))


def test_answers_to_whole_conversations(join):
    """What a summariser in need of a voice gets: the base's answer, by a key of its own; "" where nothing fits."""
    data = join()
    ask = [[{"role": "user", "content": "up down"}], [{"role": "user", "content": "up " * 2000}], [{"role": "user", "content": "left"}]]
    texts = data.generate(ask, 5, [("a", 0), ("b", 0), ("c", 0)])
    assert texts[1] == "" and texts[0] and texts == data.generate(ask, 5, [("a", 0), ("b", 0), ("c", 0)])
    assert data.generate(ask[:1], 5, [("a", 0)]) == texts[:1] != data.generate(ask[:1], 5, [("other", 0)])
    assert data.generate(ask[:1], 5, [("a", 0)], adapter="student") != texts[:1]
