"""Products of activations with a weight in codes, by the compiled loops (`source/products.hpp`).

Shapes: `M` tokens, `O` output rows, `I` input columns, `G` groups along `I`; `T` tiles of 16 rows, `B` blocks of 32
columns, `C` chunks of a block.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache

import torch

from optgptq.native.library import Library, check_done, load_library

# The numbers are those of `source/products.cpp`; the fastest comes first.
PRODUCT_PATHS = {"avx512_vnni": 3, "avx512": 2, "avx2": 1, "portable": 0}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_COMMON_ZERO = 0
_ZERO_TYPES = {torch.uint8: 1, torch.int16: 2}


class _Rows(ctypes.Structure):
    """`ProductRows`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("numbers", "column_order")),
        *((name, ctypes.c_int64) for name in ("type", "stride", "num_columns")),
    )


class _AffineCodes(ctypes.Structure):
    """`AffineCodes`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zero_points")),
        *((name, ctypes.c_int64) for name in ("scale_type", "zero_type", "zero_point", "bits")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_blocks", "num_groups")),
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AffineTiles:
    """Codes on uniform grids as the loops read them; rows are filled up to whole tiles, groups to whole blocks.

    Attributes:
        codes_TBCX: uint8 `[T, B, C, 64]`, as `optgptq.native.row_tiles` packs them.
        scale_TGR: float16 or float32 `[T, G, 16]`.
        zero_point_TGR: uint8 or int16 `[T, G, 16]`; None: all are `zero_point`.
        zero_point: see there.
        bits: 2, 3, 4 or 8.
        num_rows: rows `O` without the filling.
        num_columns: columns `I` without the filling.
    """

    codes_TBCX: torch.Tensor
    scale_TGR: torch.Tensor
    zero_point_TGR: torch.Tensor | None
    zero_point: int
    bits: int
    num_rows: int
    num_columns: int
    # The same for the library; copied into each call, which then costs half of what it did.
    fields: _AffineCodes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", _fields_of(self))

    @property
    def num_blocks(self) -> int:
        """Blocks `B` of a row."""
        return self.codes_TBCX.shape[1]

    @property
    def num_groups(self) -> int:
        """Groups `G` of a row."""
        return self.scale_TGR.shape[1]


class _Output(ctypes.Structure):
    """`ProductOutput`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("numbers", "bias")),
        *((name, ctypes.c_int64) for name in ("type", "stride")),
    )


class _AffineCall(ctypes.Structure):
    """`AffineCall`."""

    _fields_ = (
        ("rows", _Rows),
        ("weight", _AffineCodes),
        ("output", _Output),
        *((name, ctypes.c_int64) for name in ("num_tokens", "is_exact")),
    )


@cache
def product_paths() -> tuple[str, ...]:
    """Return the instruction sets that this processor has and the library was built for, the fastest first."""
    library = load_library()
    if library is None:
        return ()
    return tuple(name for name, number in PRODUCT_PATHS.items() if library.shared.optgptq_product_supported(number))


def affine_product(
    x: torch.Tensor,
    weight: AffineTiles,
    *,
    bias_O: torch.Tensor | None = None,
    column_order_I: torch.Tensor | None = None,
    exact: bool = False,
    path: str | None = None,
) -> torch.Tensor:
    """Return `x [..., I]` times the weight, plus a bias `[O]`, in the dtype of `x`: float32, bfloat16 or float16.

    Activations are rounded to 8 bits with a scale for each 32 columns, or with `exact` taken as they are; sums are
    float32. A token has the same bits in any batch and on any number of threads.

    Args:
        x: activations on the processor.
        weight: codes.
        bias_O: in any of these dtypes.
        column_order_I: int64, the column of `x` that each column of the weight takes; None: they are in order.
        exact: leave activations as they are.
        path: an instruction set, None for the fastest.
    """
    rows = x if x.is_contiguous() else x.reshape(-1, weight.num_columns).contiguous()
    output = torch.empty((*x.shape[:-1], weight.num_rows), dtype=x.dtype)
    num_tokens = x.numel() // weight.num_columns
    if num_tokens == 0:
        return output
    assert x.shape[-1] == weight.num_columns
    bias = None if bias_O is None else bias_O.to(torch.float32)
    order = None
    if column_order_I is not None:
        assert column_order_I.dtype == torch.int64
        assert column_order_I.is_contiguous()
        order = column_order_I.data_ptr()
    number_type = _TYPES[x.dtype]
    call = _AffineCall(
        _Rows(rows.data_ptr(), order, number_type, weight.num_columns, weight.num_columns),
        weight.fields,
        _Output(output.data_ptr(), None if bias is None else bias.data_ptr(), number_type, weight.num_rows),
        num_tokens,
        exact,
    )
    library, number = _numbered(path)
    check_done(library.shared.optgptq_affine_product(ctypes.byref(call), number, torch.get_num_threads()))
    return output


def _fields_of(weight: AffineTiles) -> _AffineCodes:
    zero_points = weight.zero_point_TGR
    parts = (weight.codes_TBCX, weight.scale_TGR, *(() if zero_points is None else (zero_points,)))
    assert all(part.is_contiguous() for part in parts)
    return _AffineCodes(
        weight.codes_TBCX.data_ptr(),
        weight.scale_TGR.data_ptr(),
        None if zero_points is None else zero_points.data_ptr(),
        _TYPES[weight.scale_TGR.dtype],
        _COMMON_ZERO if zero_points is None else _ZERO_TYPES[zero_points.dtype],
        weight.zero_point,
        weight.bits,
        weight.num_rows,
        weight.num_blocks,
        weight.num_groups,
    )


def _numbered(path: str | None) -> tuple[Library, int]:
    library = load_library()
    assert library is not None
    return library, PRODUCT_PATHS[product_paths()[0] if path is None else path]
