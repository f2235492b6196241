"""Every overlay of conf/method through the ordinary command: five iterations of the shipped agent, against recorded numbers.

An epoch has three iterations, so no task has a skill in iterations 0 to 2 and all have one in 3 and 4. Everything runs on one thread. After
a change that is meant to change numbers:

    python tests/e2e/test_methods.py --record

which rewrites methods.json beside this file and prints what moved. Another processor's rounding stays far inside the tolerance unless it
makes one sampled token differ; the message then says so.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import yaml
from tests.e2e.commands import boards, metrics, trajectories
from tests.tolerance import ROUNDING

from skillsd import cli
from skillsd.policy import Policy, TokenSequence
from skillsd.skills import SkillBank
from skillsd.trajectory import Trajectory

ROOT = Path(__file__).parents[2]
METHODS = ROOT / "conf" / "method"
RECORD = Path(__file__).with_name("methods.json")
NAMES = """skillsd grpo opd skill_grpo frozen_teacher ema_teacher off_policy_frozen off_policy_dynamic sdar opid rlsd sdpg_gate hindsight
sibling topk_jsd ucob_pairs shuffled_skill no_skill trace_gate
ground_truth no_skill_trace_gate shuffled_trace_gate""".split()
NUMBERS = ("loss/total", "loss/policy", "loss/distillation", "grad_norm/total", "grad_norm/policy", "grad_norm/distillation")
RELATIVE, ABSOLUTE = 1e-3, {"loss/distillation": 1e-7, "grad_norm/distillation": 1e-7}
"""Tolerances; of the other numbers 3e-6, since theirs come from sums of large terms that cancel."""
FIRST = 3
"""The first iteration with skills."""
TINY: dict[str, Any] = {
    "trainer": {
        "max_epochs": 2, "max_steps": 5, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    },
    "panel": {"enabled": False},
    "adapter": {"enabled": False},
    "model": {
        "policy": {"lora": {"init": None}}, "grad_norm_every": 1,
        "optimizer": {"lr": 5e-4, "warmup_steps": 0, "schedule": "constant"},
    },
    "data": {
        "env_kwargs": boards(12, 2, lengths=(2, 5), boxes=3), "batch_tasks": 4, "group_size": 4,
    },
}  # fmt: skip
slow = pytest.mark.slow

Prompts = set[tuple[int, ...]]


@dataclass
class Run:
    """What a run left.

    Args:
        rows: metrics.csv.
        played: By iteration its trajectories.
        scored: By iteration the prompts under which the student (with gradient) and the teacher were scored.
        lenders: Skill id -> the task it was made of.
    """

    rows: list[dict[str, str]]
    played: list[list[Trajectory]]
    scored: list[dict[str, Prompts]]
    lenders: dict[int, str] = field(default_factory=dict)

    def numbers(self, *names: str) -> list[list[float]]:
        """By iteration; nan where nothing was measured."""
        return [[float(r[k] or "nan") for k in names or NUMBERS] for r in self.rows]

    def column(self, name: str) -> list[float]:
        return [x for (x,) in self.numbers(name)]

    def tokens(self) -> list[int]:
        """A checksum of what was sampled, by iteration."""
        return [crc32(repr([(t.task_id, t.member, t.token_ids) for t in played]).encode()) for played in self.played]


def fit(method: str, folder: Path) -> Run:
    """The command, in this process and on one thread."""
    tiny, threads, scored = folder / "tiny.yaml", torch.get_num_threads(), []
    tiny.write_text(yaml.safe_dump(TINY))
    score, step = Policy.score, Policy.student_changed

    def spy(self: Policy, adapter: str, sequences: list[TokenSequence], temperature: float = 1.0) -> Any:
        if adapter == "teacher" or torch.is_grad_enabled():
            scored[-1].setdefault(adapter, set()).update(tuple(s.prompt_ids) for s in sequences)
        return score(self, adapter, sequences, temperature)

    def stepped(self: Policy) -> None:
        scored.append({})
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "score", spy)
        patch.setattr(Policy, "student_changed", stepped)
        scored.append({})
        torch.set_num_threads(1)
        try:
            configs = (ROOT / "conf" / "sokoban.yaml", tiny, METHODS / f"{method}.yaml")
            flags = [x for c in configs for x in ("-c", str(c))]
            assert cli.main(["fit", *flags, f"--trainer.default_root_dir={folder / 'run'}"]) == 0
        finally:
            torch.set_num_threads(threads)
    rows = metrics(folder / "run")
    played: list[list[Trajectory]] = [[] for _ in rows]
    for t in trajectories(folder / "run"):
        played[t.iteration].append(t)
    used = {t.skill_id for p in played for t in p} - {None}
    with SkillBank(folder / "run" / "bank.sqlite", read_only=True) as bank:
        lenders = {i: bank.get(i).task_id for i in used if i is not None}
    return Run(rows, played, scored[: len(rows)], lenders)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Run]]:
    """Method -> its run, made when first asked for."""
    yield cache(lambda method: fit(method, tmp_path_factory.mktemp(method)))


@pytest.fixture(scope="module")
def plain(run: Callable[[str], Run]) -> dict[str, tuple[int, ...]]:
    """Task -> the prompt without a skill."""
    return {t.task_id: t.prompt_ids for played in run("grpo").played[:FIRST] for t in played}


# -- the files --------------------------------------------------------------------------------------------------------------


def test_every_method_has_a_record():
    assert sorted(p.name for p in METHODS.iterdir()) == sorted(f"{n}.yaml" for n in NAMES)
    assert sorted(json.loads(RECORD.read_text())) == sorted(NAMES)


@pytest.mark.parametrize("method", NAMES)
def test_an_overlay_is_short_and_says_what_it_is(method):
    lines = (METHODS / f"{method}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines[0]) > 30
    assert 5 <= len(lines) <= 9 and max(map(len, lines)) <= 140
    assert set(yaml.safe_load("\n".join(lines))) == {"method"}


# -- the numbers ------------------------------------------------------------------------------------------------------------


def as_record(r: Run) -> dict[str, list[Any]]:
    """Seven digits; null where nothing was measured."""
    columns = {k: [None if math.isnan(x) else float(f"{x:.7g}") for x in r.column(k)] for k in NUMBERS}
    return columns | {"tokens": r.tokens()}


def differences(got: dict[str, list[Any]], want: dict[str, list[Any]]) -> list[str]:
    """One line for each number that moved."""
    out = []
    for k in NUMBERS:
        for i, (a, b) in enumerate(zip(got[k], want[k], strict=True)):
            near = a == b if a is None or b is None else abs(a - b) <= ABSOLUTE.get(k, 3e-6) + RELATIVE * abs(b)
            out += [] if near else [f"iteration {i}: {k} is {a}, recorded is {b}"]
    moved = [i for i, (a, b) in enumerate(zip(got["tokens"], want["tokens"], strict=True)) if a != b]
    return out + ([f"iteration {moved[0]} is the first whose sampled tokens differ"] if out and moved else [])


@slow
@pytest.mark.parametrize("method", NAMES)
def test_recorded_numbers(run, method):
    got = as_record(run(method))
    assert [len(x) for x in got.values()] == [5] * len(got)
    moved = differences(got, json.loads(RECORD.read_text())[method])
    assert not moved, "\n".join(moved)


def test_a_moved_number_is_noticed():
    """The tolerance is one: half a thousandth passes, a hundredth does not."""
    want = json.loads(RECORD.read_text())["ucob_pairs"]
    assert differences(want, want) == []
    for k in NUMBERS:
        near, far = ({**want, k: [*want[k][:3], factor * want[k][3], want[k][4]], "tokens": [0] * 5} for factor in (1.0005, 1.01))
        assert differences(near, want) == []
        first, second = differences(far, want)
        assert first.startswith(f"iteration 3: {k} is ") and second.startswith("iteration 0 is the first")
    assert len(differences(want | {"loss/policy": [None] * 5}, want)) == 5


# -- what holds between them ------------------------------------------------------------------------------------------------

FROM_THE_BANK = ("skillsd", "sdar", "shuffled_skill", "skill_grpo", "ucob_pairs")
LAGGING = ("frozen_teacher", "ema_teacher", "rlsd", "topk_jsd", "off_policy_frozen", "trace_gate")
AFTERWARDS = ("hindsight", "opid", "sibling", "ground_truth")
ACTING = ("off_policy_frozen", "off_policy_dynamic", "skill_grpo", "ucob_pairs")
COMMON = ("loss/total", "loss/policy", "loss/distillation", "grad_norm/total", "reward/mean", "policy/entropy", "policy/logp_drift")


@slow
def test_the_runs_are_worth_comparing(run):
    """Some groups agree and some do not, tasks are solved and not, and the student learns."""
    r = run("grpo")
    assert [x["iteration"] for x in r.rows] == list("01234") and [len(p) for p in r.played] == [16] * 5
    assert 0 < sum(r.column("reward/success")) < 5 and 0 < sum(r.column("reward/zero_variance")) < 5
    assert all(x > 0.1 for x in r.column("grad_norm/total")) and [x["teacher/skill_share"] for x in r.rows[:3]] == ["0.0"] * 3
    kept = json.loads(RECORD.read_text())
    assert len({tuple(map(str, (m["loss/total"], m["grad_norm/total"]))) for m in kept.values()}) == len(NAMES) - 1  # no_skill is grpo


@slow
def test_no_skill_is_grpo(run):
    """To the last bit, in all five iterations."""
    a, b = run("no_skill"), run("grpo")
    assert a.numbers(*COMMON) == b.numbers(*COMMON)
    assert [[(t.prompt_ids, t.token_ids, t.logprobs) for t in p] for p in a.played] == [
        [(t.prompt_ids, t.token_ids, t.logprobs) for t in p] for p in b.played
    ]
    assert a.column("grad_norm/distillation") == [0.0] * 5 and a.column("grad_norm/policy") == pytest.approx(b.column("grad_norm/total"))
    assert a.column("skills/bank") == [0.0] * 5 and all(not s.get("teacher") for s in a.scored + b.scored)


@slow
@pytest.mark.parametrize("method", FROM_THE_BANK)
def test_before_there_is_a_skill_all_is_grpo(run, method):
    """With a teacher that is synced, to the last bit; then no longer."""
    a, b = run(method), run("grpo")
    assert a.numbers(*COMMON)[:FIRST] == b.numbers(*COMMON)[:FIRST] and a.tokens()[:FIRST] == b.tokens()[:FIRST]
    assert all(a.numbers(*COMMON)[i] != b.numbers(*COMMON)[i] for i in range(FIRST, 5))


@slow
def test_off_policy_before_there_is_a_skill(run):
    """The teacher is the student; GRPO's ratio is centred on today's scoring instead of the recorded one, which is the same to rounding."""
    a, b = run("off_policy_dynamic"), run("grpo")
    for x, y in zip(a.numbers(*COMMON)[:FIRST], b.numbers(*COMMON)[:FIRST], strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=ROUNDING)
    assert a.column("policy/logp_drift") == [0.0] * 5
    assert a.tokens()[:FIRST] == b.tokens()[:FIRST]


@slow
@pytest.mark.parametrize("method", LAGGING)
def test_a_teacher_that_lags_differs_from_the_second_iteration(run, method):
    """The first is GRPO's; then other weights alone make a gap."""
    a, b = run(method), run("grpo")
    assert a.numbers(*COMMON)[0] == pytest.approx(b.numbers(*COMMON)[0], rel=1e-4, abs=ROUNDING)
    assert a.column("loss/distillation")[0] == a.column("teacher/k3")[0] == 0
    assert all(x > 0 for x in a.column("teacher/k3")[1:]) and all(x != 0 for x in a.column("loss/distillation")[1:])


@slow
@pytest.mark.parametrize("method", AFTERWARDS)
def test_what_is_known_afterwards_differs_from_the_first_iteration(run, method):
    """The context is made of the iteration's own trajectories. The policy's term is GRPO's, to the last bit."""
    a, b = run(method), run("grpo")
    assert a.column("loss/policy")[0] == b.column("loss/policy")[0] and a.tokens()[0] == b.tokens()[0]
    assert a.column("teacher/skill_share")[0] > 0 and abs(a.column("loss/distillation")[0]) > 1e-6
    assert a.column("grad_norm/total")[0] != b.column("grad_norm/total")[0]


@slow
def test_hindsight_and_opid_say_the_same_at_the_first_iteration(run):
    """With one update a batch Skill-SD is an additive token advantage: equal gradients where their contexts are equal."""
    a, b = run("hindsight"), run("opid")
    assert a.numbers("grad_norm/total", "grad_norm/distillation")[0] == pytest.approx(
        b.numbers("grad_norm/total", "grad_norm/distillation")[0], rel=1e-4
    )
    assert a.column("loss/distillation")[0] > 0 and b.column("teacher/shift")[0] > 0 == a.column("teacher/shift")[0]


@slow
def test_opd_waits_for_a_skill(run):
    """Its teacher is the start model, so without skill and reward there is nothing to learn and nothing moves."""
    r = run("opd")
    assert r.numbers("loss/total", "grad_norm/total", "teacher/k3")[:FIRST] == [[0.0] * 3] * FIRST
    assert r.tokens()[0] == run("grpo").tokens()[0] and r.column("loss/policy") == [0.0] * 5
    assert all(x > 0.1 for x in r.column("grad_norm/total")[FIRST:])
    assert r.column("grad_norm/total") == pytest.approx(r.column("grad_norm/distillation"), rel=1e-5)


@slow
def test_sdpg_leaves_out_groups_without_a_winner(run):
    """Groups of one reward carry no policy gradient, so without them the first is GRPO's over a smaller N."""
    a, b = run("sdpg_gate"), run("grpo")
    by_task: dict[str, list[Trajectory]] = {}
    for t in a.played[0]:
        by_task.setdefault(t.task_id, []).append(t)
    kept = [t for g in by_task.values() if len({t.reward for t in g}) > 1 for t in g]
    share = sum(t.n_actions for t in kept) / sum(t.n_actions for t in a.played[0])
    assert a.column("grad_norm/total")[0] == pytest.approx(b.column("grad_norm/total")[0] / share, rel=1e-4)
    assert all(x == 0 for x in a.column("loss/distillation")[:FIRST]) and all(x > 0 for x in a.column("loss/distillation")[FIRST:])


@slow
def test_the_weight_of_rlsd_falls(run):
    assert run("rlsd").column("teacher/weight") == pytest.approx([0.5 * (1 - i / 50) for i in range(5)])
    assert all(run(m).column("teacher/weight") == [w] * 5 for m, w in (("skillsd", 0.001), ("sdar", 0.01), ("grpo", 0.0)))


# -- who sees a skill ---------------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("method", NAMES)
def test_only_four_methods_act_with_a_skill(run, plain, method):
    """What stands in trajectories.jsonl as the actor's prompt: the plain one, but for four methods once there are skills."""
    for i, played in enumerate(run(method).played):
        for t in played:
            sees_skill = i >= FIRST and (method in ACTING[:3] or (method == "ucob_pairs" and t.member >= 2))
            assert len(t.prompt_ids) > len(plain[t.task_id]) if sees_skill else t.prompt_ids == plain[t.task_id]
            if sees_skill:
                assert t.prompt_ids[-len(plain[t.task_id]) :] == plain[t.task_id]


@slow
@pytest.mark.parametrize("method", NAMES)
def test_the_loss_scores_under_the_prompt_of_evaluation(run, plain, method):
    """The student is scored, with gradient, under the prompt it acts under at evaluation: also where the teacher rolled out."""
    r = run(method)
    for i, (played, scored) in enumerate(zip(r.played, r.scored, strict=True)):
        bare = {plain[t.task_id] for t in played}
        acted = {t.prompt_ids for t in played}
        if method in ("skill_grpo", "ucob_pairs"):
            assert scored["student"] == acted
        else:
            assert scored["student"] <= bare and (method == "sdpg_gate" or scored["student"] == bare)
        teacher = scored.get("teacher", set())
        if i >= FIRST and method not in ("grpo", "no_skill", "skill_grpo", "ucob_pairs", "sibling") and not method.endswith("trace_gate"):
            assert teacher and not teacher & bare  # the teacher has a context in every row
        if method == "no_skill_trace_gate":
            assert teacher <= bare
        if method in ("off_policy_frozen", "off_policy_dynamic") and i >= FIRST:
            assert teacher == acted
        if method == "ucob_pairs" and i >= FIRST:
            assert teacher == acted  # each half's teacher is the other half's view
        if method in ("grpo", "no_skill", "skill_grpo"):
            assert not teacher
        if method == "hindsight":
            assert len(teacher) > len(bare)  # not one for all members


@slow
@pytest.mark.parametrize("method", [m for m in NAMES if m not in ("no_skill", "no_skill_trace_gate", *AFTERWARDS)])
def test_a_skill_is_the_task_s_own_but_in_the_control(run, method):
    """The task's own; another's in the control."""
    r = run(method)
    pairs = [(t.task_id, r.lenders[t.skill_id]) for p in r.played for t in p if t.skill_id is not None]
    assert {t.iteration for p in r.played for t in p if t.skill_id is not None} == {3, 4}
    unsolved = {t.task_id for p in r.played[:FIRST] for t in p} - {t.task_id for p in r.played[:FIRST] for t in p if t.success}
    without = [
        t for p in r.played[FIRST:] for t in p if method.endswith("trace_gate") and t.task_id in unsolved
    ]  # its bank holds successes alone
    assert len(pairs) == 32 - len(without)
    assert all((a == b) == (not method.startswith("shuffled")) for a, b in pairs)


def record() -> None:
    """Run all methods and write their numbers."""
    old = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    new = {}
    for method in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            new[method] = as_record(fit(method, Path(folder)))
        for line in differences(new[method], old[method]) if method in old else ["new"]:
            print(f"{method}: {line}")
    methods = (f' "{m}": {{\n' + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in x.items()) + "\n }" for m, x in new.items())
    RECORD.write_text("{\n" + ",\n".join(methods) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit("usage: python tests/e2e/test_methods.py --record")
    record()
