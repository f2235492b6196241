"""Scratch memory that kernels share: partial sums, and counters of how many partial sums have arrived."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Buffers that grow. Kernels of one stream follow each other, so all use the same ones.

    What a CUDA graph was recorded with is kept: its replay writes there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._floats = [torch.empty(1 << 16, device=device)]
        self._counters = [torch.zeros(1 << 12, dtype=torch.int32, device=device)]
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4

    def floats(self, n: int) -> Tensor:
        """At least n float32, of any content."""
        if len(self._floats[-1]) < n:
            self._floats.append(torch.empty(2 * n, device=self.device))
        return self._floats[-1]

    def counters(self, n: int) -> Tensor:
        """At least n int32, all 0; whoever counts sets them back."""
        if len(self._counters[-1]) < n:
            self._counters.append(torch.zeros(2 * n, dtype=torch.int32, device=self.device))
        return self._counters[-1]
