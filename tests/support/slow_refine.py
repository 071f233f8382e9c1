"""Refinement as its formulas are written down, in float64, one row and one code at a time.

Shapes: `I` columns, `G` groups, `D` rows of a head.
"""

from __future__ import annotations

import torch

from optgptq.affine_weight import AffineWeight


def random_affine(
    target_OI: torch.Tensor, *, bits: int, group_size: int, symmetric: bool = True, seed: int = 0
) -> AffineWeight:
    """Return a poor quantization of a target: coarse grids, some of them turned around, codes off by up to one."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_columns = target_OI.shape
    size = num_columns if group_size == -1 else group_size
    groups = [slice(begin, begin + size) for begin in range(0, num_columns, size)]
    shape = (num_rows, len(groups))
    largest_OG = torch.stack([target_OI[:, columns].abs().amax(dim=1) for columns in groups], dim=1).clamp(min=1e-3)
    turned_OG = torch.where(torch.rand(shape, generator=generator) < 0.3, -1.0, 1.0)
    scale_OG = (turned_OG * largest_OG / 2 ** (bits - 1)).to(torch.bfloat16).to(torch.float32)
    zero_point_OG = torch.full(shape, 2 ** (bits - 1), dtype=torch.int32)
    if not symmetric:
        zero_point_OG = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int32)
    codes_OI = torch.empty(target_OI.shape, dtype=torch.uint8)
    for group, columns in enumerate(groups):
        steps = (target_OI[:, columns] / scale_OG[:, group, None]).round() + zero_point_OG[:, group, None]
        steps += torch.randint(-1, 2, steps.shape, generator=generator)
        codes_OI[:, columns] = steps.clamp(0, 2**bits - 1).to(torch.uint8)
    return AffineWeight(
        codes_OI=codes_OI,
        scale_OG=scale_OG,
        zero_point_OG=zero_point_OG,
        bits=bits,
        group_size=size,
        symmetric=symmetric,
    )


def row_losses(target_OI: torch.Tensor, moment_II: torch.Tensor, weight: AffineWeight) -> torch.Tensor:
    """Return `(Q - target) H (Q - target)^T` of each row, `Q` as a checkpoint would give it."""
    error_OI = weight.dequantize(torch.float64) - target_OI
    return torch.stack([error_I @ moment_II @ error_I for error_I in error_OI])


def head_losses(
    target_NDI: torch.Tensor, moment_II: torch.Tensor, moment_NDD: torch.Tensor, weight: AffineWeight
) -> torch.Tensor:
    """Return `tr(B X H X^T)` of each head."""
    error_NDI = weight.dequantize(torch.float64).view(target_NDI.shape) - target_NDI
    pairs = zip(error_NDI, moment_NDD, strict=True)
    return torch.stack([torch.trace(moment_DD @ error_DI @ moment_II @ error_DI.T) for error_DI, moment_DD in pairs])


def group_masked(steps_I: torch.Tensor, groups: list[slice]) -> torch.Tensor:
    """Return `B` `[G, I]` of one row: its steps, each in the row of its group."""
    masked_GI = torch.zeros(len(groups), len(steps_I), dtype=torch.float64)
    for group, columns in enumerate(groups):
        masked_GI[group, columns] = steps_I[columns]
    return masked_GI


def slow_descent(
    steps_I: torch.Tensor,
    target_I: torch.Tensor,
    moment_II: torch.Tensor,
    *,
    scale_I: torch.Tensor,
    lowest_I: torch.Tensor,
    highest_I: torch.Tensor,
) -> torch.Tensor:
    """Return the steps of one row after one sweep; every candidate level of every column is tried."""
    steps_I = steps_I.clone()
    for column in range(len(steps_I)):
        if float(moment_II[column, column]) <= 0:
            continue
        losses = {}
        for step in range(int(lowest_I[column]), int(highest_I[column]) + 1):
            tried_I = steps_I.clone()
            tried_I[column] = step
            error_I = target_I - tried_I * scale_I
            losses[step] = float(error_I @ moment_II @ error_I)
        steps_I[column] = min(losses, key=lambda step: losses[step])
    return steps_I
