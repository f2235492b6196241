"""vLLM's decoding with an nf4 base, quantised as it is loaded, and an unmerged LoRA adapter. benchmarks/decode.py --vllm runs it.

    python benchmarks/peers/vllm_decode.py --model FOLDER --adapter FOLDER --rows 8 32 64 --prompt 1024 --new 128

The engine runs in this process. A line of JSON for the start-up, then one for each number of rows: tokens/s by the median and by the mean
of the steps in which every row decodes and none is prefilled, from one step's tokens to the next's. Log-probs are not asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time

from standalone import say, set_environment


class Engine:
    """The engine with its adapter, and prompts of random tokens."""

    def __init__(self, a: argparse.Namespace) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        most = max(a.rows)
        sizes = sorted({1, 2, 4, 8, 16, 32, 64, *a.rows})
        self.llm = LLM(
            model=a.model, quantization="bitsandbytes", load_format="bitsandbytes", dtype="bfloat16", skip_tokenizer_init=True,
            enable_lora=True, max_lora_rank=a.rank, max_loras=1, max_model_len=a.prompt + a.new + 16, max_num_seqs=most, seed=0,
            gpu_memory_utilization=a.memory, enable_prefix_caching=False, disable_log_stats=True,
            compilation_config={"cudagraph_capture_sizes": [n for n in sizes if n <= most]},
        )  # fmt: skip
        self.adapter = LoRARequest("student", 1, a.adapter)
        with open(os.path.join(a.model, "config.json"), encoding="utf-8") as f:
            self.vocabulary = json.load(f)["vocab_size"]
        self.asked = 0

    def decode(self, rows: int, prompt: int, new: int) -> list[float]:
        """Seconds of each step in which all `rows` decode."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, rng = self.llm.llm_engine, random.Random(rows)
        sampling = SamplingParams(max_tokens=new, temperature=1.0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA)
        for _ in range(rows):
            ids = [rng.randrange(10, self.vocabulary) for _ in range(prompt)]
            engine.add_request(str(self.asked), {"prompt_token_ids": ids}, sampling, lora_request=self.adapter)
            self.asked += 1
        seconds: list[float] = []
        last, full = time.perf_counter(), False
        while engine.has_unfinished_requests():
            tokens = sum(len(o.outputs[0].token_ids) for o in engine.step())
            if not tokens:  # steps may be scheduled ahead of their tokens
                continue
            now = time.perf_counter()
            if full and tokens == rows:
                seconds.append(now - last)
            last, full = now, tokens == rows  # the first such step may have ended a prefill
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of bfloat16 weights")
    parser.add_argument("--adapter", required=True, help="a PEFT folder")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--memory", type=float, default=0.5, help="share of the GPU's memory that vLLM may take")
    a = parser.parse_args()
    set_environment()
    start = time.perf_counter()
    engine = Engine(a)
    say(startup_s=round(time.perf_counter() - start, 1))
    for rows in a.rows:
        engine.decode(rows, a.prompt, min(a.new, 24))
        seconds = engine.decode(rows, a.prompt, a.new)
        if not seconds:
            raise SystemExit(f"{rows} rows never decoded all at once: give a larger --new")
        median, mean = statistics.median(seconds), statistics.mean(seconds)
        say(rows=rows, tok_s=round(rows / median, 1), mean_tok_s=round(rows / mean, 1), steps=len(seconds))


if __name__ == "__main__":
    main()
