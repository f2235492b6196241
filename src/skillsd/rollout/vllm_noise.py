"""The noise of the default engine as vLLM's logits processor, in the engine's own process and in servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from skillsd.rollout.noise import sample, uniforms

LEAST = -9999.0
"""vLLM's servers tell of no smaller log-prob."""


class Noise:
    """vLLM's logits processor: draws, and leaves of each row only the token drawn, with its log-prob for a logit.

    The argmax that vLLM takes then is that token, and its processed logit that log-prob. A request says what to draw with in its
    `extra_args`: {"skillsd": {key, position, temperature}}, or over HTTP, where they are flat, skillsd_key, skillsd_position and
    skillsd_temperature; a log-prob that is nan is then LEAST, since JSON has no nan.
    """

    def __init__(self, vllm_config: Any = None, device: Any = None, is_pin_memory: bool = False) -> None:
        self.rows: dict[int, tuple[dict[str, Any], Sequence[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Who sits where in the batch."""
        if batch_update is None:
            return
        for i in batch_update.removed:
            self.rows.pop(i, None)
        for i, params, _, sampled in batch_update.added:
            self.rows.pop(i, None)
            given = params.extra_args or {}
            if noise := given.get("skillsd") or _flat(given):
                self.rows[i] = noise, sampled
        for i, j, direction in batch_update.moved:
            a, b = self.rows.pop(i, None), self.rows.pop(j, None)
            if a is not None:
                self.rows[j] = a
            if b is not None and direction.name == "SWAP":
                self.rows[i] = b

    def apply(self, logits: Tensor) -> Tensor:
        """float32 [n, V], in place."""
        for t in sorted({noise["temperature"] for noise, _ in self.rows.values()}):
            mine = [(i, n["key"], n["position"] + len(y), "flat" in n) for i, (n, y) in self.rows.items() if n["temperature"] == t]
            # From pinned memory: vLLM prepares the next step meanwhile, unless something makes it wait for this one.
            steps = torch.tensor(mine, dtype=torch.int64, pin_memory=logits.is_cuda).to(logits.device, non_blocking=True)
            index, keys, positions, flat = steps.unbind(1)
            ids, logp = sample(logits[index], uniforms(keys, positions), t)
            logp = torch.where(flat.bool() & logp.isnan(), LEAST, logp)
            logits.index_fill_(0, index, -torch.inf)
            logits[index, ids] = logp
        return logits


def _flat(given: dict[str, Any]) -> dict[str, Any] | None:
    if "skillsd_key" not in given:
        return None
    numbers = int(given["skillsd_key"]), int(given["skillsd_position"]), float(given["skillsd_temperature"])
    return {**dict(zip(("key", "position", "temperature"), numbers, strict=True)), "flat": True}


def noise_processor() -> type:
    """`Noise` as the class that vLLM asks for."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    return type("Noise", (Noise, LogitsProcessor), {})


def __getattr__(name: str) -> Any:
    """`NoiseProcessor`, for a server's --logits-processors; made when asked for, so that this file can be read without vLLM."""
    if name == "NoiseProcessor":
        return noise_processor()
    raise AttributeError(f"module {__name__} has no attribute {name}")
