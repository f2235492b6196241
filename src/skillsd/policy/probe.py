"""Does 4-bit NormalFloat really run on this machine? bitsandbytes imports without complaint where its kernels are missing."""

from __future__ import annotations

import torch


def nf4_error(device: str) -> float:
    """Forward of a tiny nf4 layer (64 x 128, double quantisation, bfloat16) against the same Gaussian weights unquantised.

    Args:
        device: Where, e.g. `cpu` or `cuda`.

    Returns:
        Relative error of the output (Frobenius norm): about 0.1 where the kernels are right.

    Raises:
        ImportError, RuntimeError: bitsandbytes is not installed, or has no kernel for the device.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 128, generator=generator), torch.randn(8, 128, generator=generator)
    layer = Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16)
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to(device)  # quantises
    with torch.no_grad():
        out = layer(x.to(device, torch.bfloat16)).float().cpu()
    exact = x @ weight.T
    return float((out - exact).norm() / exact.norm())
