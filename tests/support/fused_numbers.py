"""What products with activations in 8 bits are made of, number by number: fused sums and blocks of 32 columns."""

from __future__ import annotations

import numpy as np
import torch

BLOCK = 32


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return `a * b + c` of float32 numbers, rounded once.

    The product is exact in float64. Where the sum there is not, it is rounded to odd first, so that the rounding to
    float32 is the only one that counts.
    """
    a, b, c = (np.asarray(x, dtype=np.float64) for x in np.broadcast_arrays(a, b, c))
    product = a * b
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (bits & 1 == 0) & np.isfinite(total), bits + towards, bits)
    return odd.view(np.float64).astype(np.float32)


def quantized_blocks(x_MI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 inputs as steps `[M, B, 32]` and the scale of each block `[M, B]`."""
    x_MBL = x_MI.reshape(len(x_MI), -1, BLOCK)
    largest_MB = np.abs(x_MBL).max(-1)
    least = np.float32(2.0**-120)
    factor_MB = np.where(largest_MB >= least, np.float32(127) / np.maximum(largest_MB, least), 0).astype(np.float32)
    return np.rint(x_MBL * factor_MB[:, :, None]).astype(np.int64), largest_MB / np.float32(127)


def random_rows(tokens: int, columns: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return rows whose blocks differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(tokens, columns, generator=generator).mul(4).sub(2).exp()
    return (torch.randn(tokens, columns, generator=generator) * sizes).to(dtype)
