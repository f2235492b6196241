"""The memory plan: what a run will take of the GPU, before its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from skillsd import parallel
from skillsd.engines.in_process import CUDA_PREFILL
from skillsd.errors import ConfigError
from skillsd.module import SkillSD
from skillsd.policy import CacheBudget, Demand, Footprint
from skillsd.rollout import RolloutSettings

SCARCE_PREFILL = 2048
"""Most tokens of prompts that are read in one forward where memory is scarce; `CUDA_PREFILL` elsewhere."""


class MemoryPlan(L.Callback):
    """Prints a run's memory plan and shares out what is free; every run on a GPU has one.

    The update comes first; the rollout's cache gets the rest. Where the cache of `data.rollout.max_rows` episodes of full length does not
    fit beside an update, it is given back before each. Where it does not fit at all, a rollout whose episodes turn out so long is begun
    again with as many as are sure to fit.

    Raises:
        ConfigError: an update does not fit, or not one episode; with the settings that would.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(pl_module, SkillSD) and pl_module.policy.device.type == "cuda":
            text, pl_module.policy.cache_budget = plan(pl_module, data.rollout, available(pl_module.policy.device))
            parallel.print_rank_zero(text)


def available(device: torch.device) -> int:
    """Bytes that this process may reserve: what is free now and what it has, within torch.cuda.set_per_process_memory_fraction."""
    torch.cuda.empty_cache()  # first: what it frees counts as free
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return min(free + reserved, int(total * torch.cuda.get_per_process_memory_fraction(device)))


def plan(module: SkillSD, rollout: RolloutSettings, budget: int) -> tuple[str, CacheBudget]:
    """The plan as text, and what is left for the rollout, for `budget` bytes. See `MemoryPlan`."""
    policy = module.policy
    elsewhere = rollout.engine == "servers"
    size = Footprint(policy, decodes=not elsewhere)
    longest = min(policy.context_length, rollout.max_prompt_tokens + rollout.max_trajectory_tokens)
    d = Demand(
        longest, module.learner.micro_batch_tokens, policy.settings.head_chunk, policy.settings.gradient_checkpointing,
        module.objective.signal.distributional, bool(module.grad_norm_every),
    )  # fmt: skip
    left = budget - size.static
    update, episode = size.update(d), longest * size.token_cache

    def cache(rows: int) -> int:
        return CacheBudget(rows, longest, False, 1).bytes(size.token_cache)

    prompt = min(policy.context_length, rollout.max_prompt_tokens)  # one is read at once
    plenty = max(update, size.prefill(max(CUDA_PREFILL, prompt))) + cache(rollout.max_rows) <= left
    prefill = CUDA_PREFILL if plenty else min(SCARCE_PREFILL, d.tokens)
    read = size.prefill(max(prefill, prompt))

    def fits(e: Demand) -> bool:
        reading = size.prefill(max(min(SCARCE_PREFILL, e.tokens), min(e.longest, prompt)))
        return size.update(e) <= left and reading + e.longest * size.token_cache <= left

    if update > left or read + episode > left:
        raise ConfigError(_too_much(size, d, budget, max(update, read + episode), fits))
    fitting = next(r for r in range(rollout.max_rows, 0, -1) if r == 1 or read + cache(r) <= left)
    keep = fitting == rollout.max_rows and max(update, read) + cache(fitting) <= left
    peak = size.static + (cache(fitting) + max(update, read) if keep else max(update, cache(fitting) + read))
    parts = {
        "weights": _gib(size.weights), **({"gathered layers": _gib(size.gathered)} if size.gathered else {}),
        "adapters": _gib(size.adapters), "optimizer": _gib(size.optimizer),
        "activations": f"{_gib(size.activations(d))} ({d.tokens} tokens)",
        "logits": f"{_gib(size.logits(d))} ({min(d.chunk, d.tokens)} tokens)",
    }  # fmt: skip
    if not elsewhere:
        parts["cache"] = f"{_gib(cache(fitting))} ({fitting} x {longest} tokens{'' if keep else ', given back before each update'})"
    text = ", ".join(f"{k} {v}" for k, v in parts.items())
    return f"memory plan, GiB of {_gib(budget)}: {text}; peak {_gib(peak)}", CacheBudget(fitting, longest, keep, prefill)


def _too_much(size: Footprint, d: Demand, budget: int, needed: int, fits: Callable[[Demand], bool]) -> str:
    always = size.adapters + size.optimizer
    text = (
        f"the run needs {_gib(size.static + needed)} GiB of memory and {_gib(budget)} are available: weights {_gib(size.weights)}, "
        f"adapters and optimizer {_gib(always)}, an update of {d.tokens} tokens {_gib(size.update(d))}, "
        f"a cached token {size.token_cache / 2**10:.0f} KiB. "
    )
    changes = [", ".join(f"{k}={str(v).lower()}" for k, v in keys.items()) for keys in size.fitting_settings(d, fits)]
    if changes:
        return text + "It would fit with: " + "; or ".join(changes) + "."
    return text + "No setting makes it fit: choose a smaller model.policy.model, or model.policy.quantise=nf4."


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f}"
