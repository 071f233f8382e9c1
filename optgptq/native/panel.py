"""Rows of all heads that meet, rounded one after the other in some columns, in C++.

Its twin in torch is `optgptq.solvers.panel`. Lanes are heads.

Shapes: `L` columns, `B` rows of each head, `N` heads, `G` grids.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optgptq.native.group import GridScan, GroupCall, set_scan
from optgptq.native.library import PATHS, check_done, load_library


class _Call(ctypes.Structure):
    """`PanelCall` of `source/panel.hpp`, field by field."""

    _fields_ = (
        ("group", GroupCall),
        ("output", ctypes.c_void_p),
        ("earlier", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("output_stride", "earlier_stride", "num_rows", "num_heads")),
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PanelRows:
    """What one call is given and what it writes; tensors of one dtype where nothing else is said.

    Rows of a matrix follow each other: the stride of `B` is `N`, that of `N` is 1.

    Attributes:
        weight_LBN: the dense weight.
        pending_LBN: the sums over the columns before these.
        upper_LL: the columns' block of `P_in`.
        output_BBN: the rows' block of `P_out` of each head.
        earlier_LBN: the sums over the rows before these; None where there are none.
        error_LBN: written, the weight minus its level.
        own_LBN: written, `A`; strides of these three results are the same.
        codes_LBN: written, uint8.
        clipped_BN: written, int64, weights more than `half_step` steps from their level when they were rounded.
        scale_GBN, zero_point_GBN: written where the grids are searched (`G` is 1 then), else read.
    """

    weight_LBN: torch.Tensor
    pending_LBN: torch.Tensor
    upper_LL: torch.Tensor
    output_BBN: torch.Tensor
    earlier_LBN: torch.Tensor | None
    error_LBN: torch.Tensor
    own_LBN: torch.Tensor
    codes_LBN: torch.Tensor
    clipped_BN: torch.Tensor
    scale_GBN: torch.Tensor
    zero_point_GBN: torch.Tensor


def path_for_heads(path: str, weight_LBN: torch.Tensor) -> str:
    """Return the path to take where `path` is the fastest: shorter vectors where few heads would leave lanes idle."""
    if path == "avx512" and weight_LBN.shape[2] * weight_LBN.element_size() <= 64:
        return "avx2"
    return path


def round_panel_searched(path: str, rows: PanelRows, scan: GridScan, *, half_step: float) -> None:
    """Round every row on the cheapest of `scan.count` grids that its columns ask for as they stand."""
    assert len(rows.scale_GBN) == 1
    call = _new_call(rows, half_step=half_step)
    kept = set_scan(call.group, scan)
    call.group.scale, call.group.zero_point = rows.scale_GBN.data_ptr(), rows.zero_point_GBN.data_ptr()
    _run(path, call, rows)
    del kept


def round_panel_given(
    path: str, rows: PanelRows, grid_of_column: Sequence[int], max_code: int, *, half_step: float
) -> None:
    """Round every row on given grids; `grid_of_column` is an index into `G` for each of the `L` columns."""
    grid_L = torch.tensor(grid_of_column, dtype=torch.int64)
    assert len(grid_L) == len(rows.weight_LBN)
    call = _new_call(rows, half_step=half_step)
    group = call.group
    group.max_code, group.count = max_code, 1
    group.given_scale, group.given_zero_point = rows.scale_GBN.data_ptr(), rows.zero_point_GBN.data_ptr()
    group.given_stride, group.grid_of_column = rows.scale_GBN.stride(0), grid_L.data_ptr()
    _run(path, call, rows)


def _new_call(rows: PanelRows, *, half_step: float) -> _Call:
    num_columns, num_rows, num_heads = rows.weight_LBN.shape
    numbers = (rows.weight_LBN, rows.pending_LBN, rows.output_BBN, rows.error_LBN, rows.own_LBN, rows.codes_LBN)
    assert all(_follow_each_other(tensor) for tensor in (*numbers, rows.scale_GBN, rows.zero_point_GBN))
    assert rows.error_LBN.shape == rows.own_LBN.shape == rows.codes_LBN.shape == rows.weight_LBN.shape
    assert rows.error_LBN.stride(0) == rows.own_LBN.stride(0) == rows.codes_LBN.stride(0) or num_columns == 1
    assert rows.output_BBN.shape == (num_rows, num_rows, num_heads)
    assert rows.scale_GBN.stride(0) == rows.zero_point_GBN.stride(0) or len(rows.scale_GBN) == 1
    assert rows.clipped_BN.is_contiguous()
    assert rows.upper_LL.stride(1) == 1 or num_columns == 1
    group = GroupCall(half_step=half_step, num_columns=num_columns, num_rows=rows.error_LBN.stride(0))
    group.weight, group.weight_stride = rows.weight_LBN.data_ptr(), rows.weight_LBN.stride(0)
    group.pending, group.pending_stride = rows.pending_LBN.data_ptr(), rows.pending_LBN.stride(0)
    group.upper, group.upper_stride = rows.upper_LL.data_ptr(), rows.upper_LL.stride(0)
    group.error, group.weighted = rows.error_LBN.data_ptr(), rows.own_LBN.data_ptr()
    group.codes, group.clipped = rows.codes_LBN.data_ptr(), rows.clipped_BN.data_ptr()
    call = _Call(group=group, num_rows=num_rows, num_heads=num_heads)
    call.output, call.output_stride = rows.output_BBN.data_ptr(), rows.output_BBN.stride(0)
    if rows.earlier_LBN is not None:
        assert _follow_each_other(rows.earlier_LBN)
        call.earlier, call.earlier_stride = rows.earlier_LBN.data_ptr(), rows.earlier_LBN.stride(0)
    return call


def _follow_each_other(values: torch.Tensor) -> bool:
    num_heads = values.shape[2]
    return (values.stride(2) == 1 or num_heads == 1) and (values.stride(1) == num_heads or values.shape[1] == 1)


def _run(path: str, call: _Call, rows: PanelRows) -> None:
    library = load_library()
    assert library is not None
    size, threads = rows.weight_LBN.element_size(), torch.get_num_threads()
    check_done(library.shared.optgptq_round_panel(ctypes.byref(call), size, PATHS[path], threads))
