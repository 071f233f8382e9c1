"""Scales and codes of finished rows made better, in C++. Its twin in torch is `optgptq.solvers.lanes`.

Shapes: `I` columns in the walk's order, `R` rows, `G` groups (contiguous, the last one may be shorter).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from optgptq.native.library import PATHS, check_done, load_library

_TENSORS = ("target", "moment", "steps", "scale", "lowest", "highest")
_INTEGERS = ("num_columns", "num_rows", "group_size", "scale_refit", "code_sweeps", "rounds", "changed")


class _Call(ctypes.Structure):
    """`RefineCall` of `source/refine.hpp`, field by field."""

    _fields_ = (*((name, ctypes.c_void_p) for name in _TENSORS), *((name, ctypes.c_int64) for name in _INTEGERS))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RefineRows:
    """What one call is given; dense tensors of one dtype. `steps_IR` and `scale_GR` are changed in place.

    Attributes:
        target_IR: what the levels should be.
        moment_II: undamped, symmetric.
        steps_IR: code minus zero point.
        scale_GR: storable scales, none of them zero.
        lowest_GR, highest_GR: the smallest and the largest step.
        group_size: columns of a group.
    """

    target_IR: torch.Tensor
    moment_II: torch.Tensor
    steps_IR: torch.Tensor
    scale_GR: torch.Tensor
    lowest_GR: torch.Tensor
    highest_GR: torch.Tensor
    group_size: int


def refine_rows(path: str, rows: RefineRows, *, scale_refit: bool, code_sweeps: int, rounds: int) -> bool:
    """Run the rounds and return whether a step or a scale changed; results do not depend on the number of threads."""
    shape_IR, dtype = rows.target_IR.shape, rows.target_IR.dtype
    shape_GR = (-(-shape_IR[0] // rows.group_size), shape_IR[1])
    tensors = (rows.target_IR, rows.moment_II, rows.steps_IR, rows.scale_GR, rows.lowest_GR, rows.highest_GR)
    assert all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in tensors)
    assert rows.steps_IR.shape == shape_IR
    assert rows.moment_II.shape == (shape_IR[0], shape_IR[0])
    assert rows.scale_GR.shape == rows.lowest_GR.shape == rows.highest_GR.shape == shape_GR
    numbers = (*shape_IR, rows.group_size, int(scale_refit), code_sweeps, rounds, 0)
    call = _Call(*(tensor.data_ptr() for tensor in tensors), *numbers)
    library = load_library()
    assert library is not None
    threads = torch.get_num_threads()
    check_done(
        library.shared.optgptq_refine_rows(ctypes.byref(call), rows.target_IR.element_size(), PATHS[path], threads)
    )
    return bool(call.changed)
