"""Small checks that all formats share: stored shapes, exact scales, column orders."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.binary_weight import BinaryWeight
from optgptq.checkpoint.safetensors_header import TensorInfo
from optgptq.checkpoint.source import TensorSource
from optgptq.errors import FormatError, TargetError
from optgptq.formats.consumers import ONE_KIND
from optgptq.layout import LinearLayout
from optgptq.quantized_weight import QuantizedWeight

SCALE_DTYPES = ("F16", "BF16", "F32")


def columns_per_group(layout: LinearLayout) -> int:
    """Return the group size with -1 resolved."""
    return layout.in_features if layout.group_size == -1 else layout.group_size


def groups_per_row(layout: LinearLayout) -> int:
    """Return how many groups a row has; the last one may be shorter in foreign files."""
    return math.ceil(layout.in_features / columns_per_group(layout))


def require_bits(layout: LinearLayout) -> int:
    """Return the bits of a quantized layout."""
    if layout.bits is None:
        raise FormatError(
            layout.name,
            expected="a quantized linear",
            found="one that stays dense",
            action="Please report this: it is a bug in optgptq.",
        )
    return layout.bits


def require_tensor(
    folder: TensorSource, name: str, *, dtypes: Sequence[str], shape: tuple[int, ...] | None = None
) -> TensorInfo:
    """Return the record of tensor `name`; FormatError when it is missing or of another dtype or shape."""
    info = folder.tensors.get(name)
    expected = f"{' or '.join(dtypes)} {list(shape) if shape is not None else ''}".rstrip()
    if info is None or info.dtype not in dtypes or (shape is not None and info.shape != shape):
        raise FormatError(
            f"{folder.path}, tensor {name}",
            expected=expected,
            found=f"{info.dtype} {list(info.shape)}" if info else "no such tensor",
            action="Check quantization_config: it contradicts the stored tensors.",
        )
    return info


def require_affine(layout: LinearLayout, weight: QuantizedWeight) -> AffineWeight:
    """Return `weight`, which must have uniform grids; TargetError where it has binary codes."""
    if not isinstance(weight, AffineWeight):
        raise TargetError(
            layout.name,
            expected="a uniform grid",
            found="binary codes",
            action=f"Use export.format=optgptq for them. {ONE_KIND}.",
        )
    return weight


def require_binary(layout: LinearLayout, weight: QuantizedWeight) -> BinaryWeight:
    """Return `weight`, which must have binary codes; TargetError where it has uniform grids."""
    if not isinstance(weight, BinaryWeight):
        raise TargetError(
            layout.name,
            expected="binary codes",
            found="a uniform grid",
            action=f"Use another export.format, or a method that makes binary codes. {ONE_KIND}.",
        )
    return weight


def affine_stored_bits(layout: LinearLayout, tensors: Sequence[TensorInfo], *, symmetric_zero_points: bool) -> int:
    """Return the bits of codes, scales and stored zero points, without the padding of words."""
    # Scales are the only floating-point tensors of such a linear, whatever the format calls them.
    scales = [tensor for tensor in tensors if tensor.torch_dtype.is_floating_point]
    bits = require_bits(layout)
    stored = layout.out_features * layout.in_features * bits + sum(tensor.num_bytes * 8 for tensor in scales)
    if symmetric_zero_points or not layout.symmetric:
        stored += bits * sum(math.prod(tensor.shape) for tensor in scales)
    return stored


def exact_scales(scale_OG: torch.Tensor, dtype: torch.dtype, *, where: str) -> torch.Tensor:
    """Return the scales in `dtype`; TargetError when that would change one, FormatError when one is not finite."""
    if not bool(torch.isfinite(scale_OG).all()):
        raise FormatError(
            where,
            expected="finite scales",
            found="NaN or infinity",
            action="The checkpoint is damaged: get it again, or quantize the model again.",
        )
    stored_OG = scale_OG.to(dtype)
    if not torch.equal(stored_OG.to(torch.float64), scale_OG.to(torch.float64)):
        changed = int((stored_OG.to(torch.float64) != scale_OG.to(torch.float64)).sum())
        raise TargetError(
            where,
            expected=f"scales that are exact in {dtype}",
            found=f"{changed} of {scale_OG.numel()} that are not",
            action="Choose a layout that stores scales in the dtype of the source (compressed-tensors).",
        )
    return stored_OG


def require_fits(layout: LinearLayout, weight: AffineWeight, *, zero_points: range) -> None:
    """Raise TargetError unless `weight` is what `layout` says and its zero points lie in `zero_points`."""
    if weight.group_index_I is not None:
        raise TargetError(
            layout.name,
            expected="groups of consecutive columns",
            found="columns assigned to groups by an act-order g_idx",
            action="Quantize the model again with optgptq: it keeps groups contiguous whatever the column order.",
        )
    group_size = columns_per_group(layout)
    shapes = (weight.out_features, weight.in_features, weight.bits, weight.group_size, weight.num_groups)
    wanted = (layout.out_features, layout.in_features, layout.bits, group_size, groups_per_row(layout))
    if shapes != wanted:
        raise FormatError(
            layout.name,
            expected=f"rows, columns, bits, group size, groups {wanted}",
            found=str(shapes),
            action="Please report this: it is a bug in optgptq.",
        )
    smallest, largest = int(weight.zero_point_OG.min()), int(weight.zero_point_OG.max())
    middle = 2 ** (weight.bits - 1)
    if layout.symmetric and not smallest == largest == middle:
        raise FormatError(
            layout.name,
            expected=f"zero points of {middle} in a symmetric weight",
            found=f"{smallest} to {largest}",
            action="Please report this: it is a bug in optgptq.",
        )
    if smallest not in zero_points or largest not in zero_points:
        raise TargetError(
            layout.name,
            expected=f"zero points from {zero_points[0]} to {zero_points[-1]}, which the layout can store",
            found=f"{smallest} to {largest}",
            action="Use the layout gptq_v2 or compressed-tensors instead.",
        )
