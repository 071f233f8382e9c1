"""One signature per operation; which implementation runs is a function of device and dtype, decided once per model.

A caller chooses with `choose_affine_matmul(...)`, logs the choice's `reason`, and passes `choice.call` on; there is no
global switch, so a test overrides the kernel by passing another callable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.kernels.reference import affine_matmul


class AffineMatmul(Protocol):
    """`x [..., I]` times an affine weight `[O, I]`, plus a bias `[O]`, gives `[..., O]` in the dtype of `x`."""

    def __call__(
        self, x: torch.Tensor, weight: AffineWeight, *, bias_O: torch.Tensor | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """An implementation and why it was taken.

    Attributes:
        operation: what it computes.
        name: which implementation.
        reason: one sentence for the log and for `optgptq doctor`.
        call: the implementation.
    """

    operation: str
    name: str
    reason: str
    call: AffineMatmul


def choose_affine_matmul(device: torch.device, dtype: torch.dtype) -> KernelChoice:
    """Return the kernel that multiplies with affine weights on `device` in `dtype`; plain torch runs anywhere."""
    dtype_name = str(dtype).removeprefix("torch.")
    return KernelChoice(
        operation="affine_matmul",
        name="reference",
        reason=f"plain torch (dequantize, then matmul) on {device.type} in {dtype_name}: the only kernel there is",
        call=affine_matmul,
    )
