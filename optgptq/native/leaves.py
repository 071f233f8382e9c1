"""Calls of the compiled leaves: what lies between the products of a decoder layer, on a processor.

Everything is computed in float32 and rounded once. A row depends on no other row, and has the same bits on any number
of threads. `optgptq.kernels.triton_leaves` has the same functions for GPUs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType

import torch

from optgptq.native.library import check_done, load_library
from optgptq.native.paged_attention import TYPES, numbered_path

# Names of configs to `Gate` of `source/leaves.hpp`.
GATED_KINDS: Mapping[str, int] = MappingProxyType(
    {
        "silu": 0,
        "swish": 0,
        "relu": 1,
        "gelu": 2,
        "gelu_python": 2,
        "gelu_new": 3,
        "gelu_fast": 3,
        "gelu_pytorch_tanh": 3,
        "gelu_python_tanh": 3,
        "quick_gelu": 4,
    }
)


class _SumNormCall(ctypes.Structure):
    """`SumNormCall` of `source/leaves.hpp`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "residual", "weight", "output")),
        *((name, ctypes.c_int64) for name in ("num_rows", "size", "type", "weight_type")),
        ("epsilon", ctypes.c_double),
    )


class _GatedCall(ctypes.Structure):
    """`GatedCall`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "up", "output")),
        *((name, ctypes.c_int64) for name in ("num_rows", "size", "gate_stride", "up_stride", "type", "kind")),
    )


class _DrawCall(ctypes.Structure):
    """`DrawCall`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("numbers", "greatest", "temperature", "uniform")),
        *((name, ctypes.c_int64) for name in ("num_rows", "size")),
        ("scale", ctypes.c_double),
    )


def takes_leaves(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether the calls below take tensors of this dtype."""
    return device.type == "cpu" and dtype in TYPES and load_library() is not None


def takes_activations(x: torch.Tensor) -> bool:
    """Say whether these go through `SumNorm` and `gated` while a model is calibrated or evaluated as a whole.

    bfloat16 without a gradient: torch rounds between the operations that one call makes here, and takes each of them
    through memory. In float32 it keeps the bits that transformers has.
    """
    return (
        x.dtype == torch.bfloat16
        and takes_leaves(x.device, x.dtype)
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


class SumNorm:
    """An RMS norm, of a sum where it is given a residual; what does not change from call to call is prepared."""

    __slots__ = ("_call", "_function", "_path", "_reference", "_size", "_weight")

    def __init__(self, weight: torch.Tensor | None, size: int, eps: float, *, path: str | None = None) -> None:
        """Prepare for rows of `size` numbers; `weight` is `[size]` of any type in `TYPES`, or None."""
        library, self._path = numbered_path(path)
        assert weight is None or (weight.is_contiguous() and weight.shape == (size,))
        # The call holds the address of the weight only.
        self._weight, self._size = weight, size
        weight_type = TYPES[torch.float32 if weight is None else weight.dtype]
        pointer = None if weight is None else weight.data_ptr()
        self._call = _SumNormCall(None, None, pointer, None, 0, size, 0, weight_type, eps)
        self._reference, self._function = ctypes.byref(self._call), library.shared.optgptq_sum_and_norm

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in the dtype of `x`.

        Args:
            x: `[..., size]`, rows one after the other. With a residual it becomes the rounded sum of both, and the sum
                is what is normed.
            residual: in the shape and dtype of `x`, or None.
        """
        assert x.is_contiguous()
        assert x.shape[-1] == self._size
        output, call = torch.empty_like(x), self._call
        if residual is None:
            call.residual = None
        else:
            assert residual.is_contiguous()
            assert residual.shape == x.shape
            assert residual.dtype == x.dtype
            call.residual = residual.data_ptr()
        call.input, call.output = x.data_ptr(), output.data_ptr()
        call.num_rows, call.type = x.numel() // self._size, TYPES[x.dtype]
        check_done(self._function(self._reference, self._path, torch.get_num_threads()))
        return output


def gated(gate: torch.Tensor, up: torch.Tensor, kind: str, *, path: str | None = None) -> torch.Tensor:
    """Return the activation of `gate` times `up`, `[..., I]`; `kind` is one of `GATED_KINDS`.

    The two may be halves of one joint projection `[..., 2 I]`, whose rows follow each other.
    """
    library, number = numbered_path(path)
    assert gate.shape == up.shape
    assert gate.dtype == up.dtype
    size = gate.shape[-1]
    output = torch.empty(gate.shape, dtype=gate.dtype)
    strides = _row_stride(gate), _row_stride(up)
    pointers = (gate.data_ptr(), up.data_ptr(), output.data_ptr())
    rows = output.numel() // size
    call = _GatedCall(*pointers, rows, size, *strides, TYPES[gate.dtype], GATED_KINDS[kind])
    check_done(library.shared.optgptq_gated(ctypes.byref(call), number, torch.get_num_threads()))
    return output


def joint_gated(joint: torch.Tensor, kind: str, *, path: str | None = None) -> torch.Tensor:
    """Return the same of a joint projection `[..., 2 I]`: gates, then what they are multiplied with."""
    library, number = numbered_path(path)
    assert joint.is_contiguous()
    size = joint.shape[-1] // 2
    output = torch.empty((*joint.shape[:-1], size), dtype=joint.dtype)
    first, rows = joint.data_ptr(), output.numel() // size
    call = _GatedCall(
        first,
        first + size * joint.element_size(),
        output.data_ptr(),
        rows,
        size,
        2 * size,
        2 * size,
        TYPES[joint.dtype],
        GATED_KINDS[kind],
    )
    check_done(library.shared.optgptq_gated(ctypes.byref(call), number, torch.get_num_threads()))
    return output


def greatest(numbers_BV: torch.Tensor, *, path: str | None = None) -> torch.Tensor:
    """Return the place of the first of the greatest numbers of each row, int64 `[B]`, as `argmax` does.

    What is not a number is the greatest. `numbers_BV` is float32, rows one after the other.
    """
    library, number = numbered_path(path)
    assert numbers_BV.dtype == torch.float32
    assert numbers_BV.is_contiguous()
    rows, size = numbers_BV.shape
    place_B = torch.empty(rows, dtype=torch.int64)
    pointers = (numbers_BV.data_ptr(), place_B.data_ptr())
    check_done(library.shared.optgptq_greatest(*pointers, rows, size, number, torch.get_num_threads()))
    return place_B


def draw(
    numbers_BV: torch.Tensor,
    greatest_B: torch.Tensor,
    *,
    temperature_B: torch.Tensor,
    uniform_B: torch.Tensor,
    bits: int,
    path: str | None = None,
) -> torch.Tensor:
    """Return the place in each row that a random number falls on, int64 `[B]`.

    A place has the whole part of `2**bits * exp((number - greatest) / temperature)` as its weight.

    Args:
        numbers_BV: float32, rows one after the other.
        greatest_B: float32, the greatest of each row. Where it is not finite, the place means nothing.
        temperature_B: float64, above 0.
        uniform_B: float64 of `[0, 1)`.
        bits: the weights of a row must come to less than `2**63`.
        path: a way of computing, or None for the fastest.
    """
    library, number = numbered_path(path)
    rows, size = numbers_BV.shape
    operands = (numbers_BV, greatest_B, temperature_B, uniform_B)
    for operand, dtype in zip(operands, (torch.float32, torch.float32, torch.float64, torch.float64), strict=True):
        assert operand.dtype == dtype
        assert operand.is_contiguous()
        assert len(operand) == rows
    place_B = torch.empty(rows, dtype=torch.int64)
    call = _DrawCall(*(operand.data_ptr() for operand in operands), rows, size, 2.0**bits)
    function = library.shared.optgptq_draw
    check_done(function(ctypes.byref(call), place_B.data_ptr(), number, torch.get_num_threads()))
    return place_B


def _row_stride(x: torch.Tensor) -> int:
    """Return the numbers from row to row of `[..., I]`, whose rows must be equally far from each other."""
    *outer, size = x.shape
    assert x.stride(-1) == 1 or size == 1
    strides = [(length, step) for length, step in zip(outer, x.stride(), strict=False) if length > 1]
    for (_, step), (length, inner) in pairwise(strides):
        assert step == length * inner
    return strides[-1][1] if strides else size
