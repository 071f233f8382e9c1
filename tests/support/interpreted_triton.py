"""What triton's interpreter does wrong with bfloat16 numbers, done right, for runs under `TRITON_INTERPRET=1`.

It adds and multiplies their bits as integers, and cuts where it should round.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the interpreter's products, differences and conversions for the rest of a test."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fsub", _subtract)
    monkeypatch.setattr(interpreter, "_convert_float", _convert)


def _dot(builder: Any, left: Any, right: Any, start: Any, *precision: Any) -> Any:
    factors = [_wide(operand).astype(np.float32) for operand in (left, right)]
    return interpreter.TensorHandle(np.matmul(*factors) + start.data, start.dtype.scalar)


def _subtract(builder: Any, left: Any, right: Any) -> Any:
    difference, dtype = _wide(left) - _wide(right), left.dtype.scalar
    if dtype == tl.bfloat16:
        difference = _convert(difference, tl.float32, dtype, None)
    return interpreter.TensorHandle(difference, dtype)


def _wide(operand: Any) -> Any:
    """Return the numbers, those of bfloat16 as float32."""
    if operand.dtype.scalar != tl.bfloat16:
        return operand.data
    return _convert(operand.data, tl.bfloat16, tl.float32, None).view(np.float32)


def _convert(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
    known = {tl.float16: np.float16, tl.float32: np.float32}
    if source == tl.bfloat16 and target == tl.float32:
        return (numbers.astype(np.uint32) << 16).reshape(numbers.shape)
    assert source in known, (source, target, rounding)
    rounded = torch.from_numpy(np.ascontiguousarray(numbers.view(known[source])))
    if target == tl.bfloat16:
        return rounded.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return rounded.numpy().astype(known[target]).view(np.uint16 if target == tl.float16 else np.uint32)
