"""Random weights in binary coding of any size, and their product in float64."""

from __future__ import annotations

import torch
from support.binary_weights import plane_layout, random_binary, slow_dense

from optgptq.binary_weight import BinaryWeight


def binary_weight(
    rows: int, columns: int, *, bits: int, group_size: int = -1, seed: int = 0, shuffled: bool = False
) -> BinaryWeight:
    """Return a weight with float16 coefficients; the last group may be shorter; its columns may be shuffled."""
    layout = plane_layout(rows=rows, columns=columns, bits=bits, group_size=group_size)
    return random_binary(layout, seed=seed, ordered=shuffled)


def slow_product(x: torch.Tensor, weight: BinaryWeight) -> torch.Tensor:
    """Return `x @ weight.T` in float64, the weight element by element."""
    return x.double() @ slow_dense(weight).T
