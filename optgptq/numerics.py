"""How torch multiplies float32 matrices: a setting of the whole process, changed here only and always put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32_products() -> Iterator[None]:
    """Within it, float32 products use float32 operands, whatever the program around has allowed (TF32, bfloat16)."""
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision = cuda.fp32_precision = "ieee"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before
