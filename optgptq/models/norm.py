"""RMS norm and layer norm over the last dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812

from optgptq.kernels.leaves import leaves_for
from optgptq.models.spec import NormSpec
from optgptq.native.leaves import SumNorm, takes_activations


@dataclass(slots=True, eq=False)
class Norm:
    """One norm with its weights.

    Attributes:
        spec: kind and epsilon.
        size: features it runs over.
        weight: `[size]` with the offset of the spec already added, float32 where there is an offset; or None.
        bias: `[size]` or None.
    """

    spec: NormSpec
    size: int
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """Return the normed input in its own dtype."""
        shape = (self.size,)
        if self.spec.kind == "layer":
            return F.layer_norm(x, shape, self.weight, self.bias, self.spec.eps)
        leaves = leaves_for(x)
        if leaves is not None:
            return leaves.rms_norm(x, self.weight, self.spec.eps)
        if takes_activations(x) and x.is_contiguous():
            return SumNorm(self.weight, self.size, self.spec.eps)(x)
        if x.dtype == torch.float32 or not self.spec.weight_offset:
            return F.rms_norm(x, shape, self.weight, self.spec.eps)
        # Gemma multiplies by its weight in float32 and rounds once.
        return F.rms_norm(x.float(), shape, self.weight, self.spec.eps).to(x.dtype)
