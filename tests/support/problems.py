"""Random problems for solvers."""

from __future__ import annotations

from typing import Any

import torch

from optgptq.grids.settings import GridSettings
from optgptq.solvers import LayerProblem, SolverSettings


def random_moment(num_columns: int, *, seed: int = 0, num_tokens: int | None = None) -> torch.Tensor:
    """Return a float64 moment `[I, I]` of correlated inputs whose sizes differ by a factor of about twenty."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = 3 * num_columns if num_tokens is None else num_tokens
    mixing_II = torch.randn(num_columns, num_columns, generator=generator, dtype=torch.float64) / num_columns**0.5
    mixing_II.diagonal().add_(0.5)
    size_I = torch.exp(0.8 * torch.randn(num_columns, generator=generator, dtype=torch.float64))
    inputs_TI = torch.randn(num_tokens, num_columns, generator=generator, dtype=torch.float64) @ mixing_II * size_I
    moment_II: torch.Tensor = inputs_TI.T @ inputs_TI / num_tokens
    return moment_II


def random_weight(num_rows: int, num_columns: int, *, seed: int = 0) -> torch.Tensor:
    """Return a float64 weight `[O, I]` with a few large entries."""
    generator = torch.Generator().manual_seed(1000 + seed)
    weight_OI = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    return weight_OI * torch.where(torch.rand(num_rows, num_columns, generator=generator) < 0.02, 4.0, 1.0)


def problem(
    weight_OI: torch.Tensor,
    moment_II: torch.Tensor,
    *,
    bits: int = 4,
    symmetric: bool = True,
    group_size: int = -1,
    search: Any = "minmax",
    group_grids: Any = "dynamic",
    smallest_zero_point: int = 0,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> LayerProblem:
    """Return a problem in float64; further keywords go to `SolverSettings`."""
    return LayerProblem(
        name="linear",
        weight_OI=weight_OI,
        input_moment_II=moment_II,
        num_tokens=100,
        grid=GridSettings(
            bits=bits,
            symmetric=symmetric,
            group_size=group_size,
            search=search,
            group_grids=group_grids,
            smallest_zero_point=smallest_zero_point,
        ),
        settings=SolverSettings(dtype=dtype, **settings),
    )
