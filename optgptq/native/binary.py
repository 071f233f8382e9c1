"""Calls of the compiled loops for binary codes. Their twins in torch are in `optgptq.grids` and `optgptq.solvers`.

Shapes: `L` columns of a group, `O` rows, `K` levels, `B` coefficients, `S` shapes, `N` starts of a walk.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from optgptq.native.library import PATHS, Library, check_done, load_library


class _SearchCall(ctypes.Structure):
    """`BinarySearchCall` of `source/binary.hpp`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("columns", "price", "factors", "places", "num_offsets")),
        *((name, ctypes.c_void_p) for name in ("shapes", "index", "scale", "zero", "cost", "shape_cost")),
        *((name, ctypes.c_int64) for name in ("columns_stride", "num_columns", "num_rows", "num_factors")),
        *((name, ctypes.c_int64) for name in ("num_shapes", "num_levels", "max_number")),
        *((name, ctypes.c_double) for name in ("smallest_scale", "tolerance")),
    )


class _Table(ctypes.Structure):
    """`BinaryTable`."""

    _fields_ = (
        ("entries", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_entries", "num_levels", "num_coefficients")),
    )


class _GroupCall(ctypes.Structure):
    """`BinaryGroupCall`."""

    _fields_ = (
        ("table", _Table),
        *((name, ctypes.c_void_p) for name in ("weight", "pending", "upper", "starts")),
        *((name, ctypes.c_void_p) for name in ("codes", "error", "weighted", "coefficient")),
        *((name, ctypes.c_int64) for name in ("weight_stride", "pending_stride", "upper_stride")),
        *((name, ctypes.c_int64) for name in ("num_columns", "num_rows", "num_starts", "refits")),
    )


class _SweepCall(ctypes.Structure):
    """`BinarySweepCall`."""

    _fields_ = (
        ("table", _Table),
        *((name, ctypes.c_void_p) for name in ("gradient", "moment", "old_codes", "old_coefficient", "unit")),
        *((name, ctypes.c_void_p) for name in ("codes", "coefficient", "change")),
        *((name, ctypes.c_int64) for name in ("moment_stride", "num_columns", "num_rows", "forced")),
    )


class _NearestCall(ctypes.Structure):
    """`BinaryNearestCall`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "level", "error")),
        *((name, ctypes.c_int64) for name in ("num_columns", "num_rows", "num_levels")),
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CodeScan:
    """Which codes and scales are tried.

    Attributes:
        level_SK: ascending levels of each shape without an offset, int64; its codes are neighbours, one for every
            offset from 0 on with which the highest level is at most `max_number`.
        factors: shares of the full range.
        max_number: largest whole number.
        smallest_scale: of the full range.
        tolerance: costs in units of the squared scale that differ by less are equal.
    """

    level_SK: torch.Tensor
    factors: Sequence[float]
    max_number: int
    smallest_scale: float
    tolerance: float


@dataclass(frozen=True, slots=True, eq=False)
class WalkedLevels:
    """Results: codes uint8 `[L, O]`, errors and weighted errors `[L, O]`, coefficients `[B, O]`."""

    codes_LO: torch.Tensor
    error_LO: torch.Tensor
    weighted_LO: torch.Tensor
    coefficient_BO: torch.Tensor


def search_levels(
    path: str, columns_LO: torch.Tensor, price_L: torch.Tensor, scan: CodeScan, *, shape_O: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return code, scale, zero and cost of each row, `[O]`; `shape_O` is the only shape that each row may have."""
    index_O = torch.empty(columns_LO.shape[1], dtype=torch.int64)
    scale_O, zero_O, cost_O = columns_LO.new_empty(3, columns_LO.shape[1]).unbind()
    if shape_O is None:
        _search(path, columns_LO, price_L, scan, (None, index_O, scale_O, zero_O, cost_O, None))
        return index_O, scale_O, zero_O, cost_O
    shape_O = shape_O.to(torch.int64).contiguous()
    assert shape_O.shape == index_O.shape
    _search(path, columns_LO, price_L, scan, (shape_O, index_O, scale_O, zero_O, cost_O, None))
    # What comes back is the offset: a code is that many after the first one of its shape.
    num_offsets_S = scan.max_number + 1 - scan.level_SK[:, -1]
    return index_O + (num_offsets_S.cumsum(0) - num_offsets_S)[shape_O], scale_O, zero_O, cost_O


def price_shapes(path: str, columns_LO: torch.Tensor, price_L: torch.Tensor, scan: CodeScan) -> torch.Tensor:
    """Return what each shape costs at its best offset and scale, `[S, O]`."""
    cost_SO = columns_LO.new_empty(len(scan.level_SK), columns_LO.shape[1])
    _search(path, columns_LO, price_L, scan, (None, None, None, None, None, cost_SO))
    return cost_SO


def _search(
    path: str,
    columns_LO: torch.Tensor,
    price_L: torch.Tensor,
    scan: CodeScan,
    chosen: Sequence[torch.Tensor | None],
) -> None:
    """Search for what `chosen` has room for: shapes (an input), then the results in the order of the call."""
    columns_LO, price_L = _rows(columns_LO), price_L.contiguous()
    assert len(price_L) == len(columns_LO)
    assert price_L.dtype == columns_LO.dtype
    factors = torch.tensor(scan.factors, dtype=columns_LO.dtype)
    place_SK, num_offsets_S = _places(scan.level_SK, scan.max_number)
    inputs = _pointers((columns_LO, price_L, factors, place_SK, num_offsets_S))
    pointers = [None if part is None else part.data_ptr() for part in chosen]
    numbers = (columns_LO.stride(0), *columns_LO.shape, len(factors), *place_SK.shape, scan.max_number)
    call = _SearchCall(*inputs, *pointers, *numbers, scan.smallest_scale, scan.tolerance)
    _run(_shared().optgptq_binary_search, path, call, columns_LO)


def walk_levels(
    path: str,
    weight_LO: torch.Tensor,
    pending_LO: torch.Tensor,
    upper_LL: torch.Tensor,
    table_KBO: torch.Tensor,
    *,
    start_NBO: torch.Tensor,
    refits: int,
) -> WalkedLevels:
    """Walk every start, fit the coefficients of the best one and walk again; return of each row the cheapest walk."""
    weight_LO, pending_LO, upper_LL = map(_rows, (weight_LO, pending_LO, upper_LL))
    start_NBO = start_NBO.contiguous()
    assert weight_LO.dtype == pending_LO.dtype == upper_LL.dtype == table_KBO.dtype == start_NBO.dtype
    assert weight_LO.shape == pending_LO.shape
    assert start_NBO.shape[1:] == (table_KBO.shape[1], weight_LO.shape[1])
    codes_LO = torch.empty(weight_LO.shape, dtype=torch.uint8)
    error_LO, weighted_LO = weight_LO.new_empty(2, *weight_LO.shape).unbind()
    coefficient_BO = torch.empty_like(start_NBO[0])
    table_KBO, table = _table(table_KBO, weight_LO.shape[1])
    tensors = (weight_LO, pending_LO, upper_LL, start_NBO, codes_LO, error_LO, weighted_LO, coefficient_BO)
    strides = (weight_LO.stride(0), pending_LO.stride(0), upper_LL.stride(0))
    call = _GroupCall(table, *_pointers(tensors), *strides, *weight_LO.shape, len(start_NBO), refits)
    _run(_shared().optgptq_binary_group, path, call, weight_LO)
    return WalkedLevels(codes_LO, error_LO, weighted_LO, coefficient_BO)


def improve_levels(
    path: str,
    gradient_LO: torch.Tensor,
    moment_LL: torch.Tensor,
    codes_LO: torch.Tensor,
    coefficient_BO: torch.Tensor,
    table_KBO: torch.Tensor,
    *,
    unit_O: torch.Tensor | None,
    forced: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return new codes `[L, O]` and coefficients `[B, O]`, and the new levels minus the old ones `[L, O]`."""
    moment_LL = _rows(moment_LL)
    gradient_LO, codes_LO, coefficient_BO = (part.contiguous() for part in (gradient_LO, codes_LO, coefficient_BO))
    assert gradient_LO.dtype == moment_LL.dtype == coefficient_BO.dtype == table_KBO.dtype
    assert gradient_LO.shape == codes_LO.shape
    assert coefficient_BO.shape == (table_KBO.shape[1], gradient_LO.shape[1])
    unit_O = None if unit_O is None else unit_O.to(gradient_LO.dtype).contiguous()
    results = (torch.empty_like(codes_LO), torch.empty_like(coefficient_BO), torch.empty_like(gradient_LO))
    table_KBO, table = _table(table_KBO, gradient_LO.shape[1])
    inputs = _pointers((gradient_LO, moment_LL, codes_LO, coefficient_BO))
    unit = None if unit_O is None else unit_O.data_ptr()
    numbers = (moment_LL.stride(0), *gradient_LO.shape, int(forced))
    call = _SweepCall(table, *inputs, unit, *_pointers(results), *numbers)
    _run(_shared().optgptq_binary_sweep, path, call, gradient_LO)
    return results


def nearest_error(path: str, weight_LO: torch.Tensor, level_KO: torch.Tensor) -> torch.Tensor:
    """Return each weight minus the nearest level of its row."""
    weight_LO, level_KO = weight_LO.contiguous(), level_KO.contiguous()
    assert weight_LO.dtype == level_KO.dtype
    assert weight_LO.shape[1] == level_KO.shape[1]
    error_LO = torch.empty_like(weight_LO)
    call = _NearestCall(*_pointers((weight_LO, level_KO, error_LO)), *weight_LO.shape, len(level_KO))
    _run(_shared().optgptq_binary_nearest, path, call, weight_LO)
    return error_LO


def _places(level_SK: torch.Tensor, max_number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where `find_gaps` in `source/binary_search.hpp` writes the gaps of each shape, and how many codes it has.

    Gaps are sorted by width, then by lower level; then come the highest levels.
    """
    lower_SK, width_SK = level_SK[:, :-1], level_SK.diff(dim=1)
    wider_SK = (width_SK - 1) * (max_number + 1) - (width_SK - 1) * width_SK // 2
    num_gaps = max_number * (max_number + 1) // 2
    place_SK = torch.cat([wider_SK + lower_SK, level_SK[:, -1:] + num_gaps], dim=1)
    return place_SK.contiguous(), max_number + 1 - level_SK[:, -1]


def _table(table_KBO: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, _Table]:
    """Return the table as it is read, and what a call is told of it."""
    assert table_KBO.shape[2] in (1, num_rows)
    table_KBO = table_KBO.contiguous()
    num_levels, num_coefficients, num_entries = table_KBO.shape
    assert num_coefficients in (2, num_levels.bit_length())
    assert num_levels in (2, 4, 8, 16)
    return table_KBO, _Table(table_KBO.data_ptr(), num_entries, num_levels, num_coefficients)


def _pointers(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with the numbers of a row side by side."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _shared() -> ctypes.CDLL:
    library = load_library()
    assert isinstance(library, Library)
    return library.shared


def _run(function: Callable[..., int], path: str, call: ctypes.Structure, numbers: torch.Tensor) -> None:
    check_done(function(ctypes.byref(call), numbers.element_size(), PATHS[path], torch.get_num_threads()))
