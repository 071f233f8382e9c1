"""The gradient of many rows, and what needs no further product with the moment: scales and codes, in C++.

Its twins in torch are `optgptq.solvers.refit_scales` and `optgptq.solvers.descend`.

Shapes: `R` rows, `I` columns in the walk's order, `G` groups (contiguous, the last one may be shorter).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from optgptq.native.library import PATHS, check_done, load_library

_POINTERS = ("moment", "gradient", "steps", "scale", "lowest", "highest", "loss")
_INTEGERS = ("num_columns", "num_rows", "group_size", "action", "code_sweeps", "changed")
# The numbers are those of `source/sweep.hpp`.
_GRADIENT, _REFIT, _SWEEPS = range(3)


class _Call(ctypes.Structure):
    """`SweepCall` of `source/sweep.hpp`, field by field."""

    _fields_ = (*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int64) for name in _INTEGERS))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SweepRows:
    """Dense tensors of one dtype.

    Attributes:
        moment_II: undamped, symmetric.
        gradient_RI: `(t - Q) H`; kept up to date by `sweep_codes`, not by `refit_known`. `find_gradient` finds the
            errors here.
        steps_RI: code minus zero point; changed by `sweep_codes`.
        scale_RG: storable scales, none of them zero; changed by `refit_known`.
        lowest_RG, highest_RG: the smallest and the largest step.
        group_size: columns of a group.
    """

    moment_II: torch.Tensor
    gradient_RI: torch.Tensor
    steps_RI: torch.Tensor
    scale_RG: torch.Tensor
    lowest_RG: torch.Tensor
    highest_RG: torch.Tensor
    group_size: int


def find_gradient(path: str, rows: SweepRows) -> torch.Tensor:
    """Put the gradient where the errors are; return float64 `[R]`, what each row loses."""
    loss_R = torch.zeros(len(rows.steps_RI), dtype=torch.float64)
    _run(path, rows, _GRADIENT, loss_R)
    return loss_R


def refit_known(path: str, rows: SweepRows) -> tuple[bool, torch.Tensor]:
    """Refit the scales in place; return whether one changed, and float64 `[R]`, what each row loses less."""
    gain_R = torch.zeros(len(rows.steps_RI), dtype=torch.float64)
    return _run(path, rows, _REFIT, gain_R), gain_R


def sweep_codes(path: str, rows: SweepRows, code_sweeps: int) -> bool:
    """Visit every column up to `code_sweeps` times, in place; return whether a code changed."""
    return _run(path, rows, _SWEEPS, None, code_sweeps=code_sweeps)


def _run(path: str, rows: SweepRows, action: int, loss_R: torch.Tensor | None, *, code_sweeps: int = 0) -> bool:
    (num_rows, num_columns), dtype = rows.steps_RI.shape, rows.steps_RI.dtype
    shape_RG = (num_rows, -(-num_columns // rows.group_size))
    tensors = (rows.moment_II, rows.gradient_RI, rows.steps_RI, rows.scale_RG, rows.lowest_RG, rows.highest_RG)
    assert all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in tensors)
    assert rows.gradient_RI.shape == rows.steps_RI.shape
    assert rows.moment_II.shape == (num_columns, num_columns)
    assert rows.scale_RG.shape == rows.lowest_RG.shape == rows.highest_RG.shape == shape_RG
    loss = None if loss_R is None else loss_R.data_ptr()
    numbers = (num_columns, num_rows, rows.group_size, action, code_sweeps, 0)
    call = _Call(*(tensor.data_ptr() for tensor in tensors), loss, *numbers)
    library = load_library()
    assert library is not None
    size, threads = rows.steps_RI.element_size(), torch.get_num_threads()
    check_done(library.shared.optgptq_sweep_rows(ctypes.byref(call), size, PATHS[path], threads))
    return bool(call.changed)
