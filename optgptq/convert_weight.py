"""Uniform grids as binary codes and back, where that changes no weight at all.

A uniform grid `scale * (code - zero_point)` is binary coding with `alpha_p = scale * 2**(P - 1 - p) / 2` and
`offset = scale * ((2**P - 1) / 2 - zero_point)`; plane 0 has the highest bit of the code.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `P` planes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.binary_weight import BinaryWeight
from optgptq.coefficients import FloatCoefficients
from optgptq.errors import TargetError
from optgptq.formats.base import CheckpointFormat
from optgptq.formats.consumers import require_planes
from optgptq.layout import LinearLayout
from optgptq.normal_form import normal_form
from optgptq.quantized_weight import QuantizedWeight

# Rows that are decoded at a time to be compared.
CHUNK_ROWS = 512


def weight_for(
    target: CheckpointFormat, weight: QuantizedWeight, layout: LinearLayout, *, symmetric: bool = True
) -> QuantizedWeight:
    """Return `weight` as the kind that `target` holds; every dequantized float32 value is the same bit for bit.

    Args:
        target: the wanted format.
        weight: with uniform grids or with binary codes.
        layout: its layout, for messages and for the sizes of its groups.
        symmetric: binary codes may become a symmetric weight, which stores no zero points.

    Raises:
        TargetError: its codes, groups or coefficients have no equal of the other kind.
    """
    converted = weight
    if target.holds_binary_codes and isinstance(weight, AffineWeight):
        converted = binary_weight(weight, layout)
    elif not target.holds_binary_codes and isinstance(weight, BinaryWeight):
        smallest = target.smallest_zero_point
        converted = affine_weight(weight, layout, smallest_zero_point=smallest, symmetric=symmetric)
    if converted is not weight:
        _require_equal(weight, converted, layout)
    return converted


def binary_weight(weight: AffineWeight, layout: LinearLayout) -> BinaryWeight:
    """Return `weight` as sums of signs, coefficients in float32; an act-order becomes a column order.

    Raises:
        TargetError: sign planes have no such width or groups, or act-order groups are of different sizes.
    """
    require_planes(replace(layout, coefficients="float"))
    codes_OI, order_I = weight.codes_OI, None
    if weight.group_index_I is not None:
        order_I = _column_order(weight, layout, weight.group_index_I)
        codes_OI = codes_OI[:, order_I]
    scale_OG = weight.scale_OG.to(torch.float32)
    # In plane 0 the highest bit, so that coefficients descend; turned around where the scale is negative.
    codes_OI = _turned(_reversed(codes_OI, weight.bits), scale_OG < 0, bits=weight.bits, group_size=weight.group_size)
    powers_P = torch.tensor([2.0**power for power in range(weight.bits - 2, -2, -1)])
    middle_OG = (2**weight.bits - 1) / 2 - weight.zero_point_OG.to(torch.float32)
    return BinaryWeight(
        codes_OI=codes_OI,
        coefficients=FloatCoefficients(scale_OG.abs()[:, :, None] * powers_P, scale_OG * middle_OG),
        bits=weight.bits,
        group_size=weight.group_size,
        column_order_I=None if order_I is None else order_I.to(torch.int32),
    )


def affine_weight(
    weight: BinaryWeight, layout: LinearLayout, *, smallest_zero_point: int, symmetric: bool = True
) -> AffineWeight:
    """Return `weight` on uniform grids, scales in float32; a column order becomes act-order groups.

    A grid that is turned around, with a negative scale, has the same levels. That is done where the whole weight
    becomes symmetric by it and `symmetric` allows it, and in groups whose zero point would be below
    `smallest_zero_point`.

    Raises:
        TargetError: coefficients that are not in the ratios of a uniform grid, or a zero point that is not whole.
    """
    alpha_OGP, offset_OG = weight.coefficients.values()
    codes_OI, alpha_OGP = normal_form(weight.codes_OI, alpha_OGP, group_size=weight.group_size)
    scale_OG = 2 * alpha_OGP[:, :, -1]
    powers_P = torch.tensor([2.0**power for power in range(weight.bits - 2, -2, -1)])
    uneven_OG = (alpha_OGP != scale_OG[:, :, None] * powers_P).any(dim=2)
    highest, middle = 2**weight.bits - 1, 2 ** (weight.bits - 1)
    empty_OG = scale_OG == 0
    zero_OG = highest / 2 - offset_OG.double() / torch.where(empty_OG, 1, scale_OG.double())
    zero_OG = torch.where(empty_OG & (offset_OG == 0), middle, zero_OG)
    unusable_OG = uneven_OG | (empty_OG & (offset_OG != 0)) | (zero_OG != zero_OG.round())
    unusable_OG |= (zero_OG < -1) | (zero_OG > highest + 1)
    if bool(unusable_OG.any()):
        raise _not_uniform(layout, uneven_OG, unusable_OG)
    turned_OG = zero_OG < smallest_zero_point
    symmetric = symmetric and bool(((zero_OG == middle) | (zero_OG == middle - 1)).all())
    if symmetric:
        turned_OG = zero_OG == middle - 1
    zero_OG = torch.where(turned_OG, highest - zero_OG, zero_OG).to(torch.int32)
    codes_OI = _turned(_reversed(codes_OI, weight.bits), turned_OG, bits=weight.bits, group_size=weight.group_size)
    return AffineWeight(
        codes_OI=_in_order(codes_OI, weight.column_order_I),
        scale_OG=torch.where(turned_OG, -scale_OG, scale_OG),
        zero_point_OG=zero_OG,
        bits=weight.bits,
        group_size=weight.group_size,
        symmetric=symmetric,
        group_index_I=_group_index(weight),
    )


def _reversed(codes_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes with their bits in the opposite order."""
    reversed_OI = torch.zeros_like(codes_OI)
    for bit in range(bits):
        reversed_OI |= (codes_OI >> bit & 1) << (bits - 1 - bit)
    return reversed_OI


def _turned(codes_OI: torch.Tensor, turned_OG: torch.Tensor, *, bits: int, group_size: int) -> torch.Tensor:
    """Return the codes counted from the other end in the groups that are turned around."""
    mask_OG = turned_OG.to(torch.uint8) * (2**bits - 1)
    result_OI = codes_OI.clone()
    for group in range(turned_OG.shape[1]):
        result_OI[:, group * group_size : (group + 1) * group_size] ^= mask_OG[:, group, None]
    return result_OI


def _column_order(weight: AffineWeight, layout: LinearLayout, index_I: torch.Tensor) -> torch.Tensor:
    """Return the columns, group by group; TargetError where groups have other numbers of columns than `group_size`."""
    counts_G = torch.bincount(index_I.long(), minlength=weight.num_groups)
    if not bool((counts_G == weight.group_size).all()):
        raise TargetError(
            layout.name,
            expected=f"{weight.group_size} columns in each group of its act-order g_idx",
            found=f"{int(counts_G.min())} to {int(counts_G.max())}",
            action="Keep the checkpoint in its layout, or quantize the model again with optgptq.",
        )
    return index_I.long().argsort(stable=True)


def _in_order(codes_OI: torch.Tensor, order_I: torch.Tensor | None) -> torch.Tensor:
    """Return codes in the model's own order of columns."""
    if order_I is None:
        return codes_OI
    ordered_OI = torch.empty_like(codes_OI)
    ordered_OI[:, order_I.long()] = codes_OI
    return ordered_OI


def _group_index(weight: BinaryWeight) -> torch.Tensor | None:
    """Return the group of each column of the model; None where groups are of consecutive columns."""
    if weight.column_order_I is None:
        return None
    consecutive_I = torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size
    index_I = torch.empty_like(consecutive_I)
    index_I[weight.column_order_I.long()] = consecutive_I
    return None if torch.equal(index_I, consecutive_I) else index_I


def _not_uniform(layout: LinearLayout, uneven_OG: torch.Tensor, unusable_OG: torch.Tensor) -> TargetError:
    num_uneven, num_unusable = int(uneven_OG.sum()), int(unusable_OG.sum())
    reasons = [
        f"{num_uneven} with coefficients of other ratios" if num_uneven else "",
        f"{num_unusable - num_uneven} without a whole zero point in range" if num_unusable > num_uneven else "",
    ]
    return TargetError(
        layout.name,
        expected="a uniform grid in every group: coefficients in the ratios 1, 2, 4 and a whole zero point",
        found=f"of {unusable_OG.numel()} groups {' and '.join(filter(None, reasons))}",
        action="Keep the layout optgptq: no layout with uniform grids holds this weight.",
    )


def _require_equal(weight: QuantizedWeight, converted: QuantizedWeight, layout: LinearLayout) -> None:
    for begin in range(0, weight.out_features, CHUNK_ROWS):
        end = min(begin + CHUNK_ROWS, weight.out_features)
        before_OI, after_OI = weight.rows(begin, end).dequantize(), converted.rows(begin, end).dequantize()
        if not torch.equal(before_OI, after_OI):
            raise TargetError(
                layout.name,
                expected="the same weight bit for bit on the other kind of grid",
                found=f"{int((before_OI != after_OI).sum())} of rows {begin} to {end - 1} that differ by rounding",
                action="Keep the checkpoint in its layout: its scales take all of float32.",
            )
