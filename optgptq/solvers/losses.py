"""Losses of a solution under the undamped moment, row by row."""

from __future__ import annotations

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.solvers.problem import LayerProblem


def row_losses(problem: LayerProblem, *weights: AffineWeight) -> tuple[torch.Tensor, ...]:
    """Return float64 `[O]` vectors: the energy `w H w^T` of each row, then `dw H dw^T` for each of the weights."""
    dtype = problem.settings.dtype
    moment_II = problem.input_moment_II.to(dtype)
    dense_OI = problem.weight_OI.to(dtype)
    differences = [dense_OI, *(weight.dequantize(torch.float32).to(dtype) - dense_OI for weight in weights)]
    return tuple(_quadratic(rows_OI, moment_II) for rows_OI in differences)


def _quadratic(rows_OI: torch.Tensor, moment_II: torch.Tensor) -> torch.Tensor:
    return (rows_OI @ moment_II).mul_(rows_OI).sum(dim=1, dtype=torch.float64)
