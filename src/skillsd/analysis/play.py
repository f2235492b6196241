"""One episode, turn by turn, for reading: the model's, the oracle's, or that of an agent which the environment offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skillsd.analysis.gif import Gif
from skillsd.bounded import one_line, visible
from skillsd.demonstration import demonstrate, play
from skillsd.environment import TextEnv, TimeStep
from skillsd.errors import ConfigError
from skillsd.files.run_folder import BANK_FILE
from skillsd.rollout import Episode
from skillsd.skills import BankContext, RulesSummariser, SkillBank
from skillsd.skills.callback import find_selection
from skillsd.trajectory import Task, Trajectory, Turn
from skillsd.words import count


def play_model(trainer: Any, model: Any, data: Any, level: int | None, task_id: str | None, skill: bool, gif: Gif, weights: str) -> None:
    """Print, and draw as a GIF, the model's greedy episode; with `skill`, the task's skill is put in front of the prompt.

    The first line says which weights play, as `weights` describes them, and with which skill.
    """
    data.trainer = trainer
    trainer.strategy.connect(model)
    data.setup("predict")
    try:
        task = pick(data, data.panel_tasks, level, task_id)
        source, text = skill_text(trainer, data, task) if skill else ("none", "")
        (t,) = data.collector.collect([Episode(task, 0, text)], seed=data.seed, iteration=0, temperature=0.0)
    finally:
        data.teardown("predict")
    print(visible(f"weights: {weights}; skill: {source}"))
    _print_head(task, t.instruction)
    if text:
        print(visible(f"--- skill\n{text.rstrip()}"))
    for number, turn in enumerate(t.turns, 1):
        _show_turn(number, turn, gif)
    _show_end(t, t.finish_reason, gif)


def play_scripted(data: Any, policy: str, level: int | None, task_id: str | None, gif: Gif) -> None:
    """Print, and draw as a GIF, an episode of the oracle or of an agent, each turn as it is played. No model, no tokenizer.

    Raises:
        ConfigError: no such policy, or no such task.
    """
    with data.open_env() as env:
        act = actor(env, policy)
        task = pick(data, data.tasks(data.panel_split, "panel_split"), level, task_id)

        def watch(now: TimeStep, turns: Sequence[Turn]) -> None:
            if turns:
                _show_turn(len(turns), turns[-1], gif)
                return
            print(visible(f"weights: none, {policy} plays; skill: none"))
            _print_head(task, now.instruction)

        t = play(env, task, act, watch)
    _show_end(t, "no solution from here" if t.finish_reason == "length" else t.finish_reason, gif)


def actor(env: TextEnv, policy: str) -> Callable[[str], str | None]:
    """What answers an observation; the oracle's answer is None where the environment knows no solution.

    Args:
        env: An environment. It may offer `solution()`, the plan from its current state, and `agents`.
        policy: `oracle`, or a name in `agents`.

    Raises:
        ConfigError: the environment does not offer it.
    """
    agents = env.agents()
    offered = ", ".join(["model", *(["oracle"] if env.offers("solution") else []), *sorted(agents)])
    if policy == "oracle":
        if not env.offers("solution"):
            raise ConfigError(f"policy is oracle: the environment offers no solution() to replay: choose one of {offered}.")
        return lambda observation: next(iter(env.solution()), None)  # asked anew each turn: it follows whatever happened
    if policy not in agents:
        raise ConfigError(f"policy is {policy}: with this environment choose one of {offered}.")
    call = f"the policy {policy}"
    agent = env.call(call, agents[policy])
    return lambda observation: env.call(call, lambda: agent.act(observation))


def pick(data: Any, panel: Sequence[Task], level: int | None, task_id: str | None) -> Task:
    """The panel's task `level` (0 if nothing is given), or the task of the panel or the training split called `task_id`."""
    if task_id is None:
        level = level or 0
        if not 0 <= level < len(panel):
            raise ConfigError(f"level is {level}: the panel has levels 0 to {len(panel) - 1}.")
        return panel[level]
    if level is not None:
        raise ConfigError("level and task are both given: name the task to play with one of them.")
    for task in panel:
        if task.task_id == task_id:
            return task
    training: list[Task] = data.tasks(data.train_split, "train_split")
    for task in training:
        if task.task_id == task_id:
            return task
    splits = f"{data.panel_split} ({panel[0].task_id}, ...) nor of {data.train_split} ({training[0].task_id}, ...)"
    raise ConfigError(f"task is {task_id}: it is no task of the split {splits}: name one of them.")


def skill_text(trainer: Any, data: Any, task: Any) -> tuple[str, str]:
    """Where the task's skill is from, the run's bank or the environment's own solution, and its text."""
    selection = find_selection(trainer)
    if selection is None:
        raise ConfigError("skill: the trainer has no SkillBankCallback, which holds the template of a skill: leave out --skill.")
    path = Path(trainer.default_root_dir) / BANK_FILE
    if path.is_file():
        with SkillBank(path, read_only=True) as bank:
            own = selection.context if isinstance(selection.context, BankContext) else BankContext()
            if (found := own(bank, task.task_id, [task.task_id], 0, 0)) is not None:
                return f"{found.skill_id} of {path}", str(found.render(selection.template))
    with data.open_env() as env:
        if not env.offers("solution"):
            raise ConfigError(f"skill: the bank has none of {task.task_id}, and the environment no solution(): leave out --skill.")
        played, _ = demonstrate(env, task)
    rules = selection.summariser if isinstance(selection.summariser, RulesSummariser) else RulesSummariser()  # others ask a model
    skill = rules.summarise_one(played.turns, played.success, float(played.success))
    why = f"{path} has none of {task.task_id}" if path.is_file() else f"there is no {path}"
    return f"made from the environment's own solution ({why})", str(skill.render(selection.template))


def _print_head(task: Task, instruction: str) -> None:
    print(f"task {one_line(str(task.task_id))} {one_line(str(task.difficulty))}")
    if instruction:
        print(visible(instruction))


def _show_turn(number: int, turn: Turn, gif: Gif) -> None:
    print(visible(f"--- turn {number}\n{turn.observation}\n> {turn.action}"), flush=True)  # no escape sequence reaches the terminal
    gif.add(turn.observation, f"turn {number}: {turn.action}")


def _show_end(t: Trajectory, finish: str, gif: Gif) -> None:
    """The answer to the last action, and what the episode came to."""
    if t.final_observation is not None:
        print(visible(f"--- at the end\n{t.final_observation}"))
        gif.add(t.final_observation, "solved" if t.success else f"not solved: {finish}")
    reason = f" ({visible(' '.join(t.failure.split()))})" if t.failure else ""
    print(f"--- {finish}{reason}: success {t.success}, completion {t.completion:.2f}, reward {t.reward:.2f}, {count(len(t.turns), 'turn')}")
    gif.save()
