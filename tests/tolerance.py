"""How far apart two float32 computations of the same thing may be, on any CPU.

A sum in float32 is off by some units in the last place of the largest number that is added up. Instruction set, number of threads and
the other rows of a batch decide the order of the additions, and so how many. A bound is therefore relative to the size of what is added
up, and not to the result, which is small where the terms cancel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

ROUNDING = 256 * torch.finfo(torch.float32).eps
"""256 units in the last place, 3e-5. Two layers of a tiny model are off by up to 30 of them between AVX-512 and no vector instructions."""


def close(got: Any, want: Any, times: float = 1.0, where: str = "") -> None:
    """Assert equality but for float32 rounding of log-probs, losses, gaps and what else is made of terms of about 1 or larger.

    Args:
        got, want: Tensors of one shape, numbers, or mappings and sequences of them. Equal nans are equal.
        times: So many times `ROUNDING`: for a sum of many such terms, which is not divided by their number.
        where: Named in the failure.
    """
    if isinstance(want, Mapping):
        assert list(got) == list(want), where
        for key in want:
            close(got[key], want[key], times, f"{where}/{key}")
    elif isinstance(want, torch.Tensor):
        size = max(1.0, float(want.nan_to_num().abs().max())) if want.numel() else 1.0
        torch.testing.assert_close(
            got, want, atol=times * ROUNDING * size, rtol=0, equal_nan=True, check_dtype=False, msg=lambda m: f"{where}: {m}"
        )
    elif isinstance(want, Sequence) and not isinstance(want, str):
        assert len(got) == len(want), where
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            close(a, b, times, f"{where}/{i}")
    elif isinstance(want, float):
        bound = times * ROUNDING * max(1.0, abs(want))
        assert abs(got - want) <= bound or (math.isnan(got) and math.isnan(want)), f"{where}: {got}, {want}, allowed {bound:.1e}"
    else:
        assert got == want, where
