"""One episode, turn by turn, for reading."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from skillsd.errors import ConfigError
from skillsd.rollout import Row, demonstrate, make_env
from skillsd.skills import SkillBank


def play(trainer: Any, model: Any, data: Any, level: int, skill: bool) -> None:
    """Print a greedy episode of the panel's task `level`; with `skill`, its skill is put in front of the prompt."""
    data.trainer = trainer
    trainer.strategy.connect(model)
    data.setup("validate")
    if not 0 <= level < len(data.panel_tasks):
        raise ConfigError(f"level is {level}: the panel has levels 0 to {len(data.panel_tasks) - 1}.")
    task = data.panel_tasks[level]
    text = skill_text(trainer, data, task) if skill else ""
    (t,) = data.collector.collect([Row(task, 0, text)], seed=data.seed, iteration=0, temperature=0.0)
    print(f"task {task.task_id} {task.difficulty}")
    if t.instruction:
        print(t.instruction)
    if text:
        print(f"--- skill\n{text.rstrip()}")
    for number, turn in enumerate(t.turns, 1):
        print(f"--- turn {number}\n{turn.observation}\n> {turn.action}")
    print(f"--- {t.finish_reason}: success {t.success}, completion {t.completion:.2f}, reward {t.reward:.2f}, {len(t.turns)} turns")


def skill_text(trainer: Any, data: Any, task: Any) -> str:
    """The task's skill from the run's bank, or from the environment's own solution."""
    callback = data.bank
    if callback is None:
        raise ConfigError("trainer.callbacks: --skill needs the SkillBankCallback: it holds the skill's template.")
    path = Path(trainer.default_root_dir) / "bank.sqlite"
    if path.is_file():
        with SkillBank(path, read_only=True) as bank:
            if (found := bank.retrieve(task.task_id)) is not None:
                return str(found.render(callback.template))
    env = make_env(data.env_id, data.env_kwargs)
    if not hasattr(env.unwrapped, "solution"):
        raise ConfigError(f"the bank has no skill of {task.task_id}, and the environment offers no solution() to make one from.")
    turns, _, _, success = demonstrate(env, task, 0.0, random.Random(0))
    return str(callback.summariser.summarise_one(turns, success, float(success)).render(callback.template))
