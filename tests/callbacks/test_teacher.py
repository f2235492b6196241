"""The teacher's weights over a schedule, and the exported student."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.tolerance import close
from transformers import AutoModelForCausalLM

from skillsd.callbacks import AdapterExport, TeacherSync, export_adapter
from skillsd.errors import ConfigError


def flat(policy: Any, name: str) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.adapter(name).values()])


def run(policy: Any, callback: TeacherSync, steps: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The student moves by 1 in every weight each step; the pair while it is being trained (before the step)."""
    module, seen = SimpleNamespace(policy=policy), []
    for step in range(steps):
        callback.on_train_batch_start(SimpleNamespace(global_step=step), module, None, step)
        seen.append((flat(policy, "student"), flat(policy, "teacher")))
        with torch.no_grad():
            for p in policy.student_parameters():
                p.add_(1.0)
        policy.student_changed()
        callback.on_train_batch_end(SimpleNamespace(global_step=step + 1), module, None, None, step)
        assert not any(p.requires_grad for p in policy.adapter("teacher").values())
    return seen


@pytest.mark.parametrize("every", [1, 3])
def test_sync_copies_every_k(make_policy, every):
    policy = make_policy()
    policy.sync()  # it starts as the student's copy
    seen = run(policy, TeacherSync(every=every))
    for step, (_, teacher) in enumerate(seen):
        assert torch.equal(teacher, seen[step - step % every][0])


def test_it_is_up_to_date_before_the_next_rollout(make_policy):
    """Synced where an iteration ends: the next batch is rolled out, perhaps by the teacher, before that iteration starts."""
    for callback, same in ((TeacherSync(), True), (TeacherSync(every=2), False), (TeacherSync("ema", rate=0.5), False)):
        policy = make_policy()
        policy.sync()
        start = flat(policy, "student")
        run(policy, callback, steps=1)
        assert torch.equal(flat(policy, "teacher"), flat(policy, "student")) == policy.teacher_is_student == same
        assert torch.equal(flat(policy, "teacher"), start) == (callback.every == 2)


def test_ema_averages_from_the_student(make_policy):
    policy = make_policy()
    policy.sync()
    want = flat(policy, "student")
    for student, teacher in run(policy, TeacherSync("ema", rate=0.25)):
        torch.testing.assert_close(teacher, want)
        want = 0.75 * teacher + 0.25 * (student + 1.0)
    torch.testing.assert_close(flat(policy, "teacher"), want)


def test_frozen_stays(make_policy):
    policy = make_policy()
    start = flat(policy, "teacher")
    assert all(torch.equal(teacher, start) for _, teacher in run(policy, TeacherSync("frozen")))


def test_bad_schedules():
    with pytest.raises(ConfigError, match=r"teacher\.every"):
        TeacherSync(every=0)
    for rate in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"teacher\.rate"):
            TeacherSync("ema", rate=rate)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_the_exported_student_loads(make_policy, tmp_path, architecture):
    policy = make_policy(architecture)
    folder = tmp_path / "adapter" / "student"
    for _ in range(2):  # the second replaces the first
        AdapterExport().on_train_end(SimpleNamespace(default_root_dir=str(tmp_path), global_step=7), SimpleNamespace(policy=policy))
    files = ["README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "base.json"]
    assert sorted(p.name for p in folder.iterdir()) == files
    assert [p.name for p in folder.parent.iterdir()] == ["student"]
    card = (folder / "README.md").read_text()
    assert f"base_model: {policy.settings.model}" in card and policy.digest in card and "7 iterations" in card and "rank 4, alpha 8" in card
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4

    ids = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(policy.settings.model, attn_implementation="eager")
    loaded = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
    with policy.acting("student"):
        student = policy.base(input_ids=ids).logits
    with policy.acting("teacher"):
        teacher = policy.base(input_ids=ids).logits
    close(logits, student)
    assert (logits - teacher).abs().max() > 1e-3


def test_an_export_that_fails_leaves_the_old_one(make_policy, tmp_path, monkeypatch):
    policy, folder = make_policy(), tmp_path / "student"
    export_adapter(policy, folder, 1)
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1  # who may read one of its files may read all
    stood = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(policy, "save_adapter", full)
    with pytest.raises(OSError, match="No space"):
        export_adapter(policy, folder, 2)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == stood
