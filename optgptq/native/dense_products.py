"""Dense products of bfloat16 numbers by the compiled loops (`source/dense_products.hpp`).

Shapes: `M` tokens, `O` output rows, `I` input columns.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch

from optgptq.native.large_pages import large_page_empty
from optgptq.native.library import PAIR_WAYS, Library, PairWay, check_done, load_library

# A weight is laid out anew for so many tokens at least: then that is less than a tenth of the product.
_TOKENS_WORTH_PACKING = 256


class _DenseWeight(ctypes.Structure):
    """`DenseWeight`, field by field."""

    _fields_ = (
        ("numbers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride", "num_rows", "num_columns")),
    )


class _DenseCall(ctypes.Structure):
    """`DenseCall`."""

    _fields_ = (
        ("inputs", ctypes.c_void_p),
        ("input_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("tiles", "bias", "output")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_rows", "num_columns")),
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DenseTiles:
    """A bfloat16 weight `[O, I]` as the loops read it.

    Attributes:
        tiles: int32 numbers, two columns each.
        num_rows: rows `O`.
        num_columns: columns `I`.
    """

    tiles: torch.Tensor
    num_rows: int
    num_columns: int


@cache
def has_dense_products() -> bool:
    """Say whether the processor has the instruction, and the library was built."""
    library = load_library()
    return library is not None and library.bfloat16_products


def takes_dense(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Say whether `pack_dense` and `dense_product` of these are worth while: enough bfloat16 tokens, no gradient."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.numel() < _TOKENS_WORTH_PACKING * x.shape[-1]:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad):
        return False
    return weight_OI.dtype == torch.bfloat16 and weight_OI.stride(1) == 1 and has_dense_products()


def pack_dense(weight_OI: torch.Tensor) -> DenseTiles:
    """Return a bfloat16 weight `[O, I]` as tiles, a copy."""
    assert weight_OI.dtype == torch.bfloat16
    assert weight_OI.stride(1) == 1
    num_rows, num_columns = weight_OI.shape
    shared = _library().shared
    tiles = large_page_empty((shared.optgptq_dense_tile_numbers(num_rows, num_columns),), torch.int32)
    weight = _DenseWeight(weight_OI.data_ptr(), weight_OI.stride(0), num_rows, num_columns)
    check_done(shared.optgptq_pack_dense(ctypes.byref(weight), tiles.data_ptr(), torch.get_num_threads()))
    return DenseTiles(tiles=tiles, num_rows=num_rows, num_columns=num_columns)


def dense_product(
    x: torch.Tensor, weight: DenseTiles, bias_O: torch.Tensor | None = None, *, way: PairWay = "faster"
) -> torch.Tensor:
    """Return `x [..., I]` times the weight, plus a bias `[O]`, in bfloat16.

    Sums are float32, one over all columns in their order, and are rounded once: a token has the same bits in any batch
    and on any number of threads.

    Args:
        x: bfloat16 activations on the processor.
        weight: tiles.
        bias_O: of any dtype.
        way: how products are added; the bits are the same.
    """
    assert x.dtype == torch.bfloat16
    assert x.shape[-1] == weight.num_columns
    rows = x if x.is_contiguous() else x.contiguous()
    output = torch.empty((*x.shape[:-1], weight.num_rows), dtype=torch.bfloat16)
    if output.numel() == 0:
        return output
    bias = None if bias_O is None else bias_O.float().contiguous()
    call = _DenseCall(
        rows.data_ptr(),
        weight.num_columns,
        weight.tiles.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        x.numel() // weight.num_columns,
        weight.num_rows,
        weight.num_columns,
    )
    status = _library().shared.optgptq_multiply_dense(ctypes.byref(call), PAIR_WAYS[way], torch.get_num_threads())
    check_done(status)
    return output


def _library() -> Library:
    library = load_library()
    assert library is not None
    return library
