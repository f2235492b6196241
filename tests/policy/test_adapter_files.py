"""Adapters of PEFT: loaded as PEFT loads them, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.policy.test_weights import POINTER, weights
from transformers import AutoModelForCausalLM

from skillsd.errors import ConfigError
from skillsd.policy import LoraSettings, Policy, PolicySettings

IDS = torch.arange(5, 25)[None]
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
ONE = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
Make = Callable[..., Policy]


@pytest.fixture
def saved(tiny_model: Callable[..., str], tmp_path: Path) -> Callable[..., Path]:
    """An adapter that PEFT made and saved."""

    def save(targets: str | list[str] = "all-linear", **settings: Any) -> Path:
        torch.manual_seed(3)
        base = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"))
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


@pytest.mark.parametrize(
    "settings",
    [
        *({"init_lora_weights": x} for x in (True, False, "gaussian", "orthogonal", "eva")),
        {"lora_dropout": 0.5}, {"fan_in_fan_out": True}, {"targets": ["layers.0.self_attn.q_proj", "mlp.down_proj"]},
        {"targets": ["q_proj", "up_proj"], "exclude_modules": ["lm_head"]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_accepted_is_computed_as_peft_computes_it(
    settings: dict[str, Any], saved: Callable[..., Path], make_policy: Make, tiny_model: Callable[..., str]
) -> None:
    folder = saved(**settings)
    policy = make_policy(randomise=False, lora={"init": str(folder), "targets": settings.get("targets", "all-linear")})
    base = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"))
    with torch.no_grad(), policy.acting("student"):
        ours, bare = policy.base(input_ids=IDS).logits, base(input_ids=IDS).logits
        theirs = PeftModel.from_pretrained(base, folder)(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, bare, rtol=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        *({"init_lora_weights": x} for x in ("pissa", "pissa_niter_2", "olora", "mica")),
        {"use_rslora": True}, {"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"rank_pattern": {"q_proj": 1}},
        {"alpha_pattern": {"q_proj": 1}}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}, {"lora_bias": True},
        {"layer_replication": [[0, 2], [0, 2]]}, {"use_qalora": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_that_is_not_known_to_be_right_is_refused_by_name(
    settings: dict[str, Any], saved: Callable[..., Path], make_policy: Make
) -> None:
    with pytest.raises(ConfigError, match=rf"policy\.lora\.init: .* made with {next(iter(settings))} "):
        make_policy(lora={"init": str(saved(**settings))})


def test_a_setting_of_a_later_version(saved: Callable[..., Path], make_policy: Make) -> None:
    folder = saved()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"use_better": False, "better_config": None}))
    make_policy(lora={"init": str(folder)})
    (folder / CONFIG).write_text(json.dumps(config | {"use_better": True}))
    with pytest.raises(ConfigError, match="use_better"):
        make_policy(lora={"init": str(folder)})


def change(update: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], Any]:
    return lambda f: save_file({k: t.contiguous() for k, t in update(load_file(f / FILE)).items()}, f / FILE, {"format": "pt"})


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor missing": (change(lambda w: {k: t for k, t in w.items() if k != ONE}), f"lacks 1 of the 28 .*{ONE}"),
    "a tensor too many": (change(lambda w: w | {ONE.replace(".1.", ".2."): w[ONE] + 1}), r"layers\.2\.mlp\.up_proj"),
    "foreign names": (change(lambda w: {f"foreign.{k}": t for k, t in w.items()}), r"foreign\."),
    "another width": (change(lambda w: w | {ONE: w[ONE][:, :-1]}), f"{ONE} .*shape"),
    "another rank": (change(lambda w: w | {ONE: w[ONE][:1]}), f"{ONE} .*shape"),
    "nan": (change(lambda w: w | {ONE: w[ONE] * torch.nan}), f"{ONE} .*finite"),
    "a pointer of git-lfs": (lambda f: (f / FILE).write_bytes(POINTER), rf"{FILE} .*git lfs pull"),
    "a cut file": (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-9]), FILE),
    "no file": (lambda f: (f / FILE).unlink(), FILE),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), CONFIG),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), CONFIG),
    "another kind": (lambda f: (f / CONFIG).write_text('{"peft_type": "ADALORA", "r": 4, "lora_alpha": 8}'), "ADALORA"),
    "no rank": (lambda f: (f / CONFIG).write_text('{"peft_type": "LORA"}'), "rank|r None"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_an_adapter_is_loaded_whole_or_refused(case: str, saved: Callable[..., Path], make_policy: Make) -> None:
    spoil, named = SPOILT[case]
    spoil(folder := saved())
    with pytest.raises(ConfigError, match=rf"policy\.lora\.init.*{named}"):
        make_policy(lora={"init": str(folder)})


def test_an_embedding_is_not_adapted(make_policy: Make) -> None:
    with pytest.raises(ConfigError, match=r"policy\.lora\.targets: .*embed_tokens"):
        make_policy(lora={"targets": ["embed_tokens", "q_proj"]})


def test_an_adapter_says_which_weights_it_belongs_to(make_policy: Make, tiny_model: Callable[..., str], tmp_path: Path) -> None:
    policy = make_policy()
    policy.save_adapter(tmp_path)
    folder, moved = tmp_path / "student", Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "moved"))
    settings = PolicySettings(model=str(moved), lora=LoraSettings(r=4, alpha=8, init=str(folder)))
    assert Policy(settings).digest == policy.digest
    weights(lambda w: w | {"model.norm.weight": w["model.norm.weight"] + 1})(moved)
    with pytest.raises(ConfigError, match=rf"policy\.lora\.init: .*{policy.digest}"):
        Policy(settings)
    (folder / "base.json").unlink()  # a plain adapter of PEFT
    assert Policy(settings).digest != policy.digest
