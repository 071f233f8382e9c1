"""Random weights in binary coding, and their dense matrix one number at a time."""

from __future__ import annotations

from dataclasses import replace

import torch

from optgptq.binary_weight import BinaryWeight
from optgptq.coefficients import ByteCoefficients, Coefficients, FloatCoefficients, StepCoefficients
from optgptq.layout import CoefficientStorage, LinearLayout

STORAGES: tuple[CoefficientStorage, ...] = ("float", "int8", "steps")


def plane_layout(
    *,
    rows: int = 5,
    columns: int = 64,
    bits: int = 3,
    group_size: int = 32,
    coefficients: CoefficientStorage = "float",
    name: str = "model.layers.0.mlp.down_proj",
) -> LinearLayout:
    return LinearLayout(
        name=name,
        out_features=rows,
        in_features=columns,
        bits=bits,
        group_size=group_size,
        symmetric=False,
        coefficients=coefficients,
    )


def random_binary(
    layout: LinearLayout, *, seed: int = 0, dtype: torch.dtype = torch.float16, ordered: bool = False
) -> BinaryWeight:
    """Random codes and coefficients of `layout`; `ordered` gives it a column order."""
    assert layout.bits is not None
    generator = torch.Generator().manual_seed(seed)
    rows, columns, bits = layout.out_features, layout.in_features, layout.bits
    group_size = columns if layout.group_size == -1 else layout.group_size
    groups = -(-columns // group_size)
    order_I = torch.randperm(columns, generator=generator).to(torch.int32) if ordered else None
    alpha_OGP = torch.rand(rows, groups, bits, generator=generator).sort(dim=2, descending=True).values
    offset_OG = torch.randn(rows, groups, generator=generator)
    coefficients: Coefficients
    if layout.coefficients == "float":
        coefficients = FloatCoefficients(alpha_OGP.to(dtype), offset_OG.to(dtype))
    elif layout.coefficients == "int8":
        row_scale_O = (torch.rand(rows, generator=generator) + 0.5).to(dtype)
        bytes_OG = (offset_OG * 40).clamp(-127, 127).to(torch.int8)
        coefficients = ByteCoefficients((alpha_OGP * 127).to(torch.int8), bytes_OG, row_scale_O)
    else:
        steps_OP = torch.randint(1, 16, (rows, bits), generator=generator, dtype=torch.uint8)
        steps_OP = steps_OP.sort(dim=1, descending=True).values
        coefficients = StepCoefficients(steps_OP, alpha_OGP[:, :, 0].to(dtype), offset_OG.to(dtype))
    return BinaryWeight(
        codes_OI=torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator),
        coefficients=coefficients,
        bits=bits,
        group_size=group_size,
        column_order_I=order_I,
    )


def slow_dense(weight: BinaryWeight) -> torch.Tensor:
    """The definition in float64: offset plus the signed coefficients of a group, at the model's column."""
    alpha_OGP, offset_OG = (values.double() for values in weight.coefficients.values())
    dense_OI = torch.empty(weight.out_features, weight.in_features, dtype=torch.float64)
    for row in range(weight.out_features):
        for place in range(weight.in_features):
            group, code = place // weight.group_size, int(weight.codes_OI[row, place])
            total = offset_OG[row, group].clone()
            for plane in range(weight.bits):
                total += alpha_OGP[row, group, plane] * (1 if code >> plane & 1 else -1)
            column = place if weight.column_order_I is None else int(weight.column_order_I[place])
            dense_OI[row, column] = total
    return dense_OI


def same_binary(first: BinaryWeight, second: BinaryWeight) -> bool:
    """Every field equal, coefficients also in dtype."""
    tensors = [(first.codes_OI, second.codes_OI)]
    tensors += zip(first.coefficients.tensors(), second.coefficients.tensors(), strict=True)
    fields = [(weight.bits, weight.group_size, weight.coefficients.storage) for weight in (first, second)]
    orders = [weight.column_order_I for weight in (first, second)]
    if orders[0] is not None and orders[1] is not None:
        tensors.append((orders[0], orders[1]))
    same_tensors = all(left.dtype == right.dtype and torch.equal(left, right) for left, right in tensors)
    return same_tensors and fields[0] == fields[1] and (orders[0] is None) == (orders[1] is None)


def with_floats(weight: BinaryWeight, alpha_OGP: torch.Tensor, offset_OG: torch.Tensor) -> BinaryWeight:
    return replace(weight, coefficients=FloatCoefficients(alpha_OGP, offset_OG))
