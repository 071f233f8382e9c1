"""What lies between the products of a layer: one launch or call instead of several operations of torch.

On GPUs triton has it, for every model. On a processor the compiled library has it for models that run; calibration and
evaluation use its norms and gates in bfloat16 and torch in float32 (`optgptq.native.leaves.takes_activations`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch

from optgptq.native import leaves as native


class Leaves(Protocol):
    """The functions of `optgptq.kernels.triton_leaves`, which says what each does."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor: ...

    def rotate_in_place(
        self, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> None: ...

    def gated(self, gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor: ...


class SumNorm(Protocol):
    """An RMS norm, of a sum where it is given a residual; `optgptq.native.leaves` says more."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor: ...


class RunningLeaves(Protocol):
    """What a running model needs of `optgptq.native.leaves`."""

    @property
    def GATED_KINDS(self) -> Mapping[str, int]: ...  # noqa: N802 - the name that the module has

    def SumNorm(self, weight: torch.Tensor | None, size: int, eps: float) -> SumNorm: ...  # noqa: N802

    def gated(self, gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor: ...

    def joint_gated(self, joint: torch.Tensor, kind: str) -> torch.Tensor: ...


def running_leaves(device: torch.device, dtype: torch.dtype) -> RunningLeaves | None:
    """Return what a model that runs on `device` in `dtype` has between its products; None: what `leaves_for` gives."""
    return native if native.takes_leaves(device, dtype) else None


def leaves_for(x: torch.Tensor) -> Leaves | None:
    """Return the kernels for tensors like `x`; None where torch's own operations run.

    Or the compiled library: on a processor. torch has every tensor in float64, and where a gradient is wanted.
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
