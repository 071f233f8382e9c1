"""What lies between the products of a layer, on GPUs: one launch instead of several, where triton is there."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch


class Leaves(Protocol):
    """The functions of `optgptq.kernels.triton_leaves`, which says what each does."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor: ...

    def rotate_in_place(
        self, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> None: ...

    def gated(self, gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor: ...


def leaves_for(x: torch.Tensor) -> Leaves | None:
    """Return the kernels for tensors like `x`; None where torch's own operations run.

    Those are used for every tensor on a processor, for float64, and where a gradient is wanted.
    """
    if not x.is_cuda or x.dtype == torch.float64 or (torch.is_grad_enabled() and x.requires_grad):
        return None
    return _triton_leaves()


@cache
def _triton_leaves() -> Leaves | None:
    if find_spec("triton") is None:
        return None
    from optgptq.kernels import triton_leaves

    return triton_leaves
