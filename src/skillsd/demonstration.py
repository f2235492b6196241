"""Episodes without a model: a scripted agent's, and the environment's own solution as a demonstration."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from skillsd.environment import TextEnv, TimeStep
from skillsd.timeouts import Failure
from skillsd.trajectory import Task, Trajectory, Turn


def play(
    env: TextEnv,
    task: Task,
    act: Callable[[str], str | None],
    watch: Callable[[TimeStep, Sequence[Turn]], object] = lambda now, turns: None,
) -> Trajectory:
    """Play one episode.

    Args:
        env: The environment.
        task: The task to play.
        act: The action for an observation; None ends the episode, whose finish_reason is then `length`.
        watch: Called after `reset` and after each turn, with what the environment answered and the turns up to here.

    Returns:
        The episode as text, without tokens. One that the environment itself calls failed has reward 0, as in training.

    Raises:
        ConfigError: Another call of the environment fails.
    """
    now = env.reset(task)
    instruction, turns, reward, failure = now.instruction, list[Turn](), 0.0, ""
    final: str | None = now.observation
    watch(now, turns)
    while now.finish is None and (action := act(now.observation)) is not None:
        seen = now.observation
        try:
            now = env.step(action)
            final = now.observation
        except Failure as e:
            if e.kind != "environment":
                raise
            now, final, failure = TimeStep("", finish="failed"), None, e.text()
        turns.append(Turn(seen, action, now.reward, now.valid))
        reward += now.reward
        watch(now, turns)
    return Trajectory(
        iteration=0, task_id=task.task_id, member=0, seed=0, instruction=instruction, prompt_ids=(), token_ids=(), action_mask=(),
        logprobs=(), turns=tuple(turns), reward=0.0 if failure else reward, completion=now.completion, success=now.success,
        finish_reason=now.finish or "length", failure=failure, final_observation=final,
    )  # fmt: skip


def demonstrate(env: TextEnv, task: Task, noise: float = 0.0, rng: random.Random | None = None) -> tuple[Trajectory, list[str]]:
    """Play the environment's own solution, with noise.

    Args:
        env: An environment that offers `solution()` and, where there is noise, `actions` (such as skillsd/Sokoban-v0).
        task: The task to play.
        noise: Chance of a random action at each turn, 0 to 1.
        rng: Source of the noise.

    Returns:
        The episode, and for each of its turns the action that the solution would have played. The rewards of shaping do not count:
        reward and completion are 1 for a success, 0 otherwise.

    Raises:
        ConfigError: A call of the environment fails.
    """
    labels: list[str] = []

    def act(observation: str) -> str | None:
        if not (plan := env.solution()):
            return None
        labels.append(plan[0])
        if rng is None or rng.random() >= noise:
            return plan[0]
        return env.call("actions", lambda: str(env.unwrapped.actions[int(rng.random() * len(env.unwrapped.actions))]))

    played = play(env, task, act)
    return replace(played, reward=float(played.success), completion=float(played.success)), labels
