"""Products of activations with a weight in binary coding, by the compiled loops (`source/binary_products.hpp`).

Shapes: `M` tokens, `O` output rows, `I` input columns, `G` groups along `I`, `P` planes; `T` tiles of 16 rows
(`R`), `B` blocks of 32 columns.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch

from optgptq.native.library import check_done, load_library
from optgptq.native.products import PRODUCT_PATHS, product_paths

# The most planes that a weight may have for the loops.
MOST_PLANES = 4
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Rows(ctypes.Structure):
    """`ProductRows`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("numbers", "column_order")),
        *((name, ctypes.c_int64) for name in ("type", "stride", "num_columns")),
    )


class _BinaryCodes(ctypes.Structure):
    """`BinaryCodes`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "alphas", "offsets")),
        *((name, ctypes.c_int64) for name in ("scale_type", "num_planes", "num_rows", "num_blocks", "num_groups")),
    )


class _Output(ctypes.Structure):
    """`ProductOutput`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("numbers", "bias")),
        *((name, ctypes.c_int64) for name in ("type", "stride")),
    )


class _BinaryCall(ctypes.Structure):
    """`ProductCall<BinaryCodes>`."""

    _fields_ = (
        ("rows", _Rows),
        ("weight", _BinaryCodes),
        ("output", _Output),
        *((name, ctypes.c_int64) for name in ("num_tokens", "is_exact")),
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class BinaryTiles:
    """A weight in binary coding as the loops read it; rows are filled up to whole tiles, groups to whole blocks.

    Attributes:
        codes_TBPX: uint8 `[T, B, P, 64]`: codes of `P` bits, bit `p` that of plane `p`, as
            `optgptq.native.row_tiles` packs them.
        alpha_TGPR: coefficients, float16 or float32 `[T, G, P, 16]`.
        offset_TGR: `[T, G, 16]` in the same dtype.
        num_rows: rows `O` without the filling.
        num_columns: columns `I` without the filling.
    """

    codes_TBPX: torch.Tensor
    alpha_TGPR: torch.Tensor
    offset_TGR: torch.Tensor
    num_rows: int
    num_columns: int
    # The same for the library, prepared once.
    fields: _BinaryCodes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", _fields_of(self))

    @property
    def num_blocks(self) -> int:
        """Blocks `B` of a row."""
        return self.codes_TBPX.shape[1]

    @property
    def num_planes(self) -> int:
        """Planes `P`."""
        return self.codes_TBPX.shape[2]

    @property
    def num_groups(self) -> int:
        """Groups `G` of a row."""
        return self.offset_TGR.shape[1]


def binary_product(
    x: torch.Tensor,
    weight: BinaryTiles,
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
        weight: planes and coefficients.
        bias_O: in any of these dtypes.
        column_order_I: int64, the column of `x` that each column of the weight takes; None: they are in order.
        exact: leave activations as they are.
        path: an instruction set, None for the fastest.
    """
    library = load_library()
    assert library is not None
    assert x.shape[-1] == weight.num_columns
    rows = x if x.is_contiguous() else x.contiguous()
    output = torch.empty((*x.shape[:-1], weight.num_rows), dtype=x.dtype)
    num_tokens = x.numel() // weight.num_columns
    if num_tokens == 0:
        return output
    bias = None if bias_O is None else bias_O.to(torch.float32)
    order = None
    if column_order_I is not None:
        assert column_order_I.dtype == torch.int64
        assert column_order_I.is_contiguous()
        order = column_order_I.data_ptr()
    number_type = _TYPES[x.dtype]
    call = _BinaryCall(
        _Rows(rows.data_ptr(), order, number_type, weight.num_columns, weight.num_columns),
        weight.fields,
        _Output(output.data_ptr(), None if bias is None else bias.data_ptr(), number_type, weight.num_rows),
        num_tokens,
        exact,
    )
    number = PRODUCT_PATHS[product_paths()[0] if path is None else path]
    check_done(library.shared.optgptq_binary_product(ctypes.byref(call), number, torch.get_num_threads()))
    return output


def _fields_of(weight: BinaryTiles) -> _BinaryCodes:
    parts = (weight.codes_TBPX, weight.alpha_TGPR, weight.offset_TGR)
    assert all(part.is_contiguous() for part in parts)
    assert 1 <= weight.num_planes <= MOST_PLANES
    assert weight.alpha_TGPR.dtype == weight.offset_TGR.dtype
    return _BinaryCodes(
        *(part.data_ptr() for part in parts),
        _TYPES[weight.offset_TGR.dtype],
        weight.num_planes,
        weight.num_rows,
        weight.num_blocks,
        weight.num_groups,
    )
