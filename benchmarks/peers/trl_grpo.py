"""Iterations of TRL's GRPO with QLoRA: nf4 base, LoRA on all linear layers, no teacher. benchmarks/iteration.py --trl runs it.

    python benchmarks/peers/trl_grpo.py --model FOLDER --mode transformers          # or vllm, in the same process
    python benchmarks/peers/trl_grpo.py --model FOLDER --prompts 2 --group 2 --prompt 16 --new 8 --device cpu      # does it run?

FOLDER has bfloat16 weights and a word-level tokenizer, as benchmarks/random_model.py makes them. A line of JSON for the start-up, then one
for each step, of which the first warms up: seconds in all, of generation (with vLLM: of handing it the weights too) and of the update, and
the step's peak memory in GiB. Completions never end early. On a CPU the base is not quantised.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from standalone import say, set_environment


def make_prompts(tokenizer: Any, count: int, length: int) -> list[str]:
    """Words of the tokenizer's vocabulary, a token each."""
    rng = random.Random(0)
    words = sorted(w for w in tokenizer.get_vocab() if w.isascii() and w.isalpha() and w.islower())
    made = [" ".join(rng.choices(words, k=length)) for _ in range(count)]
    lengths = {len(ids) for ids in tokenizer(made)["input_ids"]}
    if lengths != {length}:
        raise SystemExit(f"prompts have {sorted(lengths)} tokens instead of {length}: --model needs a word-level tokenizer")
    return made


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(random.random() < 0.5) for _ in completions]


def build(a: argparse.Namespace) -> Any:
    """The trainer, which reports each step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, BitsAndBytesConfig, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    gpu = a.device == "cuda"
    rows = a.prompts * a.group

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = now()
            made = call(*args, **kwargs)
            seconds[name] += now() - start
            return made

        return run

    class Report(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seconds.clear()
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            self.start = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            total, inputs, generation = now() - self.start, seconds["inputs"], seconds["generation"]
            parts = dict(total_s=total, generation_s=generation, other_s=inputs - generation, update_s=total - inputs)
            peaks = (torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()) if gpu else (0, 0)
            gib = dict(zip(("reserved_gib", "allocated_gib"), (p / 2**30 for p in peaks), strict=True))
            say(step=state.global_step, **{k: round(v, 3) for k, v in {**parts, **gib}.items()})

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            if "completions/mean_length" in (logs or {}):
                say(mean_length=float(logs["completions/mean_length"]))

    tokenizer = AutoTokenizer.from_pretrained(a.model, padding_side="left")
    quantised: dict[str, Any] = {}
    if gpu:  # vLLM's copy gets its weights from this one and knows no quantised scales
        quantised["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=a.mode != "vllm"
        )
    engine: dict[str, Any] = dict(generation_kwargs={"min_new_tokens": a.new})
    if a.mode == "vllm":
        engine = dict(
            use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=a.memory, vllm_max_model_length=a.prompt + a.new + 16,
            generation_kwargs={"ignore_eos": True, "detokenize": False},
        )  # fmt: skip
    micro_batch = min(a.micro_batch, rows)
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro_batch, gradient_accumulation_steps=rows // micro_batch,
        num_generations=a.group, max_completion_length=a.new, max_steps=a.steps, learning_rate=1e-4, temperature=1.0, bf16=gpu,
        use_cpu=not gpu, gradient_checkpointing=True, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        model_init_kwargs=dict(dtype="bfloat16", device_map={"": 0 if gpu else "cpu"}), **engine,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=a.model, reward_funcs=reward, args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": make_prompts(tokenizer, a.prompts * a.steps, a.prompt)}),
        peft_config=LoraConfig(r=a.rank, lora_alpha=2 * a.rank, target_modules="all-linear", task_type="CAUSAL_LM"), **quantised,
    )  # fmt: skip
    for name, method in (("generation", "_generate_single_turn"), ("inputs", "_prepare_inputs")):
        setattr(trainer, method, timed(name, getattr(trainer, method)))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Report())
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", choices=("transformers", "vllm"), default="transformers", help="who generates")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--new", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--micro-batch", type=int, default=8, help="completions")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--memory", type=float, default=0.35, help="share of the GPU's memory that vLLM may take")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    a = parser.parse_args()
    if a.prompts * a.group % min(a.micro_batch, a.prompts * a.group):
        parser.error("--micro-batch does not divide the completions")
    set_environment(TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
    random.seed(0)
    start = time.perf_counter()
    trainer = build(a)
    say(startup_s=round(time.perf_counter() - start, 1))
    trainer.train()


if __name__ == "__main__":
    main()
