"""A small Sokoban: its data module, its bank and its tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from skillsd.data import RolloutData
from skillsd.policy import TokenSequence
from skillsd.rollout import RolloutSettings
from skillsd.skills import RulesSummariser, Skill, SkillBank
from skillsd.skills.callback import SkillBankCallback
from skillsd.trajectory import Trajectory

ENV = "skillsd_sokoban:skillsd/Sokoban-v0"
KWARGS: dict[str, Any] = {
    "size": 5, "boxes": 1, "difficulties": {"short": {"lengths": [2, 5]}}, "splits": {"train": {"short": 5}, "test": {"short": 3}},
    "max_turns": 3, "action_format": "bare", "prompts": {"instruction": ""},
}  # fmt: skip
BOARD = "#####\n#P__#\n#_XO#\n#___#\n#####"
TEMPLATE = "skill {success_analysis} {mistake_analysis} : {golden_workflow}\n"
TWO_TASKS = [{"task_id": "a", "split": "train"}, {"task_id": "b", "split": "test"}]


def rules() -> RulesSummariser:
    texts = {"solved_success": "solved", "solved_mistakes": "none", "unsolved_success": "unsolved", "unsolved_mistakes": "avoid"}
    return RulesSummariser(joiner=" ", solved_workflow="{workflow}", unsolved_workflow="{workflow}", **texts)


def make_data(**settings: Any) -> RolloutData:
    """Two tasks an iteration, two members each, one token a turn, unless `settings` say otherwise."""
    settings = {"batch_tasks": 2, "group_size": 2, "rollout": RolloutSettings(max_turn_tokens=1)} | settings
    return RolloutData(ENV, settings.pop("env_kwargs", KWARGS), **settings)


def bank_with(data_dir: Path, **skills: str) -> SkillBankCallback:
    """A callback on a stored bank with one skill a task: `train_0003="up up left"`."""
    callback = SkillBankCallback(rules(), template=TEMPLATE)
    callback.selection.bank = SkillBank(data_dir / "bank.sqlite")
    callback.selection.bank.insert([Skill("solved", "none", text, name.replace("_", "-")) for name, text in skills.items()], 0)
    return callback


def write_jsonl(path: Path, *lines: Any) -> str:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)) + "\n" for x in lines), encoding="utf-8")
    return str(path)


def logprobs_under(data: RolloutData, adapter: str, prompt: Any, t: Trajectory) -> list[float]:
    """Log-probs of the trajectory's tokens under an adapter behind a prompt; 0 where they are no actions."""
    with torch.no_grad():
        return list(data.policy.score(adapter, [TokenSequence(prompt, t.token_ids, t.action_mask)]).logp[0].tolist())


def max_difference(a: Any, b: Any) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
