"""The default engine's sampling noise as a logits processor for vLLM servers. It runs in vLLM's process and needs torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skillsd.engines.noise import sample, uniforms

MIN_LOGPROB = -9999.0
"""vLLM's servers report no smaller log-prob. JSON has no nan, so this stands for it."""


class Draw(NamedTuple):
    """What a row draws with. `sampled` is vLLM's own list of the row's output ids, which grows as it samples."""

    key: int
    position: int
    temperature: float
    sampled: Sequence[int]


class Noise:
    """Draws a token for each row, and leaves of the row's logits only that token's, with its log-prob for a value.

    The argmax that vLLM takes then is the token drawn, and its processed logit the log-prob. A request names what to draw with in its
    `vllm_xargs`: skillsd_key (text: it has 64 bits), skillsd_position and skillsd_temperature. Requests without them are left alone.
    """

    def __init__(self, vllm_config: Any = None, device: Any = None, is_pin_memory: bool = False) -> None:
        self.rows: dict[int, Draw] = {}

    def is_argmax_invariant(self) -> bool:
        """No: vLLM calls `apply` for greedy requests too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows of vLLM's batch: some are removed, others added, others moved, in this order."""
        if batch_update is None:
            return
        for i in batch_update.removed:
            self.rows.pop(i, None)
        for i, params, _, sampled in batch_update.added:
            self.rows.pop(i, None)
            given = params.extra_args or {}
            if "skillsd_key" in given:
                numbers = int(given["skillsd_key"]), int(given["skillsd_position"]), float(given["skillsd_temperature"])
                self.rows[i] = Draw(*numbers, sampled)
        for i, j, direction in batch_update.moved:
            a, b = self.rows.pop(i, None), self.rows.pop(j, None)
            if a is not None:
                self.rows[j] = a
            if b is not None and direction.name == "SWAP":
                self.rows[i] = b

    def apply(self, logits: Tensor) -> Tensor:
        """Draw for each row of `logits`, float32 [n, V], which is changed in place."""
        for t in sorted({draw.temperature for draw in self.rows.values()}):
            table = [(i, d.key, d.position + len(d.sampled)) for i, d in self.rows.items() if d.temperature == t]
            # From pinned memory: vLLM prepares the next step meanwhile, unless something makes it wait for this one.
            steps = torch.tensor(table, dtype=torch.int64, pin_memory=logits.is_cuda).to(logits.device, non_blocking=True)
            index, keys, positions = steps.unbind(1)
            ids, logp = sample(logits[index], uniforms(keys, positions), t)
            logits.index_fill_(0, index, -torch.inf)
            logits[index, ids] = torch.where(logp.isnan(), MIN_LOGPROB, logp)
        return logits


def __getattr__(name: str) -> Any:
    """`NoiseProcessor`, for a server's --logits-processors; made when asked for, so that this file can be read without vLLM."""
    if name == "NoiseProcessor":
        from vllm.v1.sample.logits_processor import LogitsProcessor

        return type(name, (Noise, LogitsProcessor), {})
    raise AttributeError(f"module {__name__} has no attribute {name}")
