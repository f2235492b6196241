"""Student and teacher: who has gradients, who equals whom, what is saved."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from skillsd.errors import ConfigError
from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence

ROW = [TokenSequence([5, 6, 7], [8, 9, 10], [True, False, True])]


def check_frozen(policy):
    assert policy.model.active_adapter == "student"
    assert all(p.requires_grad for p in policy.adapter("student").values())
    assert not any(p.requires_grad for p in policy.adapter("teacher").values())
    wanted = {id(p) for p in policy.adapter("student").values()}
    assert {id(p) for p in policy.parameters() if p.requires_grad} == wanted


def equal(policy) -> bool:
    student, teacher = policy.adapter("student"), policy.adapter("teacher")
    return all(torch.equal(student[k], teacher[k]) for k in student)


def test_only_the_student_has_gradients_after_any_switch(make_policy):
    policy = make_policy()
    check_frozen(policy)
    policy.use("teacher")
    assert not any(p.requires_grad for p in policy.parameters())
    policy.use("student")
    check_frozen(policy)
    for adapter in ("teacher", "student"):
        policy.score(adapter, ROW)
        check_frozen(policy)
    for adapter in ("teacher", "student", None):
        with policy.acting(adapter):
            assert not any(p.requires_grad for p in policy.adapter("teacher").values())
        check_frozen(policy)
    policy.sync()
    policy.ema(0.5)
    check_frozen(policy)


def test_only_the_student_has_gradients_after_an_exception(make_policy):
    policy = make_policy()
    too_large = [TokenSequence([10**6], [5], [True])]
    for adapter in ("teacher", "student"):
        with pytest.raises(IndexError):
            policy.score(adapter, too_large)
        check_frozen(policy)
    for context in (lambda: policy.acting(None), lambda: policy.acting("teacher")):
        with pytest.raises(KeyError), context():
            raise KeyError
        check_frozen(policy)


def test_a_switch_is_that_of_peft(make_policy):
    """The same outputs as after PEFT's own switches; one to the adapter that is active touches no layer."""
    policy, other, ids = make_policy(), make_policy(), torch.arange(5, 25)[None]
    got = []
    for name in ("teacher", None, "student", None, "teacher"):
        with policy.acting(name):
            got.append(policy.base(input_ids=ids).logits)
    other.model.set_adapter("teacher")
    with torch.no_grad():
        teacher = other.base(input_ids=ids).logits
        with other.model.disable_adapter():
            bare = other.base(input_ids=ids).logits
        other.model.set_adapter("student")
        student = other.base(input_ids=ids).logits
    assert all(map(torch.equal, got, (teacher, bare, student, bare, teacher)))
    assert not torch.equal(student, teacher) and not torch.equal(student, bare)
    policy._layers = None
    policy.use("student")
    with policy.acting("student"):
        assert all(p.requires_grad for p in policy.adapter("student").values())
    with pytest.raises(ValueError, match="no adapter pupil"):
        policy.use("pupil")


def test_an_optimizer_step_leaves_the_teacher_alone(make_policy):
    policy = make_policy(randomise=False)
    params = policy.student_parameters()
    assert {id(p) for p in params} == {id(p) for p in policy.adapter("student").values()}
    optimizer = torch.optim.AdamW(params, lr=0.1)
    before = {k: p.clone() for k, p in policy.adapter("teacher").items()}
    assert policy.teacher_is_student and equal(policy)
    policy.score("student", ROW)[0].sum().backward()
    policy.score("teacher", ROW)
    optimizer.step()
    policy.student_changed()
    assert not policy.teacher_is_student and not equal(policy)
    assert all(torch.equal(p, before[k]) for k, p in policy.adapter("teacher").items())
    policy.sync()
    assert policy.teacher_is_student and equal(policy)
    assert torch.equal(policy.score("student", ROW)[0], policy.score("teacher", ROW)[0])


def test_fresh_adapters_change_nothing_and_are_equal(make_policy):
    policy = make_policy(randomise=False)
    with policy.acting(None):
        base = policy._score(ROW, 1.0)[0]
    assert policy.teacher_is_student
    for name in ("student", "teacher"):
        torch.testing.assert_close(policy.score(name, ROW)[0], base)
    assert all(p.dtype == torch.float32 for p in policy.adapter("student").values())


def test_ema_averages_from_the_student(make_policy):
    policy = make_policy()
    policy.sync()
    start = {k: p.clone() for k, p in policy.adapter("student").items()}
    with torch.no_grad():
        for p in policy.adapter("student").values():
            p.add_(1.0)
    policy.student_changed()
    for _ in range(2):
        policy.ema(0.05)
    for k, p in policy.adapter("teacher").items():
        torch.testing.assert_close(p, start[k] + (1 - 0.95**2))
        assert not p.requires_grad
    assert not policy.teacher_is_student
    policy.ema(1.0)
    assert policy.teacher_is_student and equal(policy)
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="EMA rate"):
            policy.ema(rate)


def test_ema_of_equal_weights_keeps_them_equal(make_policy):
    policy = make_policy()
    policy.sync()
    policy.ema(0.3)
    assert policy.teacher_is_student and equal(policy)


def test_adapter_state(make_policy):
    policy, other = make_policy(), make_policy(randomise=False)
    state = policy.adapter_state()
    other.load_adapter_state(state)
    check_frozen(other)
    assert not other.teacher_is_student
    for name in ("student", "teacher"):
        assert torch.equal(other.score(name, ROW)[0], policy.score(name, ROW)[0])
    policy.sync()
    other.load_adapter_state(policy.adapter_state())
    assert other.teacher_is_student
    for wrong in (make_policy(lora={"r": 1}).adapter_state(), {**state, "x": state.popitem()[1]}):
        with pytest.raises(ConfigError, match=r"ckpt_path: .*policy\.lora"):
            policy.load_adapter_state(wrong)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_saved_adapter_is_plain_peft(make_policy, tiny_model, tmp_path, name):
    policy = make_policy()
    policy.save_adapter(tmp_path, name)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [name]
    check_frozen(policy)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model("qwen3")), tmp_path / name)
    ids = torch.arange(5, 25)[None]
    with policy.acting(name):
        torch.testing.assert_close(plain(input_ids=ids).logits, policy.base(input_ids=ids).logits)


def test_starting_from_a_saved_adapter(make_policy, tmp_path):
    policy = make_policy()
    policy.save_adapter(tmp_path)
    again = make_policy(randomise=False, lora={"init": str(tmp_path / "student")})
    check_frozen(again)
    assert again.teacher_is_student and equal(again)
    for name in ("student", "teacher"):
        assert torch.equal(again.score(name, ROW)[0], policy.score("student", ROW)[0])


@pytest.mark.parametrize(
    ("lora", "key"),
    [({"r": 8}, r"policy\.lora\.r "), ({"alpha": 99}, r"policy\.lora\.alpha"), ({"targets": ["q_proj"]}, r"policy\.lora\.targets")],
)
def test_an_adapter_that_does_not_fit_is_refused(make_policy, tmp_path, lora, key):
    make_policy().save_adapter(tmp_path)
    with pytest.raises(ConfigError, match=key):
        make_policy(lora={"init": str(tmp_path / "student"), **lora})


def test_the_packaged_adapter_goes_with_the_packaged_agent(make_policy):
    policy = Policy(PolicySettings(lora=LoraSettings(r=16, alpha=32, init="nano-recover")))
    assert policy.teacher_is_student and all(p.abs().sum() > 0 for k, p in policy.adapter("student").items() if "lora_B" in k)
    with pytest.raises(ConfigError, match=r"policy\.lora\.init is nano-recover.*policy\.model.*null"):
        make_policy(lora={"init": "nano-recover"})


def test_other_adapters_are_refused(make_policy, tmp_path):
    with pytest.raises(ConfigError, match=r"policy\.lora\.init: .*adapter_config\.json"):
        make_policy(lora={"init": str(tmp_path)})
    make_policy().save_adapter(tmp_path)
    config = Path(tmp_path / "student" / "adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), "use_rslora": True}), encoding="utf-8")
    with pytest.raises(ConfigError, match="use_rslora"):
        make_policy(lora={"init": str(tmp_path / "student")})


def test_adapters_do_not_depend_on_earlier_draws(make_policy):
    torch.manual_seed(1)
    a = make_policy(randomise=False).adapter_state()
    state = torch.get_rng_state()
    b = make_policy(randomise=False).adapter_state()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a)
