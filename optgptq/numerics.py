"""How torch multiplies float32 matrices: a setting of the whole process, changed here only and always put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(*, on_bfloat16_units: bool) -> Iterator[None]:
    """Within it, float32 products are exact to float32, or made of operands rounded to bfloat16.

    The second adds up in float32 too and is more than twice as fast where the processor has such units; elsewhere it
    changes nothing. TF32 is off in both.
    """
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision = "bf16" if on_bfloat16_units else "ieee"
    cuda.fp32_precision = "ieee"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before
