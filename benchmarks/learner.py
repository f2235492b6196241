"""The learner: forward and backward of the student and forward of the teacher, beside plain checkpointed transformers and PEFT.

    python -m benchmarks.learner --size 4B                                                  # a GPU
    python -m benchmarks.learner --size tiny --rows 64 --ragged 8 40 --device cpu           # does it run?

Both sides have the same base in nf4, the same LoRA weights, gradient checkpointing and logits of --chunk positions at a time; every
second token is an action. `plain` is the policy with `kernels: false`: PEFT's layers, transformers' attention, rows padded to the longest
of their micro-batch. Tokens are real ones, without padding. Memory is what a forward and backward add to the weights at their peak, as
PyTorch allocated it, and the most that it had reserved altogether.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from benchmarks.decode import print_kernels, timed
from benchmarks.random_model import random_model

from skillsd.policy import LoraSettings, Policy, PolicySettings, TokenSequence, micro_batches


def rows_of(lengths: list[int], vocabulary: int) -> list[TokenSequence]:
    rng = random.Random(len(lengths))
    made = []
    for n in lengths:
        ids = [rng.randrange(10, vocabulary) for _ in range(n)]
        made.append(TokenSequence(ids[: n // 4], ids[n // 4 :], [i % 2 == 0 for i in range(n - n // 4)]))
    return made


class Learner:
    """One policy on rows, in micro-batches."""

    def __init__(self, policy: Policy, rows: list[TokenSequence], budget: int) -> None:
        self.policy = policy
        self.parts = [[rows[i] for i in part] for part in micro_batches([len(r) for r in rows], budget, not policy.packs)]

    def step(self) -> float:
        """Forward and backward of all; the sum of log-probs."""
        total = 0.0
        for p in self.policy.student_parameters():
            p.grad = None
        for part in self.parts:
            logp = self.policy.score("student", part).logp.sum()
            logp.backward()
            total += logp.item()
        return total

    def teach(self) -> None:
        for part in self.parts:
            with torch.no_grad():
                self.policy.score("teacher", part)

    def seconds(self, what: str, repeat: int) -> float:
        call = getattr(self, what)
        call()
        return timed(lambda: [call() for _ in range(repeat)], self.policy.device)[0] / repeat


def profile(learner: Learner, what: str) -> None:
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as p:
        timed(getattr(learner, what), learner.policy.device)
    print(f"\n{what}:")
    print_kernels(p)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4B")
    parser.add_argument("--rows", type=int, nargs="*", default=[8192], help="lengths of a batch")
    parser.add_argument("--ragged", type=int, nargs=3, default=[64, 200, 824], help="another batch: rows, shortest, longest")
    parser.add_argument("--budget", type=int, default=8192, help="micro_batch_tokens")
    parser.add_argument("--chunk", type=int, default=2048, help="head_chunk")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    a = parser.parse_args()
    folder, policies = str(random_model(a.size, a.folder, a.device)), {}
    for name, kernels in (("plain", False), ("ours", True)):
        settings = PolicySettings(
            model=folder, quantise="nf4", lora=LoraSettings(r=16), gradient_checkpointing=True, head_chunk=a.chunk, kernels=kernels
        )
        policies[name] = Policy(settings, a.device)
        torch.manual_seed(1)
        with torch.no_grad():
            for k, p in policies[name].adapter("student").items():
                if "lora_B" in k:
                    p.normal_(0, 0.01)
    gpu = a.device != "cpu"
    print(
        f"Qwen3-{a.size}, {torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}, micro-batches of {a.budget} tokens"
    )
    print(
        "| rows | | learner tok/s | teacher tok/s | adds GiB | reserved GiB | sum of log-probs |\n|---|---|---:|---:|---:|---:|---:|",
        flush=True,
    )
    rng = random.Random(0)
    batches = [a.rows, [rng.randint(*a.ragged[1:]) for _ in range(a.ragged[0])]]
    for lengths in batches:
        first: list[float] = []
        grads = []
        for name, policy in policies.items():
            learner = Learner(policy, rows_of(lengths, policy.base.config.vocab_size), a.budget)
            before = 0
            if gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            total = learner.step()
            rate = [sum(lengths) / learner.seconds(what, a.repeat) for what in ("step", "teach")]
            adds = (torch.cuda.max_memory_allocated() - before) / 2**30 if gpu else 0.0
            most = torch.cuda.max_memory_reserved() / 2**30 if gpu else 0.0
            grads.append(torch.cat([p.grad.flatten().double().cpu() for p in policy.student_parameters() if p.grad is not None]))
            times = "".join(f" (x {x / y:.2f})" if first else "" for x, y in zip(rate[:1], first[:1], strict=False))
            teach = f" (x {rate[1] / first[1]:.2f})" if first else ""
            first = first or rate
            described = f"{len(lengths)} of {min(lengths)} to {max(lengths)}"
            print(
                f"| {described} | {name} | {rate[0]:.0f}{times} | {rate[1]:.0f}{teach} | {adds:.2f} | {most:.2f} | {total:.1f} |",
                flush=True,
            )
            if a.profile and name == "ours":
                profile(learner, "step")
                profile(learner, "teach")
        print(f"cosine of the two gradients: {torch.nn.functional.cosine_similarity(*grads, dim=0):.5f}", flush=True)


if __name__ == "__main__":
    main()
