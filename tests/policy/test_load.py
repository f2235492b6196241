"""Loading: what is refused with which key, and what the settings do."""

from pathlib import Path

import pytest
import torch

from skillsd.errors import ConfigError
from skillsd.policy import LoraSettings, Policy, PolicySettings
from skillsd.policy.load import load_base, load_tokenizer
from skillsd.policy.smollm2 import cached_folder, package_folder
from skillsd.rollout import Chat

CPU = torch.device("cpu")


def test_a_folder_without_weights(tmp_path, tiny_model):
    with pytest.raises(ConfigError, match=r"policy\.model: the folder .* holds no model"):
        load_base(PolicySettings(model=str(tmp_path)), CPU)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(tiny_model("qwen3")) / name).read_bytes())
    assert load_base(PolicySettings(model=str(tmp_path)), CPU).config.model_type == "qwen3"
    with pytest.raises(ConfigError, match=r"policy\.model: the folder .* holds no tokenizer"):
        load_tokenizer(PolicySettings(model=str(tmp_path)))


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing-here", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(ConfigError, match=r"policy\.model: there is no folder"):
        load_tokenizer(PolicySettings(model=name))


def test_an_unknown_name_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = PolicySettings(model="nobody/no-such-model")
    for load in (load_tokenizer, lambda s: load_base(s, CPU)):
        with pytest.raises(ConfigError, match=r"policy\.model: nobody/no-such-model .*HF_HUB_OFFLINE"):
            load(settings)


def test_chat_template(tiny_model, tmp_path):
    model = tiny_model("qwen3")
    with pytest.raises(ConfigError, match=r"policy\.chat_template: no-such .*\(qwen3\)"):
        load_tokenizer(PolicySettings(model=model, chat_template="no-such"))
    packaged = load_tokenizer(PolicySettings(model=model, chat_template="qwen3"))
    assert "<think>" in packaged.chat_template
    with pytest.raises(ConfigError, match=r"policy\.chat_template: no token ends an answer"):
        Chat(packaged, [packaged.eos_token_id])  # its closing mark is no token of this model
    packaged.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    Chat(packaged, [packaged.eos_token_id])  # prefix-preserving
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    assert load_tokenizer(PolicySettings(model=model, chat_template=str(template))).chat_template == "{{ messages }}"


def test_a_model_without_a_template(tiny_model, tmp_path):
    tokenizer = load_tokenizer(PolicySettings(model=tiny_model("qwen3")))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(tiny_model("qwen3")) / name).read_bytes())
    with pytest.raises(ConfigError, match=r"policy\.chat_template"):
        load_tokenizer(PolicySettings(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"lora": LoraSettings(r=0)}, r"policy\.lora\.r"),
        ({"head_chunk": 0}, r"policy\.head_chunk"),
        ({"context_length": 0}, r"policy\.context_length"),
        ({"attention": "flash_attention_2"}, r"policy\.attention"),
    ],
)
def test_bad_settings(settings, key):
    with pytest.raises(ConfigError, match=key):
        PolicySettings(**settings)


def test_untrained_nano():
    policy = Policy(PolicySettings(model="nano-untrained"))
    assert policy.stop_ids == (policy.tokenizer.eos_token_id,) and policy.context_length == 2048
    again = Policy(PolicySettings(model="nano-untrained"))
    assert torch.equal(policy.base.lm_head.weight, again.base.lm_head.weight)
    with pytest.raises(ConfigError, match=r"policy\.quantise"):
        Policy(PolicySettings(model="nano-untrained", quantise="nf4"))


def test_a_base_without_adapters_has_no_gradient(tiny_model):
    policy = Policy(PolicySettings(model=tiny_model("qwen3"), context_length=100), adapters=False)
    assert policy.context_length == 100 and not any("lora" in n for n, _ in policy.named_parameters())
    for adapter in ("student", None):
        with policy.acting(adapter):
            assert not torch.is_grad_enabled()


@pytest.mark.parametrize(("dtype", "want"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_on_a_cpu(make_policy, dtype, want):
    policy = make_policy(dtype=dtype)
    assert policy.base.dtype == want and not policy.base.training
    assert all(p.dtype == torch.float32 for p in policy.adapter("student").values())


def test_smollm2_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"policy\.model: .*make smollm2"):
        cached_folder()
    monkeypatch.setattr("skillsd.policy.smollm2.PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"policy\.model: .*make smollm2"):
        package_folder()
