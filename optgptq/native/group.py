"""Calls of the compiled inner loop of a group of columns. What it computes is defined by torch code above this package.

Shapes: `L` columns of a group, `O` rows, `G` grids, `K` grids of a group.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optgptq.native.library import PATHS, Backend, Library, check_done, load_library

_POINTERS = ("weight", "pending", "upper", "price", "shares", "factors", "given_scale", "given_zero_point")
_RESULTS = ("error", "weighted", "codes", "clipped", "scale", "zero_point")
_INTEGERS = ("weight_stride", "pending_stride", "upper_stride", "given_stride", "num_columns", "num_rows")
_SETTINGS = ("num_shares", "num_factors", "count", "symmetric")
_NUMBERS = ("max_code", "smallest_zero_point", "symmetric_zero_point", "half_step")
_MAX_COUNT = 8


class GroupCall(ctypes.Structure):
    """The record of that name in `source/group.hpp`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_POINTERS, "grid_of_column", *_RESULTS)),
        *((name, ctypes.c_int64) for name in (*_INTEGERS, *_SETTINGS)),
        *((name, ctypes.c_double) for name in _NUMBERS),
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GridScan:
    """Which grids are tried.

    Attributes:
        price_L: what a squared error in each column costs.
        shares_K: of the full range, tried first; empty: the full range is taken.
        factors_K: of the best scale, tried around it.
        symmetric: both signs of the scale are tried; else both zero points around the range.
        max_code, smallest_zero_point, symmetric_zero_point: limits of codes and zero points.
        count: grids that are walked, or returned.
    """

    price_L: torch.Tensor
    shares_K: torch.Tensor
    factors_K: torch.Tensor
    symmetric: bool
    max_code: int
    smallest_zero_point: int
    symmetric_zero_point: int
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class GivenGrids:
    """Scales and zero points `[G, O]`, which of them each of the `L` columns has, and the largest code."""

    scale_GO: torch.Tensor
    zero_point_GO: torch.Tensor
    grid_of_column: Sequence[int]
    max_code: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Walked:
    """Results: `error_LO` and `weighted_LO` in the dtype of the weight, `codes_LO` uint8, `clipped_O` int64.

    `scale_O` and `zero_point_O` are None where the grids were given.
    """

    error_LO: torch.Tensor
    weighted_LO: torch.Tensor
    codes_LO: torch.Tensor
    clipped_O: torch.Tensor
    scale_O: torch.Tensor | None
    zero_point_O: torch.Tensor | None


def path_for(backend: Backend, *tensors: torch.Tensor) -> str | None:
    """Return the path that takes these tensors, or None: torch does.

    Raises:
        ValueError: the path that was asked for by name is not there.
    """
    library = load_library()
    if backend == "torch":
        return None
    takes = all(tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64) for tensor in tensors)
    if backend == "auto":
        return library.paths[0] if library is not None and takes else None
    if library is None or backend not in library.paths or not takes:
        raise ValueError(f"the native path {backend} is not there for these tensors on this machine")
    return backend


def walk_searched(
    path: str,
    weight_LO: torch.Tensor,
    pending_LO: torch.Tensor,
    upper_LL: torch.Tensor,
    scan: GridScan,
    *,
    half_step: float,
) -> Walked:
    """Find `scan.count` grids for each row, walk them and return the cheapest walk of each row."""
    weight_LO, pending_LO, upper_LL = map(_rows, (weight_LO, pending_LO, upper_LL))
    scale_O, zero_point_O = weight_LO.new_empty(2, weight_LO.shape[1]).unbind()
    call = _new_call(weight_LO, half_step=half_step)
    kept = set_scan(call, scan)
    call.scale, call.zero_point = scale_O.data_ptr(), zero_point_O.data_ptr()
    walked = _walk(path, call, weight_LO, pending_LO, upper_LL)
    del kept
    return Walked(**walked, scale_O=scale_O, zero_point_O=zero_point_O)


def walk_given(
    path: str,
    weight_LO: torch.Tensor,
    pending_LO: torch.Tensor,
    upper_LL: torch.Tensor,
    grids: GivenGrids,
    *,
    half_step: float,
) -> Walked:
    """Walk the columns on given grids."""
    weight_LO, pending_LO, upper_LL = map(_rows, (weight_LO, pending_LO, upper_LL))
    scale_GO, zero_point_GO = grids.scale_GO.contiguous(), grids.zero_point_GO.contiguous()
    grid_L = torch.tensor(grids.grid_of_column, dtype=torch.int64)
    assert scale_GO.shape == zero_point_GO.shape
    assert scale_GO.shape[1] == weight_LO.shape[1]
    assert len(grid_L) == len(weight_LO)
    call = _new_call(weight_LO, half_step=half_step)
    call.max_code, call.count = grids.max_code, 1
    call.given_scale, call.given_zero_point = scale_GO.data_ptr(), zero_point_GO.data_ptr()
    call.given_stride, call.grid_of_column = scale_GO.shape[1], grid_L.data_ptr()
    walked = _walk(path, call, weight_LO, pending_LO, upper_LL)
    return Walked(**walked, scale_O=None, zero_point_O=None)


def search_grids(path: str, columns_LO: torch.Tensor, scan: GridScan) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point `[K, O]`, `scan.count` of them, the cheapest first."""
    columns_LO = _rows(columns_LO)
    scale_KO, zero_point_KO = columns_LO.new_empty(2, scan.count, columns_LO.shape[1]).unbind()
    call = _new_call(columns_LO, half_step=0.5)
    kept = set_scan(call, scan)
    call.scale, call.zero_point = scale_KO.data_ptr(), zero_point_KO.data_ptr()
    _run(path, call, columns_LO)
    del kept
    return scale_KO, zero_point_KO


def _rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with the numbers of a row side by side."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _new_call(weight_LO: torch.Tensor, *, half_step: float) -> GroupCall:
    call = GroupCall(half_step=half_step)
    call.weight, call.weight_stride = weight_LO.data_ptr(), weight_LO.stride(0)
    call.num_columns, call.num_rows = weight_LO.shape
    return call


def set_scan(call: GroupCall, scan: GridScan) -> tuple[torch.Tensor, ...]:
    """Write the scan into the call; the returned tensors hold what it points to."""
    assert scan.count <= _MAX_COUNT
    assert scan.price_L.shape[0] == call.num_columns
    kept = tuple(tensor.contiguous() for tensor in (scan.price_L, scan.shares_K, scan.factors_K))
    call.price, call.shares, call.factors = (tensor.data_ptr() for tensor in kept)
    call.num_shares, call.num_factors, call.count = len(scan.shares_K), len(scan.factors_K), scan.count
    call.symmetric, call.max_code = scan.symmetric, scan.max_code
    call.smallest_zero_point, call.symmetric_zero_point = scan.smallest_zero_point, scan.symmetric_zero_point
    return kept


def _walk(
    path: str, call: GroupCall, weight_LO: torch.Tensor, pending_LO: torch.Tensor, upper_LL: torch.Tensor
) -> dict[str, torch.Tensor]:
    assert weight_LO.dtype == pending_LO.dtype == upper_LL.dtype
    assert pending_LO.shape == weight_LO.shape
    call.pending, call.pending_stride = pending_LO.data_ptr(), pending_LO.stride(0)
    call.upper, call.upper_stride = upper_LL.data_ptr(), upper_LL.stride(0)
    error_LO, weighted_LO = weight_LO.new_empty(2, *weight_LO.shape).unbind()
    codes_LO = torch.empty(weight_LO.shape, dtype=torch.uint8)
    clipped_O = torch.empty(weight_LO.shape[1], dtype=torch.int64)
    call.error, call.weighted = error_LO.data_ptr(), weighted_LO.data_ptr()
    call.codes, call.clipped = codes_LO.data_ptr(), clipped_O.data_ptr()
    _run(path, call, weight_LO)
    return {"error_LO": error_LO, "weighted_LO": weighted_LO, "codes_LO": codes_LO, "clipped_O": clipped_O}


def _run(path: str, call: GroupCall, weight_LO: torch.Tensor) -> None:
    library = load_library()
    assert isinstance(library, Library)
    threads = torch.get_num_threads()
    status = library.shared.optgptq_round_group(ctypes.byref(call), weight_LO.element_size(), PATHS[path], threads)
    check_done(status)
