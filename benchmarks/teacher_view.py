"""What the nano agent's teacher knows, context by context: its own success, and how good its moves are where the student goes.

    python -m benchmarks.teacher_view --levels 400

The untrained agent plays each level four times at temperature 1 on boards of conf/sokoban.yaml with another level seed. For each context:
the levels that have it; success of the greedy agent without and with it in front; then, over the states of the plays from which the level
can still be solved, the probability of a move on a shortest solution without and with it, and the mean weight that TraceGate gives, split
by whether the play has followed the context's plan so far. A context made from one of the plays is not shown to that play.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
import yaml
from torch import Tensor

from skillsd.demonstration import demonstrate
from skillsd.engines.in_process import InProcessEngine
from skillsd.environment import make_env
from skillsd.objective import Tokens, TraceGate
from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence
from skillsd.rollout import Chat, Collector, Episode, RolloutSettings
from skillsd.skills import RulesSummariser
from skillsd.trajectory import Task, Trajectory
from skillsd_sokoban.level import Level
from skillsd_sokoban.solve import MOVES, push_move, solver

COLUMNS = "context|levels|success without|with|on plan: states|P(shortest) without|with|TraceGate|off plan: states|without|with|TraceGate"


@cache
def shortest_moves(board: str) -> list[int]:
    """Indices into MOVES of those that lie on a shortest solution; none if the level cannot be solved any more."""
    level = Level.from_text(board)
    room, steps = solver(level), (-level.width, level.width, -1, 1)
    left = room.distance(level.player, level.boxes)
    if not left:
        return []
    return [m for m, step in enumerate(steps) if room.distance(*push_move(level.walls, level.player, level.boxes, step)) == left - 1]


@dataclass(frozen=True)
class TeacherText:
    """A context's text, the moves it stands for, and the play it was made from if it was one of those looked at."""

    text: str
    plan: tuple[str, ...]
    source: Trajectory | None = None


class View:
    """The agent, its levels and its plays."""

    def __init__(self, levels: int, seed: int, teacher: str | None = None, skills: str | None = None) -> None:
        conf = yaml.safe_load((Path(__file__).parents[1] / "conf" / "sokoban.yaml").read_text(encoding="utf-8"))
        env, kwargs = conf["data"]["env"], conf["data"]["env_kwargs"]
        kwargs |= {"splits": {"train": {"short": levels}}, "level_seed": 1}
        self.moves, self.template = RulesSummariser(**conf["skills"]["summariser"]["init_args"]), conf["skills"]["template"]
        self.transcript, self.rules = conf["skills"]["transcript_template"], self.moves
        if skills:
            wanted = yaml.safe_load(Path(skills).read_text(encoding="utf-8"))["skills"]["summariser"]
            module, _, name = wanted["class_path"].rpartition(".")
            self.rules = getattr(import_module(module), name)(**wanted.get("init_args", {}))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = Policy(PolicySettings(lora=LoraSettings(r=16, alpha=32)), device)
        self.teacher = Policy(PolicySettings(lora=LoraSettings(r=16, alpha=32, init=teacher)), device) if teacher else self.policy
        self.chat, settings = Chat(self.policy.tokenizer, ()), RolloutSettings(max_turn_tokens=1, max_trajectory_tokens=1024, max_rows=128)
        self.collector, self.led = (
            Collector(env, kwargs, self.chat, InProcessEngine(p), settings, p.context_length) for p in (self.policy, self.teacher)
        )
        self.env, self.seed = make_env(env, kwargs), seed
        self.tasks = self.env.tasks("train")
        played = self.collector.collect([Episode(t, k) for t in self.tasks for k in range(4)], seed=seed, iteration=0, temperature=1.0)
        self.groups = [played[i : i + 4] for i in range(0, len(played), 4)]
        self.plain = self.greedy(self.collector, [""] * levels)

    def contexts(self) -> dict[str, list[TeacherText | None]]:
        """By name, what a teacher of each level sees; None where the level has no such context."""
        best = [min((t for t in g if t.success), key=lambda t: (len(t.turns), t.member), default=None) for g in self.groups]
        worst = [next((t for t in g if not t.success), None) for g in self.groups]
        truth: list[TeacherText | None] = [self.plan(t) for t in self.tasks]
        return {
            "skill of a success": [None if t is None else self.skill_text(t, t) for t in best],
            "skill of a failure": [None if t is None else self.skill_text(t, t) for t in worst],
            "a success, as played": [None if t is None else self.as_played(t) for t in best],
            "the solver's plan": truth,
            "the solver's plan, levels that no play solved": [x if t is None else None for t, x in zip(best, truth, strict=True)],
            "another level's plan": [*truth[1:], truth[0]],
        }

    def skill_text(self, t: Trajectory, source: Trajectory | None) -> TeacherText | None:
        try:
            text = self.rules.summarise_one(t.turns, t.success, t.completion).render(self.template)
        except ValueError:  # nothing to say
            return None
        return TeacherText(text, self.moves.digest(t.turns).actions, source)

    def as_played(self, t: Trajectory) -> TeacherText:
        actions = tuple(x.action for x in t.turns)
        return TeacherText(self.transcript.format(actions=" ".join(actions)), actions, t)

    def plan(self, task: Task) -> TeacherText | None:
        played, _ = demonstrate(self.env, task)
        return self.skill_text(replace(self.groups[0][0], turns=played.turns, success=played.success, completion=1.0), None)

    def greedy(self, collector: Collector, texts: Sequence[str | None]) -> dict[int, bool]:
        """By level, whether it is solved with the text in front; levels without a text are left out."""
        rows = {i: Episode(self.tasks[i], 0, x) for i, x in enumerate(texts) if x is not None}
        played = collector.collect(list(rows.values()), seed=self.seed, iteration=0, temperature=0.0)
        return {i: t.success for i, t in zip(rows, played, strict=True)}

    @torch.no_grad()
    def score(self, policy: Policy, plays: Sequence[tuple[Trajectory, str]]) -> tuple[Tensor, Tensor]:
        """Probabilities of the four moves at every turn, [N, 4], and log-probs of those made, [N]."""
        ids = [self.chat.encode(m)[0] for m in MOVES]
        probs: list[Tensor] = []
        made: list[Tensor] = []
        for start in range(0, len(plays), 256):
            part = [(t, tuple(self.chat.prompt_ids(t.instruction, t.turns[0].observation, x))) for t, x in plays[start : start + 256]]
            scores = policy.score("student", [TokenSequence(p, t.token_ids, t.action_mask) for t, p in part])
            probs.append(policy.head(scores.hidden).float().softmax(-1)[:, ids].cpu())
            made += [scores.logp[i, torch.tensor(t.action_mask).nonzero()[:, 0]].cpu() for i, (t, _) in enumerate(part)]
        return torch.cat(probs), torch.cat(made)

    def row(self, texts: Sequence[TeacherText | None]) -> list[str]:
        """The columns behind the context's name."""
        plays = [(t, x) for g, x in zip(self.groups, texts, strict=True) if x is not None for t in g if t is not x.source]
        (led, made), (plain, own) = (
            self.score(self.teacher, [(t, x.text) for t, x in plays]),
            self.score(self.policy, [(t, "") for t, _ in plays]),
        )
        rows = torch.tensor([i for i, (t, _) in enumerate(plays) for _ in t.turns])
        zero = torch.zeros_like(own)
        gate = TraceGate()(Tokens(own, own, own, made, zero, zero > 0, zero, rows))
        sums: dict[bool, list[float]] = defaultdict(lambda: [0.0] * 4)
        at = 0
        for t, x in plays:
            on = True
            for i, turn in enumerate(t.turns):
                board = "\n".join(line for line in turn.observation.splitlines() if line and set(line) <= set("#_OXPTS"))
                good = shortest_moves(board)
                if good:
                    for k, value in enumerate((1.0, plain[at, good].sum().item(), led[at, good].sum().item(), gate[at].item())):
                        sums[on][k] += value
                on = on and i < len(x.plan) and turn.action == x.plan[i]
                at += 1
        parts = [[f"{n:,.0f}", *(f"{x / max(1, n):.2f}" for x in rest)] for n, *rest in (sums[True], sums[False])]
        wins = self.greedy(self.led, [None if x is None else x.text for x in texts])
        success = [f"{sum(w[i] for i in wins) / len(wins):.2f}" for w in (self.plain, wins)]
        return [str(len(wins)), *success, *parts[0], *parts[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, default=400)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--teacher", help="a PEFT adapter of the nano agent that reads the context in the agent's place")
    parser.add_argument("--skills", help="an overlay of conf/sokoban.yaml whose summariser writes the skills")
    parser.add_argument("--contexts", nargs="+", help="only these rows of the table")
    a = parser.parse_args()
    view = View(a.levels, a.seed, a.teacher, a.skills)
    names = COLUMNS.split("|")
    print(f"| {' | '.join(names)} |\n| --- |{' ---: |' * (len(names) - 1)}")
    for name, texts in view.contexts().items():
        if a.contexts and name not in a.contexts:
            continue
        print(f"| {name} | {' | '.join(view.row(texts))} |", flush=True)


if __name__ == "__main__":
    main()
