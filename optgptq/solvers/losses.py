"""Losses of a solution under the undamped moment, row by row."""

from __future__ import annotations

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.numerics import float32_products
from optgptq.solvers.problem import LayerProblem


def row_losses(problem: LayerProblem, *weights: AffineWeight) -> tuple[torch.Tensor, ...]:
    """Return float64 `[O]` vectors: the energy `w H w^T` of each row, then `dw H dw^T` for each of the weights.

    In a float32 solve these are good to about three digits: they are for people and gates, and three full products
    would take as long as the walk.
    """
    dtype = problem.settings.dtype
    moment_II = problem.input_moment_II.to(dtype)
    dense_OI = problem.weight_OI.to(dtype)
    differences = [dense_OI, *(weight.dequantize(torch.float32).to(dtype) - dense_OI for weight in weights)]
    with float32_products(on_bfloat16_units=dtype == torch.float32):
        return tuple(_quadratic(rows_OI, moment_II) for rows_OI in differences)


def _quadratic(rows_OI: torch.Tensor, moment_II: torch.Tensor) -> torch.Tensor:
    return (rows_OI @ moment_II).mul_(rows_OI).sum(dim=1, dtype=torch.float64)
