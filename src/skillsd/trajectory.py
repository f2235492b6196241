"""The words of the house as data: Task, Turn, Trajectory, TrajectoryGroup. Immutable; neither torch nor lightning.

Tokens are the record. A trajectory is `prompt_ids` (what the student saw first) followed by `token_ids` (everything after:
sampled action tokens and the environment's tokens, in order). `action_mask` says which of `token_ids` were sampled; it is
made when sampling and used everywhere a loss, an entropy or a count is taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from zlib import crc32

_CRC = ',"crc32":"'

FinishReason = Literal["done", "length", "horizon", "failed"]
_REASONS = get_args(FinishReason)
FAILURES = ("raised", "hung", "observation", "reward", "model", "environment")
"""Why episodes fail: a call of the environment raised, or did not come back; what it said is no text that tokens can hold, or has too many
characters; a reward or completion is no finite number, or a success no bool; the model's log-probs are none; or the environment itself says
so."""


@dataclass(frozen=True)
class Task:
    """One task that an environment can be reset to.

    Args:
        task_id: Name, unique within a run.
        split: The split it belongs to, e.g. `train`.
        difficulty: Free text, e.g. a band of optimal lengths.
        options: Further keys that are handed to `env.reset(options=...)` beside `task_id` (a JSONL task may carry its own board).
        scenario: Tasks of one name count together in the panel's scenario figure; "" stands alone.
    """

    task_id: str
    split: str = ""
    difficulty: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    scenario: str = ""


@dataclass(frozen=True)
class Turn:
    """One exchange: what the environment said, what the policy answered, and the reward of that step.

    `valid` is whether the environment could read the answer, None where it does not say (info["valid"]).
    """

    observation: str
    action: str
    reward: float
    valid: bool | None = None


@dataclass(frozen=True)
class Trajectory:
    """One finished episode, enough to re-score any of it.

    An episode that could not be carried on (`failed`) has reward 0, completion 0 and no success, whatever was reached before. It is in no
    statistic of training: its group's mean and standard deviation are those of the others, its own advantage is 0, and none of its tokens
    is in a loss or in N. A group with fewer than two others has advantage 0 throughout. A panel counts it as not solved.

    Args:
        iteration: Optimizer step at which it was sampled (0-based).
        task_id: Its task.
        member: Index within its group, 0..G-1.
        seed: The run seed.
        instruction: The task's instruction (system text), possibly empty.
        prompt_ids: Token ids of the first prompt, as whoever acted saw it: plain, unless `data.actor` gave it a skill.
        token_ids: Token ids after the prompt: actions and environment text, append-only.
        action_mask: For each of `token_ids`, whether the policy sampled it.
        logprobs: For each of `token_ids`, log-prob under the sampling policy at the sampling temperature (nats); 0.0 where not sampled.
        turns: The same episode as text.
        reward: Sum of the rewards; 0 if failed.
        completion: Share of the task that was completed, 0..1.
        success: True if the task was solved.
        finish_reason: `done` (the environment ended it), `horizon` (turn limit), `length` (token limit or end of context)
            or `failed`.
        skill_id: The skill that conditions the teacher's rows of this trajectory; None without one.
        failure: Why it failed: one of FAILURES, a colon and more in one line; "" otherwise.
        final_observation: The observation that no action followed: the environment's answer to the last one. No token of it is in the
            record. None where the call that should have given it failed, and in records of older versions.
    """

    iteration: int
    task_id: str
    member: int
    seed: int
    instruction: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    action_mask: tuple[bool, ...]
    logprobs: tuple[float, ...]
    turns: tuple[Turn, ...]
    reward: float
    completion: float
    success: bool
    finish_reason: FinishReason
    skill_id: int | None = None
    failure: str = ""
    final_observation: str | None = None

    @property
    def failed(self) -> bool:
        """Return whether it is left out of every statistic of training."""
        return self.finish_reason == "failed"

    @property
    def failure_kind(self) -> str:
        """One of FAILURES; "" if it has not failed."""
        kind = self.failure.partition(":")[0]
        return kind if kind in FAILURES else "environment" if self.failed else ""  # of an older record: in the environment's words

    @property
    def n_actions(self) -> int:
        """Number of sampled tokens."""
        return sum(self.action_mask)

    def to_json(self) -> str:
        """One line of `trajectories.jsonl`. It ends with a CRC-32 of what is before it."""
        # Not asdict, which copies every id and log-prob one by one.
        text = json.dumps(vars(self) | {"turns": [vars(t) for t in self.turns]}, separators=(",", ":"))
        return f'{text[:-1]}{_CRC}{crc32(text.encode()):08x}"}}'

    @classmethod
    def from_json(cls, line: str) -> Trajectory:
        """The inverse of `to_json`; takes lines without a CRC-32 as well.

        Raises:
            ValueError: The line is no trajectory, or not what was written.
        """
        check_line(line.encode(errors="replace"))
        text, mark, _ = line.rpartition(_CRC)
        try:
            raw = json.loads(text + "}" if mark else line)
            raw.pop("crc32", None)  # another program has written the line anew, with other spaces
            raw["turns"] = tuple(Turn(**t) for t in raw["turns"])
            for key in ("prompt_ids", "token_ids", "action_mask", "logprobs"):
                raw[key] = tuple(raw[key])
            check_values(raw)
            ids, texts = (*raw["prompt_ids"], *raw["token_ids"]), [text for t in raw["turns"] for text in (t.observation, t.action)]
            if not len(raw["token_ids"]) == len(raw["action_mask"]) == len(raw["logprobs"]):
                raise ValueError("token_ids, action_mask and logprobs are not of one length")
            numbers = (*raw["logprobs"], *(t.reward for t in raw["turns"]))
            if not (all(type(x) is int for x in ids) and all(isinstance(x, int | float) for x in numbers)):
                raise ValueError("a token id, log-prob or reward is no number")
            if not all(isinstance(text, str) for text in (*texts, raw["instruction"], raw.get("final_observation") or "")):
                raise ValueError("an observation or action is no text")
            return cls(**raw)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise ValueError(f"the line is no trajectory ({e})") from e


_MAX_WHOLE, _MAX_REAL = 2**53, 3.4028235e38  # what a float64 counts, what a float32 holds
_MAX_NAME = 10_000  # characters


def check_values(raw: Mapping[str, Any]) -> None:
    """Raises ValueError for a value of FIELDS that no run writes: of another type, not finite, or too large to compute with or to show."""

    def whole(x: Any) -> bool:
        return type(x) is int and abs(x) < _MAX_WHOLE

    def real(x: Any) -> bool:
        return type(x) in (int, float) and abs(x) <= _MAX_REAL  # nan is not, either

    checks: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("iteration", "member"), lambda x: whole(x) and x >= 0), "seed": whole, "skill_id": lambda x: x is None or whole(x),
        **dict.fromkeys(("reward", "completion"), real), "success": lambda x: type(x) is bool,
        "finish_reason": lambda x: isinstance(x, str) and x in _REASONS,
        **dict.fromkeys(("task_id", "failure"), lambda x: isinstance(x, str) and len(x) <= _MAX_NAME),
    }  # fmt: skip
    for name, fits in checks.items():
        if name in raw and not fits(raw[name]):  # a missing one is missed elsewhere
            raise ValueError(f"{name} is {str(raw[name])[:80]!a}")


def check_line(line: bytes) -> None:
    """Raises ValueError for a line of `trajectories.jsonl` that is not what was written, by its CRC-32; without one it is taken."""
    at = line.rfind(_CRC.encode())
    if at >= 0 and line[at + len(_CRC) :].rstrip(b"\n") != b'%08x"}' % crc32(b"}", crc32(memoryview(line)[:at])):
        raise ValueError("the line is not what was written: its checksum does not match")


FIELDS = ("iteration", "task_id", "member", "seed", "reward", "completion", "success", "finish_reason", "skill_id", "failure")
COUNTS = ("n_turns", "prompt_tokens", "tokens", "action_tokens")
# As `to_json` writes them: the fields in the order of the class, without spaces. In a text their quotes would stand behind a backslash.
_LISTS = (b',"prompt_ids":[', b'],"token_ids":[', b'],"action_mask":[', b'],"logprobs":[', b'],"turns":[')
_AFTER = b'],"reward":'
_TURN = b'{"observation":'


def outline(line: bytes) -> tuple[Any, ...]:
    """The values of FIELDS and COUNTS in a line of `trajectories.jsonl`, without reading its tokens and texts.

    Raises:
        ValueError: The line is no trajectory, or not what was written.
    """
    check_line(line)
    at, after = [line.find(name) for name in _LISTS], line.rfind(_AFTER)
    ours = line.rfind(_CRC.encode()) > after >= at[-1] and -1 not in at and at == sorted(at)
    if not ours:  # another program has written it, or the checksum's own name is damaged: then it is a field that no trajectory has
        t = Trajectory.from_json(line.decode(errors="replace"))
        return (*(getattr(t, name) for name in FIELDS), len(t.turns), len(t.prompt_ids), len(t.token_ids), t.n_actions)
    try:
        known = json.loads(line[: at[0]] + b"}") | json.loads(b"{" + line[after + 2 :])
        check_values(known)
        start = [i + len(name) for i, name in zip(at, _LISTS, strict=True)]
        prompt, tokens = (line.count(b",", start[k], at[k + 1]) + (start[k] < at[k + 1]) for k in (0, 1))
        turns, sampled = line.count(_TURN, start[4] - 1, after), line.count(b"true", start[2], at[3])
        return (*(known[name] for name in FIELDS), turns, prompt, tokens, sampled)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"the line is no trajectory ({e})") from e


@dataclass(frozen=True)
class TrajectoryGroup:
    """One task's G trajectories, and what student and teacher see when their tokens are scored.

    Args:
        task: The task.
        trajectories: G of them, by member.
        student_prompts: By member, token ids of the prompt under which the student is trained: the plain one, unless it acted with a skill.
        teacher_prompts: By member, those of the teacher's prompt x (+) S(x); equal to the student's where it has no context.
        skill_id: The bank's id of S(x); None without one.
        temperature: Sampling temperature; log-probs are recomputed at the same one.
        sampled_by_teacher: The teacher sampled the tokens, under its own prompts (Eq. 13): the recorded log-probs are its own.
        rollout_s: Seconds in which its rank played its share of the iteration; NaN where they were not measured.
    """

    task: Task
    trajectories: tuple[Trajectory, ...]
    student_prompts: tuple[tuple[int, ...], ...]
    teacher_prompts: tuple[tuple[int, ...], ...]
    skill_id: int | None = None
    temperature: float = 1.0
    sampled_by_teacher: bool = False
    rollout_s: float = field(default=math.nan, compare=False)

    @property
    def counted(self) -> tuple[Trajectory, ...]:
        """Those that have not failed."""
        return tuple(t for t in self.trajectories if not t.failed)

    def has_teacher_context(self, member: int) -> bool:
        """Return whether the member's teacher sees something that its student does not."""
        return self.teacher_prompts[member] != self.student_prompts[member]
