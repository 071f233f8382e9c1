"""Losses of a solution under the undamped moment, row by row."""

from __future__ import annotations

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.solvers.problem import LayerProblem

_COLUMNS_PER_PRODUCT = 512


def row_losses(problem: LayerProblem, *weights: AffineWeight) -> tuple[torch.Tensor, ...]:
    """Return float64 `[O]` vectors: the energy `w H w^T` of each row, then `dw H dw^T` for each of the weights."""
    dtype = problem.settings.dtype
    moment_II = problem.input_moment_II.to(dtype)
    dense_OI = problem.weight_OI.to(dtype)
    differences = [dense_OI, *(weight.dequantize(torch.float32).to(dtype) - dense_OI for weight in weights)]
    return tuple(_quadratic(rows_OI, moment_II) for rows_OI in differences)


def _quadratic(rows_OI: torch.Tensor, moment_II: torch.Tensor) -> torch.Tensor:
    return (rows_OI @ moment_II).mul_(rows_OI).sum(dim=1, dtype=torch.float64)


def factored_energy(columns_IO: torch.Tensor, upper_II: torch.Tensor, added_I: torch.Tensor) -> torch.Tensor:
    """Return float64 `[O]`, `x H x^T` of each row by the factor of the damped moment: `|x P|^2 - sum_i added_i x_i^2`.

    Half the work of a product with `H`: `P` is triangular. Columns are in the walk's order.
    """
    damped_O = columns_IO.new_zeros(columns_IO.shape[1], dtype=torch.float64)
    for begin in range(0, columns_IO.shape[0], _COLUMNS_PER_PRODUCT):
        end = begin + _COLUMNS_PER_PRODUCT
        weighted_CO = upper_II[:end, begin:end].T @ columns_IO[:end]
        damped_O += weighted_CO.square_().sum(dim=0, dtype=torch.float64)
    return undamped_energy(damped_O, columns_IO, added_I)


def undamped_energy(damped_O: torch.Tensor, columns_IO: torch.Tensor, added_I: torch.Tensor) -> torch.Tensor:
    """Return float64 `[O]`, the energy `damped_O` (float64) without what damping added: `- sum_i added_i x_i^2`."""
    energy_O = damped_O - (added_I @ columns_IO.square()).to(torch.float64)
    # What the arithmetic cannot tell from zero is zero.
    return energy_O.where(energy_O > 16 * torch.finfo(columns_IO.dtype).eps * damped_O, 0.0)
