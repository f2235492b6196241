"""Recorded trajectories are scored again: by what recorded them, by what came of it, and with a skill in front."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.test_cli import Run as Fit
from tests.tolerance import ROUNDING

from skillsd.analysis import Run, Scorer
from skillsd.errors import ConfigError
from skillsd.files.durable import DamagedError
from skillsd.files.run_folder import write_record
from skillsd.skills import Skill

SKILL = Skill("it worked", "mind the wall", "go left")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], str]) -> Run:
    """Three iterations; the student is the base in the first one, and moves far."""
    fit = Fit(tmp_path_factory.mktemp("fit"), tiny_model("qwen3"), None)
    assert fit("--model.optimizer.lr=0.05", "--data.rollout.temperature=0.7", "--trainer.max_epochs=3") == 0
    return Run(fit.folder)


@pytest.fixture(scope="module")
def scorer(run: Run) -> Scorer:
    return Scorer(run)


def test_who_sampled_the_tokens_gives_them_the_recorded_log_probs(run, scorer):
    for number in run.trajectories.query("iteration == 0").index:
        tokens = run.tokens(number)
        recorded, base = tokens["logprob"].to_numpy(), scorer.logprobs(number, None)
        np.testing.assert_allclose(base, recorded, atol=2e-4)  # nan where nothing was sampled
        student = scorer.logprobs(number)
        assert (np.isnan(student) == ~tokens["sampled"].to_numpy()).all()
        assert np.nanmax(abs(student - base)) > 0.01
        assert "".join(scorer.texts(number)) == scorer.policy.tokenizer.decode(run.trajectory(number).token_ids)


def test_a_character_of_several_tokens_is_shown_at_the_last():
    """Bytes as tokens."""

    def decode(ids):
        return bytes(ids).decode(errors="replace")

    said = "é ☃ x"
    run: Any = SimpleNamespace(trajectory=lambda number: SimpleNamespace(token_ids=tuple(said.encode())))
    scorer: Any = SimpleNamespace(run=run, policy=SimpleNamespace(tokenizer=SimpleNamespace(decode=decode)))
    assert Scorer.texts(scorer, 0) == ["", "é", " ", "", "", "☃", " ", "x"]


def test_a_skill_stands_in_front_of_the_prompt(run, scorer):
    """Against the model's own logits."""
    t, policy = run.trajectory(1), scorer.policy
    text = SKILL.render(scorer.template)
    prompt = scorer.chat.prompt_ids(t.instruction, t.turns[0].observation, text)
    with policy.acting(None):
        logits = policy.base(torch.tensor([[*prompt, *t.token_ids]])).logits[0, len(prompt) - 1 : -1].float()
    expected = (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(t.token_ids)[:, None])[:, 0].numpy()
    found = scorer.logprobs(1, None, SKILL)
    np.testing.assert_allclose(found[list(t.action_mask)], expected[list(t.action_mask)], atol=2e-4)
    assert scorer.prompt(1, SKILL) == policy.tokenizer.decode(prompt) != scorer.prompt(1) == policy.tokenizer.decode(t.prompt_ids)
    assert np.nanmax(abs(found - scorer.logprobs(1, None))) > 1e-3


def test_a_bank_s_skill_scores_as_its_text(run, scorer):
    known = run.skills.index[0]
    row = run.skills.loc[known]
    same = Skill(row["success_analysis"], row["mistake_analysis"], row["golden_workflow"])
    np.testing.assert_array_equal(scorer.logprobs(0, "teacher", known), scorer.logprobs(0, "teacher", same))
    np.testing.assert_array_equal(scorer.logprobs(0, "teacher", same.render(scorer.template)), scorer.logprobs(0, "teacher", same))
    np.testing.assert_array_equal(scorer.logprobs(0, "teacher", pd.NA), scorer.logprobs(0, "teacher"))
    with pytest.raises(KeyError):
        scorer.logprobs(0, "teacher", 999)


def test_without_a_skill_it_is_the_prompt_on_record(run, scorer):
    """A trajectory may have been sampled with a skill in front of it; "" is the plain one."""
    lines = (run.folder / "trajectories.jsonl").read_text().splitlines()
    t = run.trajectory(0)
    other = replace(t, prompt_ids=tuple(scorer.chat.prompt_ids(t.instruction, t.turns[0].observation, "left")))
    empty = replace(t, turns=(), token_ids=(), action_mask=(), logprobs=(), finish_reason="failed", failure="raised: x")
    copy = run.folder.with_name("copy")
    shutil.copytree(run.folder, copy)
    (copy / "trajectories.jsonl").write_text("\n".join([other.to_json(), *lines[1:], empty.to_json()]) + "\n")
    again = Scorer(Run(copy))
    np.testing.assert_array_equal(again.logprobs(0), scorer.logprobs(0, skill="left"))
    np.testing.assert_array_equal(again.logprobs(0, skill=""), scorer.logprobs(0))
    assert again.logprobs(len(lines)).shape == (0,) and again.logprobs(len(lines), skill=SKILL).shape == (0,)


def test_exported_adapters_score_as_the_checkpoint_s(run, scorer):
    exported = Scorer(run, run.folder / "adapter" / "student")
    for adapter in ("student", "teacher"):
        np.testing.assert_allclose(exported.logprobs(0, adapter), scorer.logprobs(0), atol=ROUNDING)
    named = Scorer(run, run.folder / "checkpoints" / "last.ckpt")
    np.testing.assert_array_equal(named.logprobs(0), scorer.logprobs(0))


def test_a_run_without_the_right_adapters_is_refused(run, scorer, tmp_path):
    with pytest.raises(ConfigError, match="nosuch: no adapters there: name a checkpoint or a PEFT folder"):
        Scorer(run, tmp_path / "nosuch")
    write_record(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="names no policy"):
        Scorer(Run(tmp_path))
    (tmp_path / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    with pytest.raises(ConfigError, match="checkpoints: no adapters there"):
        Scorer(Run(tmp_path))
    checkpoint = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    made = checkpoint["skillsd"]["base"]
    for name, content, message in (
        ("base", checkpoint | {"skillsd": {"base": made | {"digest": "0"}}}, r"belongs to other weights \(.*, 0\)"),
        ("older", checkpoint | {"skillsd": {"base": "another"}}, "does not say which weights"),
        ("empty", {"a": 1}, "no checkpoint"),
    ):
        torch.save(content, tmp_path / f"{name}.ckpt")
        with pytest.raises((ConfigError, DamagedError), match=message):
            Scorer(run, tmp_path / f"{name}.ckpt")
    call: Any
    for error, call in ((ValueError, lambda: scorer.logprobs(0, "nosuch")), (IndexError, lambda: scorer.logprobs(10**6))):
        with pytest.raises(error):
            call()
    assert scorer.logprobs(0).shape == (len(run.trajectory(0).token_ids),)  # it goes on
