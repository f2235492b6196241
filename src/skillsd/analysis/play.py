"""One episode, turn by turn, for reading: the model's, the oracle's, or that of an agent which the environment offers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from skillsd.analysis.film import Film
from skillsd.bounded import one_line, visible
from skillsd.errors import ConfigError
from skillsd.rollout import Row, answers, ask, demonstrate, make_env, plan_of
from skillsd.run_folder import BANK_FILE
from skillsd.skills import BankContext, RulesSummariser, SkillBank
from skillsd.trajectory import Task, Turn
from skillsd.words import count


def play_model(trainer: Any, model: Any, data: Any, level: int | None, task_id: str | None, skill: bool, film: Film, weights: str) -> None:
    """Print and film the model's greedy episode; with `skill`, the task's skill is put in front of the prompt.

    The first line says which weights play, as `weights` describes them, and with which skill.
    """
    data.trainer = trainer
    trainer.strategy.connect(model)
    data.setup("predict")
    try:
        task = pick(data, data.panel_tasks, level, task_id)
        source, text = skill_text(trainer, data, task) if skill else ("none", "")
        (t,) = data.collector.collect([Row(task, 0, text)], seed=data.seed, iteration=0, temperature=0.0)
    finally:
        data.teardown("predict")
    print(visible(f"weights: {weights}; skill: {source}"))
    _print_head(task, t.instruction)
    if text:
        print(visible(f"--- skill\n{text.rstrip()}"))
    for number, turn in enumerate(t.turns, 1):
        _show_turn(number, turn, film)
    _show_last(t.final_observation, _ending(t.finish_reason, t.success), film)
    _print_end(t.finish_reason, t.success, t.completion, t.reward, len(t.turns), t.failure)
    film.save()


def play_scripted(data: Any, policy: str, level: int | None, task_id: str | None, film: Film) -> None:
    """Print and film an episode of the oracle or of an agent, each turn as it is played. No model, no tokenizer.

    Raises:
        ConfigError: no such policy, or no such task.
    """
    with closing(make_env(data.env_id, data.env_kwargs)) as env:
        act = actor(env.unwrapped, policy)
        task = pick(data, data._tasks(data.panel_split, "panel_split"), level, task_id)
        options = {**task.options, "task_id": task.task_id}
        observation, info = ask(env, f"reset() to task {task.task_id}", lambda: _parts(env.reset(seed=0, options=options), 2))
        instruction = info.get("instruction", "")
        if not isinstance(instruction, str):
            raise ConfigError(f"data.init_args.env: {data.env_id}: info['instruction'] is a {type(instruction).__name__}, not a str.")
        print(visible(f"weights: none, {policy} plays; skill: none"))
        _print_head(task, instruction)
        turns, reward, finish, failure = 0, 0.0, "", ""
        while not finish:
            action = ask(env, f"the policy {policy}", partial(act, observation), (ConfigError,))
            if action is None:
                finish = "no solution from here"
                break
            seen = observation
            observation, gained, terminated, truncated, info = ask(env, "step()", partial(_step, env, action))
            turns, reward = turns + 1, reward + float(gained)
            _show_turn(turns, Turn(seen, action, float(gained)), film)
            if terminated or truncated:
                failure = f"environment: {info['failed']}" if info.get("failed") else ""
                finish = "failed" if failure else "done" if terminated else "horizon"
        success, completion = (False, 0.0) if failure else ask(env, "step()", partial(_outcome, info))
    reward = 0.0 if failure else reward  # it counts as nothing done, as in training
    _show_last(observation, _ending(finish, success), film)
    _print_end(finish, success, completion, reward, turns, failure)
    film.save()


def actor(env: Any, policy: str) -> Callable[[str], str | None]:
    """What answers an observation; the oracle's answer is None where the environment knows no solution.

    Args:
        env: An environment, unwrapped. It may offer `solution()`, the plan from its current state, and `agents`, a dict from names to
            callables that make an object with `act(observation) -> answer`.
        policy: `oracle`, or a name in `agents`.

    Raises:
        ConfigError: the environment does not offer it.
    """
    agents = dict(getattr(env, "agents", None) or {})
    offered = ", ".join(["model", *(["oracle"] if hasattr(env, "solution") else []), *sorted(agents)])
    if policy == "oracle":
        if not hasattr(env, "solution"):
            raise ConfigError(f"policy is oracle: the environment offers no solution() to replay: choose one of {offered}.")
        return lambda _: _next_of_plan(env)
    if policy not in agents:
        raise ConfigError(f"policy is {policy}: with this environment choose one of {offered}.")
    act: Callable[[str], str] = agents[policy]().act
    return act


def _next_of_plan(env: Any) -> str | None:
    """Asked anew each turn, so that it follows whatever happened."""
    return next(iter(plan_of(env)), None)


def _step(env: Any, action: str) -> tuple[Any, ...]:
    return _parts(env.step(action), 5)


def _outcome(info: Mapping[str, Any]) -> tuple[bool, float]:
    end = answers.end(info)
    return end.success, end.completion


def _parts(answer: Any, n: int) -> tuple[Any, ...]:
    if not isinstance(answer, tuple) or len(answer) != n or not isinstance(answer[0], str) or not isinstance(answer[-1], Mapping):
        raise TypeError(f"a tuple of {n}, of an observation as str to an info as dict, is wanted, not {answer!r:.80}")
    if n == 5:
        float(answer[1])
    return answer


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
    training: list[Task] = data._tasks(data.train_split, "train_split")
    for task in training:
        if task.task_id == task_id:
            return task
    splits = f"{data.panel_split} ({panel[0].task_id}, ...) nor of {data.train_split} ({training[0].task_id}, ...)"
    raise ConfigError(f"task is {task_id}: no task of the split {splits}.")


def skill_text(trainer: Any, data: Any, task: Any) -> tuple[str, str]:
    """Where the task's skill is from, the run's bank or the environment's own solution, and its text."""
    callback = data.bank
    if callback is None:
        raise ConfigError("callbacks: a skill needs the SkillBankCallback, which holds its template.")
    path = Path(trainer.default_root_dir) / BANK_FILE
    if path.is_file():
        with SkillBank(path, read_only=True) as bank:
            own = callback.context if isinstance(callback.context, BankContext) else BankContext()
            if (found := own(bank, task.task_id, [task.task_id], 0, 0)) is not None:
                return f"{found.skill_id} of {path}", str(found.render(callback.template))
    with closing(make_env(data.env_id, data.env_kwargs)) as env:
        if not hasattr(env.unwrapped, "solution"):
            raise ConfigError(f"the bank has no skill of {task.task_id}, and the environment offers no solution() to make one from.")
        played = demonstrate(env, task, 0.0, random.Random(0))
    rules = callback.summariser if isinstance(callback.summariser, RulesSummariser) else RulesSummariser()  # others ask a model
    skill = rules.summarise_one(played.turns, played.success, float(played.success))
    why = f"{path} has none of {task.task_id}" if path.is_file() else f"there is no {path}"
    return f"made from the environment's own solution ({why})", str(skill.render(callback.template))


def _print_head(task: Task, instruction: str) -> None:
    print(f"task {one_line(str(task.task_id))} {one_line(str(task.difficulty))}")
    if instruction:
        print(visible(instruction))


def _show_turn(number: int, turn: Turn, film: Film) -> None:
    print(visible(f"--- turn {number}\n{turn.observation}\n> {turn.action}"), flush=True)  # no escape sequence reaches the terminal
    film.add(turn.observation, f"turn {number}: {turn.action}")


def _ending(finish: str, success: bool) -> str:
    return "solved" if success else f"not solved: {finish}"


def _show_last(observation: str | None, caption: str, film: Film) -> None:
    """The answer to the last action."""
    if observation is not None:
        print(visible(f"--- at the end\n{observation}"))
        film.add(observation, caption)


def _print_end(finish: str, success: bool, completion: float, reward: float, turns: int, failure: str) -> None:
    reason = f" ({visible(' '.join(failure.split()))})" if failure else ""
    print(f"--- {finish}{reason}: success {success}, completion {completion:.2f}, reward {reward:.2f}, {count(turns, 'turn')}")
