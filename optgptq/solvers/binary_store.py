"""From rows in binary codes to the weight that is stored.

Shapes: `O` rows, `I` columns, `G` groups, `P` planes, `B` coefficients.
"""

from __future__ import annotations

import torch

from optgptq.binary_weight import BinaryWeight
from optgptq.coefficients import ByteCoefficients, FloatCoefficients, StepCoefficients
from optgptq.normal_form import normal_form
from optgptq.solvers.levels import LARGEST_HALF, nearest_level


def plane_weight(
    codes_OI: torch.Tensor, coefficient_GBO: torch.Tensor, unit_O: torch.Tensor | None, *, group_size: int
) -> BinaryWeight:
    """Return the weight with coefficients for every group, which the storage holds exactly.

    Args:
        codes_OI: uint8 in the model's column order; bit `p` is the sign of plane `p`.
        coefficient_GBO: planes, then the offset; groups in the model's order.
        unit_O: coefficients are whole multiples of it and stored as bytes; None: stored in float16.
        group_size: columns in a group.
    """
    alpha_OGP = coefficient_GBO[:, :-1].permute(2, 0, 1)
    offset_OG = coefficient_GBO[:, -1].T
    codes_OI, alpha_OGP = normal_form(codes_OI, alpha_OGP, group_size=group_size)
    bits = alpha_OGP.shape[2]
    if unit_O is None:
        floats = FloatCoefficients(_contiguous(alpha_OGP, torch.float16), _contiguous(offset_OG, torch.float16))
        return BinaryWeight(codes_OI=codes_OI, coefficients=floats, bits=bits, group_size=group_size)
    steps_OGP, steps_OG = (alpha_OGP / unit_O[:, None, None]).round(), (offset_OG / unit_O[:, None]).round()
    in_bytes = ByteCoefficients(
        _contiguous(steps_OGP, torch.int8), _contiguous(steps_OG, torch.int8), unit_O.to(torch.float16)
    )
    return BinaryWeight(codes_OI=codes_OI, coefficients=in_bytes, bits=bits, group_size=group_size)


def shape_weight(
    codes_OI: torch.Tensor, coefficient_GBO: torch.Tensor, steps_OP: torch.Tensor, *, group_size: int
) -> BinaryWeight:
    """Return the weight with one shape for each row; arguments as those of `plane_weight`.

    `coefficient_GBO` holds a scale and an offset. A negative scale is turned around with its group's signs.
    """
    bits, scale_OG = steps_OP.shape[1], coefficient_GBO[:, 0].T
    is_turned_OI = (scale_OG < 0).repeat_interleave(group_size, dim=1)[:, : codes_OI.shape[1]]
    codes_OI = torch.where(is_turned_OI, codes_OI ^ ((1 << bits) - 1), codes_OI)
    coefficients = StepCoefficients(
        steps_OP.to(torch.uint8).contiguous(),
        _contiguous(scale_OG.abs(), torch.float16),
        _contiguous(coefficient_GBO[:, 1].T, torch.float16),
    )
    return BinaryWeight(codes_OI=codes_OI, coefficients=coefficients, bits=bits, group_size=group_size)


def nearest_levels(weight: BinaryWeight, dense_OI: torch.Tensor) -> torch.Tensor:
    """Return for every entry of a dense weight `[O, I]` the nearest of its group's levels."""
    level_OGK = weight.levels().to(dense_OI.dtype)
    nearest_OI = torch.empty_like(dense_OI)
    for group in range(weight.num_groups):
        columns = slice(group * weight.group_size, (group + 1) * weight.group_size)
        level_KO1 = level_OGK[:, group].T[:, :, None]
        nearest_OI[:, columns], _ = nearest_level(dense_OI[:, columns], level_KO1)
    return nearest_OI


def overflow_notes(weight: BinaryWeight) -> tuple[str, ...]:
    """Return a sentence where coefficients were cut off at the largest number that float16 holds."""
    num_cut_off = sum(int((values.abs() >= LARGEST_HALF).sum()) for values in weight.coefficients.values())
    if not num_cut_off:
        return ()
    return (
        f"{num_cut_off} coefficients of binary codes were cut off at {LARGEST_HALF:.0f}, the largest number that "
        "float16 holds: the weights are too large for them",
    )


def _contiguous(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype).contiguous()
