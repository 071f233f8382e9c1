"""Losses of a solution under the undamped moment, row by row."""

from __future__ import annotations

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.native.moment import multiplies_bfloat16
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

    Half the work of a product with `H`: `P` is triangular. Columns are in the walk's order. Where float32 is asked and
    the processor multiplies bfloat16 faster, the product is one of bfloat16 numbers: these energies are reported and
    decide nothing, and over hundreds of columns three to four digits are left.
    """
    damped_O = columns_IO.new_zeros(columns_IO.shape[1], dtype=torch.float64)
    dtype = _product_dtype(columns_IO)
    factor_II, rounded_IO = upper_II.to(dtype), columns_IO.to(dtype)
    for begin in range(0, columns_IO.shape[0], _COLUMNS_PER_PRODUCT):
        end = begin + _COLUMNS_PER_PRODUCT
        weighted_CO = (factor_II[:end, begin:end].T @ rounded_IO[:end]).to(columns_IO.dtype)
        damped_O += weighted_CO.square_().sum(dim=0, dtype=torch.float64)
    return undamped_energy(damped_O, columns_IO, added_I, tolerance=4 * torch.finfo(dtype).eps)


def _product_dtype(columns_IO: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if multiplies_bfloat16(columns_IO) else columns_IO.dtype


def undamped_energy(
    damped_O: torch.Tensor, columns_IO: torch.Tensor, added_I: torch.Tensor, *, tolerance: float | None = None
) -> torch.Tensor:
    """Return float64 `[O]`, the energy `damped_O` (float64) without what damping added: `- sum_i added_i x_i^2`.

    `tolerance` is the relative error of `damped_O`; by default that of the arithmetic.
    """
    if tolerance is None:
        tolerance = 16 * torch.finfo(columns_IO.dtype).eps
    energy_O = damped_O - (added_I @ columns_IO.square()).to(torch.float64)
    # What the arithmetic cannot tell from zero is zero.
    return energy_O.where(energy_O > tolerance * damped_O, 0.0)
