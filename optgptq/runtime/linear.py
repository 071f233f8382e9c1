"""A linear whose weight stays quantized in memory and is multiplied by a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.kernels import AffineMatmul


@dataclass(slots=True, eq=False, kw_only=True)
class QuantLinear:
    """`x @ weight.T + bias`, callable in place of `optgptq.models.linear.Linear`.

    Attributes:
        weight: codes, scales and zero points.
        bias_O: `[O]` or None.
        kernel: what multiplies, chosen once per model with `optgptq.kernels.choose_affine_matmul`.
    """

    weight: AffineWeight
    bias_O: torch.Tensor | None
    kernel: AffineMatmul

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        return self.kernel(x, self.weight, bias_O=self.bias_O)
