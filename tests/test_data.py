"""The stream of groups, the panel, and tasks from a file."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from skillsd.callbacks import RunLog, TeacherSync
from skillsd.data import RolloutData
from skillsd.errors import ConfigError
from skillsd.module import OptimizerSettings, SkillSD
from skillsd.objective import Objective
from skillsd.policy import TokenSequence
from skillsd.rollout import RolloutSettings, Row, make_env
from skillsd.skills import RulesSummariser, Skill, SkillBank
from skillsd.skills.callback import SkillBankCallback
from skillsd.trajectory import Trajectory

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
        data.trainer = SimpleNamespace(lightning_module=module, callbacks=list(callbacks))  # type: ignore[assignment]
        data.setup(stage)
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
            assert g.teacher_prompt_ids == g.trajectories[0].prompt_ids == g.trajectories[1].prompt_ids
            assert g.skill_id is None and g.temperature == 1.0
    assert stream.state_dict() == {"position": 3}
    assert [g.task.task_id for b in stream for g in b] == [t.task_id for t in stream.order(1)]


def test_a_stream_goes_on_where_it_stood(join):
    """Trajectories are a function of (seed, iteration) alone."""
    whole = [b for stream in [join().train_dataloader()] for _ in range(2) for b in stream]
    data = join()
    data.load_state_dict({"position": 4})
    assert list(data.train_dataloader()) == whole[4:]
    assert data.state_dict() == {"position": 6}
    assert list(join(seed=1).train_dataloader()) != whole[:3]


def test_failed_episodes_are_told_once_an_iteration(join, caplog):
    stream = join(batch_tasks=2, group_size=3).train_dataloader()
    collector = stream.data.collector
    collect, lost = collector.collect, {(0, 1): "out of memory", (0, 4): "killed", (2, 0): "killed"}

    def fail(rows: list[Row], iteration: int, **settings: Any) -> list[Trajectory]:
        played = collect(rows, iteration=iteration, **settings)
        return [
            replace(t, finish_reason="failed", failure=lost[iteration, i], reward=0.0) if (iteration, i) in lost else t
            for i, t in enumerate(played)
        ]

    collector.collect = fail
    batches = list(stream)
    assert [r.getMessage() for r in caplog.records if r.name == "skillsd.data"] == [
        "iteration 0: 2 of 6 episodes failed: out of memory", "iteration 2: 1 of 3 episodes failed: killed",
    ]  # fmt: skip
    assert [t.failure for g in batches[0] for t in g.trajectories] == ["", "out of memory", "", "", "killed", ""]  # they stay there


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
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)) + "\n" for x in lines))
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
        ('{"task_id": "a", "split": "train"}', "repeats the task_id a"),
    ],
)
def test_a_bad_line_is_named(join, tmp_path, line, why):
    path = write(tmp_path / "tasks.jsonl", *GOOD, line)
    with pytest.raises(ConfigError, match=rf"data\.init_args\.tasks_file: .*tasks\.jsonl:3 .*{why}"):
        join(tasks_file=path)


def test_bad_files(join, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.init_args\.tasks_file: no file"):
        join(tasks_file=str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match=r"data\.init_args\.panel_split: .* no task of split test"):
        join(tasks_file=write(tmp_path / "a.jsonl", GOOD[0]))
    both = write(tmp_path / "b.jsonl", *GOOD, {"task_id": "a", "split": "test"})
    with pytest.raises(ConfigError, match=r"train_split and panel_split share 1 tasks \(a"):
        join(tasks_file=both)
    (tmp_path / "c.jsonl").write_bytes(b'{"task_id": "\xff", "split": "test"}\n')
    with pytest.raises(ConfigError, match=r"data\.init_args\.tasks_file: .*c\.jsonl"):
        join(tasks_file=str(tmp_path / "c.jsonl"))


# -- bad settings ---------------------------------------------------------------------------------------------------------------


class NoTasks:
    """An environment whose splits are empty."""

    unwrapped = property(lambda self: self)

    def close(self) -> None:
        pass

    def tasks(self, split: str) -> list[dict[str, str]]:
        return []


def test_splits_are_checked(join, monkeypatch):
    with pytest.raises(ConfigError, match=r"data\.init_args\.train_split: .*nosuch"):
        join(train_split="nosuch")
    with pytest.raises(ConfigError, match=r"data\.init_args\.panel_split: .*nosuch"):
        join(panel_split="nosuch")
    with pytest.raises(ConfigError, match="train_split and panel_split share 5 tasks"):
        join(panel_split="train")
    with pytest.raises(ConfigError, match="nosuch"):
        join(env_kwargs={"nosuch": 1})
    monkeypatch.setattr("skillsd.data.make_env", lambda *_: NoTasks())
    with pytest.raises(ConfigError, match=r"data\.init_args\.panel_split: the split test has no tasks"):
        join()


def test_overrides_are_by_environment(join):
    assert join(env_overrides={ENV: {"max_turns": 7}}).env_kwargs == KWARGS | {"max_turns": 7}
    others = {"another:x/Y-v0": {"nosuch": 1}, "skillsd_sokoban:skillsd/Sokoban-v1": {"max_turns": 9}}
    assert join(env_overrides=others).env_kwargs == make_data(env_overrides=others | {ENV: {}}).env_kwargs == KWARGS
    with pytest.raises(ConfigError, match=rf"data\.init_args\.env_overrides\.max_turns: .* {{{ENV}: {{max_turns: \.\.\.}}}}"):
        make_data(env_overrides={ENV: {"boxes": 2}, "max_turns": 14})  # as it was written before
    with pytest.raises(ConfigError, match=r"data\.init_args\.env_overrides\.skillsd_sokoban:.* is 14: give a dictionary"):
        make_data(env_overrides={ENV: 14})


def test_group_size(join):
    with pytest.raises(ConfigError, match=r"data\.init_args\.group_size is 1: GRPO needs at least 2"):
        join(group_size=1)
    data = join(group_size=1, objective=Objective(policy_weight=0.0, distillation_weight=1.0))
    assert [len(g.trajectories) for g in next(iter(data.train_dataloader()))] == [1, 1]
    assert join(group_size=1, stage="validate").panel_tasks
    for key in ("group_size", "batch_tasks", "panel_attempts"):
        with pytest.raises(ConfigError, match=rf"data\.init_args\.{key} is 0"):
            make_data(**{key: 0})
    with pytest.raises(ConfigError, match=r"data\.init_args\.panel_temperature"):
        make_data(panel_temperature=-1.0)


# -- environments are closed ----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch) -> list[Any]:
    """Every environment made, with the number of times it was closed."""
    made: list[Any] = []

    def make(env_id: str, kwargs: dict[str, Any]) -> Any:
        env = make_env(env_id, kwargs)
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
    assert closed(opened) == [1, 1]
    with pytest.raises(ConfigError, match="nosuch"):
        join(panel_split="nosuch")
    assert closed(opened) == [1, 1, 1]
    lines = [g | {"board": BOARD} for g in GOOD]
    join(tasks_file=write(tmp_path / "a.jsonl", *lines))
    with pytest.raises(ConfigError, match="task b"):
        join(tasks_file=write(tmp_path / "b.jsonl", lines[0], lines[1] | {"board": "#"}))
    assert closed(opened) == [1] * 5


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
    data = make_data(rollout=RolloutSettings(max_turn_tokens=1, env_workers=workers))

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
    assert len(opened) == 2 + 4 and closed(opened) == [1] * 6  # two list the tasks, four are played in
    assert not [t for t in threading.enumerate() if t.name.startswith("environment")]
    val = trainer()
    val.limit_val_batches = 1.0
    val.validate(module, datamodule=data, verbose=False)  # the collector is made anew, and closed
    assert len(opened) == 6 + 1 + 3 and closed(opened) == [1] * 10
    data.teardown("validate")  # nothing is left to do
    assert closed(opened) == [1] * 10


# -- skills ---------------------------------------------------------------------------------------------------------------------


def bank_of(data_dir: Path, **skills: str) -> SkillBankCallback:
    callback = SkillBankCallback(rules(), template=TEMPLATE)
    callback.bank = SkillBank(data_dir / "bank.sqlite")
    callback.bank.insert([Skill("solved", "none", text, name.replace("_", "-")) for name, text in skills.items()], 0)
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
            assert (g.skill_id, g.teacher_prompt_ids) == (None, t.prompt_ids)
            continue
        assert g.skill_id == 1 and [t.skill_id for t in g.trajectories] == [1, 1]
        text = "skill solved none : up up left\n"
        assert list(g.teacher_prompt_ids) == chat.prompt_ids(instruction, t.turns[0].observation, text)
        skill, plain = chat.encode(text), list(t.prompt_ids)
        at = 1 if instruction else 0  # behind the mark of the system text
        assert list(g.teacher_prompt_ids) == plain[:at] + skill + plain[at:]
        # The student has not seen it: the same tokens as without a bank.
        (same,) = data.collector.collect([Row(g.task, 0)], seed=0, iteration=0)
        assert (same.prompt_ids, same.token_ids) == (t.prompt_ids, t.token_ids)


def test_a_teacher_without_its_skill_is_an_error(join, tmp_path, monkeypatch):
    bank = bank_of(tmp_path, **{f"train_000{i}": "up" for i in range(5)})
    data = join(bank)
    monkeypatch.setattr(bank, "refresh", lambda *_, **__: None)
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
            log.append((trainer.current_epoch, dict(module.metrics), batch))

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
    conditioned = [(g.teacher_prompt_ids, t.token_ids) for e, _, batch in log if e for g in batch for t in g.trajectories]
    assert sorted((tuple(s.prompt_ids), s.token_ids) for s in asked) == sorted(conditioned)
    plain = {(t.prompt_ids, t.token_ids) for t in lines}
    assert {(s.prompt_ids, s.token_ids) for s in rows} == plain
    assert all(len(prompt) > max(len(p) for p, _ in plain) for prompt, _ in conditioned)


def test_answers_to_whole_conversations(join):
    """What a summariser in need of a voice gets: the base's answer, by a key of its own; "" where nothing fits."""
    data = join()
    ask = [[{"role": "user", "content": "up down"}], [{"role": "user", "content": "up " * 2000}], [{"role": "user", "content": "left"}]]
    texts = data.generate(ask, 5, [("a", 0), ("b", 0), ("c", 0)])
    assert texts[1] == "" and texts[0] and texts == data.generate(ask, 5, [("a", 0), ("b", 0), ("c", 0)])
    assert data.generate(ask[:1], 5, [("a", 0)]) == texts[:1] != data.generate(ask[:1], 5, [("other", 0)])
    assert data.generate(ask[:1], 5, [("a", 0)], adapter="student") != texts[:1]
